"""Data sets: splits, decoding and its cache, errors that name the file, seeded batches, atomic files. Images are made here with Pillow."""

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rse_fast import data

Image = pytest.importorskip("PIL.Image")

rng = np.random.default_rng()


def random_pixels(height: int = 9, width: int = 7, channels: int = 3) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def make_folder(root: Path, per_class: int = 10, classes: tuple[str, ...] = ("cat", "dog"), suffix: str = ".png") -> dict[str, np.ndarray]:
    """Images of random pixels at root/CLASS/NN.suffix; returns them by relative name."""
    made = {f"{name}/{i:02}{suffix}": random_pixels() for name in classes for i in range(per_class)}
    for name, pixels in made.items():
        save(root / name, pixels)
    return made


def rows_of(part: data.Part) -> set[bytes]:
    return {image.numpy().tobytes() for image in part.images}


@pytest.fixture(autouse=True)
def no_cache_elsewhere(monkeypatch, tmp_path_factory):
    """Tests never touch the user's cache."""
    monkeypatch.delenv("RSE_FAST_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


# Digits


def test_digits_are_split_by_class_and_cover_everything():
    datasets = pytest.importorskip("sklearn.datasets")
    splits = data.digits()
    assert splits.train.images.shape[1:] == (1, 8, 8)
    assert splits.classes == tuple("0123456789")
    assert not splits.flip  # a mirrored digit is not a digit
    expected = datasets.load_digits()
    pixels = np.concatenate([part.images.numpy() for part in (splits.train, splits.val, splits.test)])
    labels = np.concatenate([part.labels.numpy() for part in (splits.train, splits.val, splits.test)])
    assert len(labels) == 1797

    def ordered(rows: np.ndarray, names: np.ndarray) -> np.ndarray:
        table = np.column_stack([rows.reshape(len(rows), -1), names])
        return table[np.lexsort(table.T)]

    scaled = np.rint(expected.images * 255 / 16)
    assert np.array_equal(ordered(pixels.astype(int), labels), ordered(scaled.astype(int), expected.target))
    for part, share in ((splits.train, 0.6), (splits.val, 0.1), (splits.test, 0.3)):
        shares = np.bincount(part.labels.numpy(), minlength=10) / np.bincount(expected.target)
        assert np.abs(shares - share).max() < 0.01


def test_digits_are_the_same_in_another_process():
    pytest.importorskip("sklearn")
    code = "import hashlib; from rse_fast import data; print(hashlib.sha256(data.digits().test.images.numpy().tobytes()).hexdigest())"
    import hashlib

    here = hashlib.sha256(data.digits().test.images.numpy().tobytes()).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=os.getcwd())
    assert there.stdout.strip() == here


# Image folders: layouts and pixels


def test_train_and_test_folders(tmp_path):
    train, test = make_folder(tmp_path / "train"), make_folder(tmp_path / "test", per_class=3)
    splits = data.image_folder(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 2, 6)
    assert rows_of(splits.train) | rows_of(splits.val) == {pixels.transpose(2, 0, 1).tobytes() for pixels in train.values()}
    wanted = [(pixels.transpose(2, 0, 1), int(name.startswith("dog"))) for name, pixels in sorted(test.items())]
    assert np.array_equal(splits.test.images.numpy(), np.stack([pixels for pixels, _ in wanted]))
    assert splits.test.labels.tolist() == [label for _, label in wanted]


