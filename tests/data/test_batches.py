"""Batches: order and augmentation as functions of the seed, shares of processes, folders that are decoded batch by batch."""

import pytest
import torch
from tiny_images import cached_files, make_folder

from rse_fast import data

pytestmark = pytest.mark.usefixtures("no_cache_elsewhere")


# Batches and augmentation


def random_part(count: int = 23, channels: int = 3, size: int = 6) -> data.Part:
    return data.Part(torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8), torch.arange(count))


def test_batches_in_order_without_generator():
    part = random_part()
    found = list(data.batches(part, 10))
    assert [len(labels) for _, labels in found] == [10, 10, 3]
    images = torch.cat([images for images, _ in found])
    assert images.dtype == torch.float32
    assert torch.equal(images, part.images / 255)
    assert torch.equal(torch.cat([labels for _, labels in found]), part.labels)


def test_batches_of_several_ranks_cover_everything_once():
    part = random_part()
    found = [torch.cat([labels for _, labels in data.batches(part, 4, rank=rank, ranks=3)]) for rank in range(3)]
    assert sorted(torch.cat(found).tolist()) == list(range(23))
    assert [len(labels) for labels in found] == [8, 8, 7]
    tiny = data.Part(part.images[:1], part.labels[:1])
    assert [len(list(data.batches(tiny, 4, rank=rank, ranks=2))) for rank in range(2)] == [1, 0]


def shuffled(part: data.Part, batch_size: int = 64, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The batches of an epoch, one behind the other."""
    found = list(data.shuffled(part, batch_size, **({"seed": 1, "epoch": 0, "pad": 1, "flip": True} | options)))
    return torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found])


def test_shuffled_is_a_function_of_seed_and_epoch():
    part = random_part(192)
    images, labels = shuffled(part)
    again, labels_again = shuffled(part)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() == 1
    assert sorted(labels.tolist()) == list(range(192)) and labels.tolist() != list(range(192))
    for other in ({"seed": 2}, {"epoch": 1}):
        other_images, other_labels = shuffled(part, **other)
        assert not torch.equal(other_labels, labels)
        rows = labels.argsort(), other_labels.argsort()  # the same image is cropped in another way, too
        assert not torch.equal(images[rows[0]], other_images[rows[1]])


def test_shuffled_can_be_entered_at_any_batch():
    part = random_part(100)
    images, labels = shuffled(part, 16)
    assert len(labels) == 96  # the last batch would not be full
    for start in range(7):
        rest = list(data.shuffled(part, 16, seed=1, epoch=0, start=start, pad=1, flip=True))
        assert len(rest) == 6 - start
        for i, (some, names) in enumerate(rest, start):
            assert torch.equal(some, images[16 * i : 16 * i + 16]) and torch.equal(names, labels[16 * i : 16 * i + 16])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batches_of_one(ranks):
    part = random_part(50)
    whole = list(data.shuffled(part, 12, seed=3, epoch=2, pad=2, flip=True))
    shares = [data.shuffled(part, 12, seed=3, epoch=2, pad=2, flip=True, rank=rank, ranks=ranks) for rank in range(ranks)]
    for (images, labels), *parts in zip(whole, *shares, strict=True):
        assert torch.equal(images, torch.cat([some for some, _ in parts]))
        assert torch.equal(labels, torch.cat([names for _, names in parts]))


def test_two_epochs_show_every_image_both_ways():
    part = random_part(200)
    seen = []
    for epoch in range(4):
        images, labels = shuffled(part, 50, epoch=epoch, pad=0)
        seen.append(images[labels.argsort()] * 255 == part.images.flip(-1))
    mirrored = torch.stack(seen).flatten(2).all(-1)  # [epoch, image]
    assert torch.equal(mirrored[0], ~mirrored[1]) and torch.equal(mirrored[:2], mirrored[2:])
    assert 60 < mirrored[0].sum() < 140  # a half, within 5.7 standard deviations
    for other in ({"seed": 2}, {"flip": False}):
        images, labels = shuffled(part, 50, pad=0, **other)
        differ = mirrored[0] != (images[labels.argsort()] * 255 == part.images.flip(-1)).flatten(1).all(-1)
        assert 60 < differ.sum() < 140  # flip=False mirrors none, so these are the mirrored ones


def test_derived_seeds_are_distinct():
    seeds = {data.derived_seed(seed, stream, step) for seed in range(5) for stream in range(5) for step in range(100)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (2, False), (2, True)])
def test_augment_gives_every_crop_and_mirror_and_nothing_else(pad, flip, rng):
    image = torch.randint(1, 256, (3, 6, 5), dtype=torch.uint8)
    padded = torch.zeros(3, 6 + 2 * pad, 5 + 2 * pad, dtype=torch.uint8)
    padded[:, pad : pad + 6, pad : pad + 5] = image
    allowed = set()
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + 6, left : left + 5]
            allowed.add(crop.numpy().tobytes())
            if flip:
                allowed.add(crop.flip(-1).contiguous().numpy().tobytes())
    count = 3000  # about 60 of each of the 50 variants: that one is missing has a chance below 1e-20
    mirrored = torch.rand(count) < 0.5 if flip else None
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    found = data.augment(image.expand(count, -1, -1, -1), generator, pad=pad, mirrored=mirrored)
    assert found.shape == (count, 3, 6, 5) and found.dtype == torch.uint8
    assert {crop.contiguous().numpy().tobytes() for crop in found} == allowed


def test_augment_draws_anew_for_each_image():
    images = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 1, 5, 5).expand(100, -1, -1, -1)
    found = data.augment(images, torch.Generator().manual_seed(0), pad=1)
    assert len({image.contiguous().numpy().tobytes() for image in found}) > 5


def test_batches_bad_arguments():
    part = random_part()
    with pytest.raises(ValueError, match="^batch_size: "):
        data.batches(part, 0)
    for options in ({"batch_size": 0}, {"batch_size": 24}, {"batch_size": 9, "ranks": 2}):
        with pytest.raises(ValueError, match="^batch_size: "):
            data.shuffled(part, **options, seed=0, epoch=0)
    with pytest.raises(ValueError, match="^images: .*uint8"):
        data.Part(torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="^labels: "):
        data.Part(part.images, part.labels[:-1])
    empty = data.Part(part.images[:0], part.labels[:0])
    assert list(data.batches(empty, 4)) == []


# Folders that are decoded batch by batch


@pytest.mark.parametrize("workers", [0, 2])
def test_lazy_folder_gives_what_the_decoded_one_gives(tmp_path, workers):
    make_folder(tmp_path)
    decoded = data.image_folder(tmp_path, resize=6)
    lazy = data.image_folder(tmp_path, resize=6, lazy=True, workers=workers)
    assert lazy.train.shape == decoded.train.shape == (3, 6, 6) and (lazy.pad, lazy.flip) == (decoded.pad, decoded.flip)
    state = torch.get_rng_state()
    for name in ("val", "test"):
        for (images, labels), (others, names) in zip(
            data.batches(getattr(lazy, name), 3), data.batches(getattr(decoded, name), 3), strict=True
        ):
            assert torch.equal(images, others) and torch.equal(labels, names)
    for a, b in zip(shuffled(lazy.train, 4), shuffled(decoded.train, 4), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


def test_lazy_folder_needs_a_size_and_leaves_no_cache(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(ValueError, match="^resize: .*lazy"):
        data.image_folder(tmp_path, lazy=True)
    data.image_folder(tmp_path, resize=6, lazy=True)
    assert cached_files(tmp_path) == []