def test_plain_class_folders_are_split_by_name_alone(tmp_path):
    made = make_folder(tmp_path / "a")
    for name, pixels in reversed(made.items()):
        save(tmp_path / "b" / name, pixels)
    first, second = data.image_folder(tmp_path / "a"), data.image_folder(tmp_path / "b")
    parts = (first.train, first.val, first.test)
    assert [len(part) for part in parts] == [14, 2, 4]
    assert [part.labels.bincount().tolist() for part in parts] == [[7, 7], [1, 1], [2, 2]]
    assert set.union(*map(rows_of, parts)) == {pixels.transpose(2, 0, 1).tobytes() for pixels in made.values()}
    by_pixels = {pixels.transpose(2, 0, 1).tobytes(): int(name.startswith("dog")) for name, pixels in made.items()}
    for part, other in zip(parts, (second.train, second.val, second.test), strict=True):
        assert torch.equal(part.images, other.images)
        assert [by_pixels[image.numpy().tobytes()] for image in part.images] == part.labels.tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(".png", "RGB"), (".png", "L"), (".png", "P"), (".png", "RGBA"), (".bmp", "RGB"), (".ppm", "RGB"), (".gif", "P"), (".png", "1")],
)
def test_lossless_formats_and_modes(tmp_path, suffix, mode, channels):
    wanted = []
    for name in ("cat", "dog"):
        for i in range(3):
            image = Image.fromarray(random_pixels()).convert(mode)
            (tmp_path / name).mkdir(exist_ok=True)
            image.save(tmp_path / name / f"{i}{suffix}")
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
            wanted.append(pixels.reshape(9, 7, channels).transpose(2, 0, 1).tobytes())
    splits = data.image_folder(tmp_path, channels=channels)
    assert splits.train.images.shape[1:] == (channels, 9, 7)
    assert rows_of(splits.train) | rows_of(splits.val) | rows_of(splits.test) == set(wanted)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_lossy_formats(tmp_path, suffix):
    for name, level in (("cat", 60), ("dog", 200)):
        for i in range(3):
            save(tmp_path / name / f"{i}{suffix}", np.full((16, 16, 3), level, np.uint8))
    splits = data.image_folder(tmp_path)
    assert (splits.name == f"{tmp_path.name} (JPEG)") == (suffix != ".webp")
    for part in (splits.train, splits.val, splits.test):
        levels = torch.tensor([60, 200])[part.labels]
        assert (part.images.long() - levels[:, None, None, None]).abs().max() <= 2


def test_camera_orientation_is_applied(tmp_path):
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:2] = 255  # white on top
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees: viewers turn it clockwise
    for name in ("cat", "dog"):
        for i in range(3):
            save(tmp_path / name / f"{i}.png", np.rot90(upright).copy(), exif=exif)
    assert torch.equal(data.image_folder(tmp_path).test.images[0], torch.from_numpy(upright.transpose(2, 0, 1).copy()))


def test_resize_crops_at_the_centre_to_the_aspect(tmp_path):
    for name in ("cat", "dog"):
        for i in range(3):
            pixels = np.zeros((10 * (i + 1), 40 * (i + 1), 3), np.uint8)
            pixels[:, 15 * (i + 1) : 25 * (i + 1)] = 255  # the middle square is white
            save(tmp_path / name / f"{i}.png", pixels)
    splits = data.image_folder(tmp_path, resize=5)
    assert splits.train.images.shape[1:] == (3, 5, 5)
    # Resampling reads beyond the crop, so the outermost may be darker; squeezing the whole width would leave one white column in five.
    assert all((part.images[..., 1:4, 1:4] >= 250).all() for part in (splits.train, splits.val, splits.test))
    assert data.image_folder(tmp_path, resize=(4, 6)).train.images.shape[1:] == (3, 4, 6)


def test_hidden_entries_and_other_files_are_passed_over(tmp_path):
    make_folder(tmp_path, per_class=3)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"not an image")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("two classes")
    splits = data.image_folder(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert len(splits.train) + len(splits.val) + len(splits.test) == 6


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_do_not_change_the_pixels(tmp_path, workers):
    pixels = make_folder(tmp_path / "train", per_class=100)
    make_folder(tmp_path / "test", per_class=2)
    splits = data.image_folder(tmp_path, workers=workers, progress=True)
    assert rows_of(splits.train) | rows_of(splits.val) == {p.transpose(2, 0, 1).tobytes() for p in pixels.values()}
    assert len(splits.train) == 180


# Image folders: bad input


def test_truncated_and_broken_files_are_named(tmp_path):
    make_folder(tmp_path, per_class=3)
    save(tmp_path / "cat" / "07.jpg", random_pixels(64, 64))
    whole = (tmp_path / "cat" / "07.jpg").read_bytes()
    (tmp_path / "cat" / "07.jpg").unlink()
    good = data.image_folder(tmp_path)
    for name, content in {"cut.jpg": whole[: len(whole) // 2], "empty.png": b"", "text.png": b"<html>", "head.jpg": whole[:30]}.items():
        bad = tmp_path / "dog" / name
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="cannot read the image") as error:
            data.image_folder(tmp_path)
        assert str(bad) in str(error.value)
        bad.unlink()
    assert torch.equal(data.image_folder(tmp_path).train.images, good.train.images)


def test_16_bit_images_are_refused_and_named(tmp_path):
    make_folder(tmp_path, per_class=3)
    bad = tmp_path / "dog" / "deep.png"
    Image.fromarray(rng.integers(0, 2**16, (9, 7), dtype=np.uint16)).save(bad)
    with pytest.raises(ValueError, match="8 bits") as error:
        data.image_folder(tmp_path)
    assert str(bad) in str(error.value)


def test_mixed_sizes_are_named_unless_resized(tmp_path):
    make_folder(tmp_path, per_class=3)
    odd = tmp_path / "dog" / "odd.png"
    save(odd, random_pixels(11, 7))
    with pytest.raises(ValueError, match=r"^resize: .*mixed sizes.*9x7.*11x7") as error:
        data.image_folder(tmp_path)
    assert str(odd) in str(error.value)
    assert len(data.image_folder(tmp_path, resize=8).train) == 3  # of 3 and 4 images, one each is for validation, one for testing


def test_layouts_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="^path: .*not there"):
        data.image_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^path: .*a file"):
        data.image_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="^path: .*at least two class folders"):
        data.image_folder(tmp_path)
    make_folder(tmp_path / "one", classes=("cat",))
    with pytest.raises(ValueError, match="^path: .*at least two class folders"):
        data.image_folder(tmp_path / "one")
    make_folder(tmp_path / "gap")
    (tmp_path / "gap" / "emu").mkdir()
    with pytest.raises(ValueError, match="^path: no images .*emu"):
        data.image_folder(tmp_path / "gap")
    make_folder(tmp_path / "deep")
    make_folder(tmp_path / "deep" / "cat")
    with pytest.raises(ValueError, match="^path: .*found the folder 'cat'|found the folder 'dog'"):
        data.image_folder(tmp_path / "deep")
    make_folder(tmp_path / "two" / "train")
    make_folder(tmp_path / "two" / "test", classes=("cat", "emu"))
    with pytest.raises(ValueError, match=r"^path: classes of train/ and test/ differ.*\['dog', 'emu'\]"):
        data.image_folder(tmp_path / "two")
    make_folder(tmp_path / "few", per_class=2)
    with pytest.raises(ValueError, match="^path: a class has only 2 images"):
        data.image_folder(tmp_path / "few")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resize", 0),
        ("resize", (4, 0)),
        ("resize", (4, 4, 4)),
        ("resize", 4.0),
        ("resize", "44"),
        ("channels", 2),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("test_fraction", float("nan")),
        ("workers", 0),
    ],
)
def test_bad_arguments_are_named_before_anything_is_read(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        data.image_folder(tmp_path / "nowhere", **{name: value})


# Image folders: the cache


class Unpickled:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npy"))


def test_cache_is_used_while_nothing_changed(tmp_path):
    make_folder(tmp_path)
    first = data.image_folder(tmp_path)
    (cached,) = cached_files(tmp_path / ".rse-fast")
    # The pixels of a file change while its name, size and time do not: only the cache can still know the old ones.
    victim = tmp_path / "cat" / "00.png"
    stat = victim.stat()
    victim.write_bytes(b"x" * stat.st_size)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = data.image_folder(tmp_path)
    for part, other in ((first.train, again.train), (first.val, again.val), (first.test, again.test)):
        assert torch.equal(part.images, other.images) and torch.equal(part.labels, other.labels)
    assert cached_files(tmp_path) == [cached]


def test_cache_is_renewed_when_a_file_changes_appears_or_goes(tmp_path):
    make_folder(tmp_path)
    data.image_folder(tmp_path)
    (cached,) = cached_files(tmp_path)

    pixels = random_pixels()
    victim = tmp_path / "cat" / "00.png"
    save(victim, pixels)
    os.utime(victim, ns=(1, 10**18))
    changed = data.image_folder(tmp_path)
    assert pixels.transpose(2, 0, 1).tobytes() in rows_of(changed.train) | rows_of(changed.val) | rows_of(changed.test)
    assert cached_files(tmp_path) != [cached]
    assert len(cached_files(tmp_path)) == 1  # the old array is gone

    save(tmp_path / "dog" / "new.png", pixels)
    assert sum(map(len, (lambda s: (s.train, s.val, s.test))(data.image_folder(tmp_path)))) == 21
    (tmp_path / "dog" / "new.png").rename(tmp_path / "cat" / "new.png")
    moved = data.image_folder(tmp_path)
    assert sum(part.labels.sum().item() for part in (moved.train, moved.val, moved.test)) == 10
    victim.unlink()
    assert sum(map(len, (lambda s: (s.train, s.val, s.test))(data.image_folder(tmp_path)))) == 20


def test_cache_keeps_apart_what_shapes_the_pixels(tmp_path):
    make_folder(tmp_path)
    shapes = [data.image_folder(tmp_path, **options).train.images.shape[1:] for options in ({}, {"resize": 5}, {"channels": 1}, {})]
    assert shapes == [(3, 9, 7), (3, 5, 5), (1, 9, 7), (3, 9, 7)]
    assert len(cached_files(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "other shape"])
def test_damaged_cache_is_made_anew(tmp_path, damage):
    make_folder(tmp_path)
    first = data.image_folder(tmp_path)
    (cached,) = cached_files(tmp_path)
    content = cached.read_bytes()
    if damage == "cut":
        cached.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        cached.write_bytes(b"")
    elif damage == "pickle":
        np.save(cached, np.array([Unpickled(tmp_path / "pickle was run")], dtype=object), allow_pickle=True)
    else:
        np.save(cached, np.zeros((2, 3, 9, 7), np.uint8))
    with pytest.warns(UserWarning, match="damaged"):
        again = data.image_folder(tmp_path)
    assert torch.equal(first.train.images, again.train.images)
    assert cached.read_bytes() == content
    assert not (tmp_path / "pickle was run").exists()


def test_cache_place_can_be_chosen(tmp_path, monkeypatch):
    make_folder(tmp_path / "images")
    monkeypatch.setenv("RSE_FAST_CACHE", str(tmp_path / "chosen"))
    data.image_folder(tmp_path / "images")
    assert cached_files(tmp_path / "images") == []
    assert len(cached_files(tmp_path / "chosen")) == 1


def test_read_only_folder_uses_the_home_cache(tmp_path, monkeypatch):
    make_folder(tmp_path)
    # Permissions do not bind root, who may run these tests.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    data.image_folder(tmp_path)
    assert cached_files(tmp_path) == []
    assert len(cached_files(Path.home() / ".cache" / "rse-fast")) == 1


def test_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    make_folder(tmp_path / "images")
    (tmp_path / "occupied").write_text("a file where a folder is needed")
    monkeypatch.setenv("RSE_FAST_CACHE", str(tmp_path / "occupied"))
    with pytest.warns(UserWarning, match="could not be cached"):
        assert len(data.image_folder(tmp_path / "images").train) == 14


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


def test_derived_seeds_are_distinct():
    seeds = {data.derived_seed(seed, stream, step) for seed in range(5) for stream in range(5) for step in range(100)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (2, False), (2, True)])
def test_augment_gives_every_crop_and_mirror_and_nothing_else(pad, flip):
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
    found = data.augment(image.expand(count, -1, -1, -1), torch.Generator().manual_seed(int(rng.integers(2**31))), pad=pad, flip=flip)
    assert found.shape == (count, 3, 6, 5) and found.dtype == torch.uint8
    assert {crop.contiguous().numpy().tobytes() for crop in found} == allowed


def test_augment_draws_anew_for_each_image():
    images = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 1, 5, 5).expand(100, -1, -1, -1)
    found = data.augment(images, torch.Generator().manual_seed(0), pad=1, flip=False)
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


# Releases


def cifar_batches(count: int = 20) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images uint8 [N, 3, 32, 32] and labels of six batches: all classes in each."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {name: (rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), np.arange(count) % 10) for name in names}


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the published files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def write_cifar(folder: Path, batches: dict, kind: str) -> None:
    for name, (images, labels) in batches.items():
        if kind == "binary":
            records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
            continue
        content = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": images.reshape(len(images), -1)}
        with open(folder / name, "wb") as file:
            if kind == "python 2":
                Python2Pickler(file, protocol=2).dump(content)
            else:
                pickle.dump({key.decode(): value for key, value in content.items()}, file, protocol=int(kind))


@pytest.mark.parametrize("kind", ["binary", "python 2", "2", "4"])
def test_cifar10_releases(tmp_path, kind):
    batches = cifar_batches()
    write_cifar(tmp_path, batches, kind)
    splits = data.load(tmp_path)
    assert splits.name == "CIFAR-10" and splits.classes[3] == "cat"
    assert (len(splits.train), len(splits.val), len(splits.test)) == (90, 10, 20)
    images, labels = batches.pop("test_batch")
    assert np.array_equal(splits.test.images, images) and np.array_equal(splits.test.labels, labels)
    by_pixels = {image.tobytes(): label for images, labels in batches.values() for image, label in zip(images, labels, strict=True)}
    assert rows_of(splits.train) | rows_of(splits.val) == by_pixels.keys()
    for part in (splits.train, splits.val):
        assert [by_pixels[image.numpy().tobytes()] for image in part.images] == part.labels.tolist()


def test_pickled_cifar10_is_not_run(tmp_path):
    write_cifar(tmp_path, cifar_batches(), "python 2")
    for payload in (Unpickled(tmp_path / "run"), {b"data": Unpickled(tmp_path / "run"), b"labels": [1]}, {b"data": np.float64}):
        with open(tmp_path / "data_batch_3", "wb") as file:
            pickle.dump(payload, file)
        with pytest.raises(ValueError, match=r"data_batch_3.* not a batch .*not allowed"):
            data.cifar10(tmp_path)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "other type", "few labels", "label 10"])
@pytest.mark.parametrize("kind", ["binary", "python 2"])
def test_damaged_cifar10_is_named(tmp_path, damage, kind):
    batches = cifar_batches()
    write_cifar(tmp_path, batches, kind)
    victim = tmp_path / ("data_batch_2" + ".bin" * (kind == "binary"))
    images, labels = batches["data_batch_2"]
    content = victim.read_bytes()
    if damage in ("other type", "few labels"):
        if kind == "binary":
            pytest.skip("the binary release has neither")
        flat = images.reshape(len(images), -1)
        changed = {b"data": flat.astype(np.int64) if damage == "other type" else flat, b"labels": labels.tolist()[:-1]}
        with open(victim, "wb") as file:
            Python2Pickler(file, protocol=2).dump(changed)
    elif damage == "missing":
        victim.unlink()
    elif damage == "label 10":
        write_cifar(tmp_path, {"data_batch_2": (images, labels + 1)}, kind)
    else:
        victim.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    with pytest.raises(ValueError, match=r"^path: .*data_batch_2"):
        data.cifar10(tmp_path)


def write_stl(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    made = {name: (rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8), np.arange(count) % 10) for name, count in
            (("train", 20), ("test", 10))}  # fmt: skip
    for name, (images, labels) in made.items():
        (folder / f"{name}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())  # column by column
        (folder / f"{name}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    return made


def test_stl10(tmp_path):
    made = write_stl(tmp_path)
    splits = data.load(tmp_path)
    assert splits.name == "STL-10" and (len(splits.train), len(splits.val)) == (10, 10)
    assert np.array_equal(splits.test.images, made["test"][0]) and np.array_equal(splits.test.labels, made["test"][1])
    assert rows_of(splits.train) | rows_of(splits.val) == {image.tobytes() for image in made["train"][0]}
    (tmp_path / "train_y.bin").write_bytes(bytes(20))
    with pytest.raises(ValueError, match=r"^path: expected labels 1 \.\. 10 .*train_y"):
        data.stl10(tmp_path)
    (tmp_path / "train_y.bin").write_bytes(bytes([1] * 19))
    with pytest.raises(ValueError, match="^path: 20 images but 19 labels"):
        data.stl10(tmp_path)
    (tmp_path / "test_X.bin").unlink()
    write_stl(tmp_path)
    (tmp_path / "test_X.bin").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="^path: .*test_X.bin"):
        data.stl10(tmp_path)


def some_arrays(channels: int = 1) -> dict[str, np.ndarray]:
    return {
        "train_images": rng.integers(0, 256, (30, channels, 5, 4), dtype=np.uint8), "train_labels": np.arange(30, dtype=np.int32) % 3,
        "test_images": rng.integers(0, 256, (6, channels, 5, 4), dtype=np.uint8), "test_labels": np.arange(6, dtype=np.uint8) % 3,
    }  # fmt: skip


def write_arrays(path: Path, stored: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **stored)
    else:
        pytest.importorskip("safetensors.numpy").save_file(stored, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays(tmp_path, suffix):
    stored = some_arrays()
    path = write_arrays(tmp_path / f"mine{suffix}", stored)
    splits = data.load(path, val_fraction=0.3)
    assert (splits.name, splits.classes) == ("mine", ("0", "1", "2"))
    assert (len(splits.train), len(splits.val)) == (21, 9)
    assert np.array_equal(splits.test.images, stored["test_images"]) and splits.test.labels.dtype == torch.int64
    assert rows_of(splits.train) | rows_of(splits.val) == {image.tobytes() for image in stored["train_images"]}
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^path: .*mine{suffix}"):
            data.load(path)
    for change, words in (
        ({"train_images": stored["train_images"].astype(np.float32)}, "train_images as uint8"),
        ({"test_images": stored["test_images"][:, 0]}, "test_images as uint8"),
        ({"test_labels": stored["test_labels"].astype(np.float32)}, "test_labels as 6 integers"),
        ({"train_labels": stored["train_labels"] - 1}, "train_labels as 30 integers >= 0"),
        ({"train_labels": stored["train_labels"][:-1]}, "train_labels as 30 integers"),
    ):
        with pytest.raises(ValueError, match=f"^path: expected {words}"):
            data.arrays(write_arrays(path, stored | change))
    stored.pop("train_labels")
    with pytest.raises(ValueError, match="^path: cannot read .*train_labels"):
        data.arrays(write_arrays(path, stored))


def test_arrays_hold_no_pickle(tmp_path):
    np.savez(tmp_path / "bad.npz", **some_arrays() | {"train_labels": np.array([Unpickled(tmp_path / "run")] * 30, dtype=object)})
    with pytest.raises(ValueError, match="^path: cannot read"):
        data.load(tmp_path / "bad.npz")
    assert not (tmp_path / "run").exists()


def test_load_tells_the_kinds_apart_and_refuses_what_one_does_not_take(tmp_path):
    make_folder(tmp_path / "folder")
    assert data.load(tmp_path / "folder", resize=4).train.shape == (3, 4, 4)
    assert isinstance(data.load(tmp_path / "folder", resize=4, lazy=True, workers=0).train, data.FilePart)
    path = write_arrays(tmp_path / "a.npz", some_arrays())
    with pytest.raises(ValueError, match="^resize: only an image folder"):
        data.load(path, resize=4)
    with pytest.raises(ValueError, match="^lazy: only an image folder"):
        data.load(path, lazy=True)
    with pytest.raises(ValueError, match="^val_fraction: "):
        data.load(path, val_fraction=1.0)
    with pytest.raises(ValueError, match="^path: .*must end with"):
        data.load(write_arrays(tmp_path / "a.npz", some_arrays()).rename(tmp_path / "a.bin"))
    with pytest.raises(ValueError, match="^path: .*not there"):
        data.load(tmp_path / "nowhere")


# Atomic files


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "report.md"
    data.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise error

    with pytest.raises(error):
        data.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.md"]
    data.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["report.md"]


def test_written_file_has_ordinary_permissions(tmp_path):
    data.write_atomically(tmp_path / "a", lambda file: file.write(b""))
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_import_brings_none_of_the_optional_packages():
    code = "import sys, rse_fast.data; print([m for m in ('PIL', 'sklearn', 'scipy', 'matplotlib') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# The real thing


@pytest.mark.data
def test_cifar10_jpeg(monkeypatch, tmp_path):
    folder = os.environ.get("RSE_FAST_CIFAR10")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RSE_FAST_CIFAR10 does not name a folder with CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg")
    monkeypatch.setenv("RSE_FAST_CACHE", str(tmp_path))
    splits = data.image_folder(folder)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (45_000, 5_000, 10_000)
    assert splits.train.images.shape[1:] == (3, 32, 32)
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    assert len(splits.classes) == 10 and splits.name.endswith("(JPEG)")
    again = data.image_folder(folder)
    assert torch.equal(splits.train.images, again.train.images)
