"""Data sets as published, CIFAR-10 and STL-10, and files of arrays: read without running what a pickle holds."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_images import Python2Pickler, Unpickled, cifar_batches, make_folder, rows_of, write_cifar

from rse_fast import data

pytestmark = pytest.mark.usefixtures("no_cache_elsewhere")


# Releases


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
    made = {name: (np.random.randint(0, 256, (count, 3, 96, 96), dtype=np.uint8), np.arange(count) % 10) for name, count in
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
        "train_images": np.random.randint(0, 256, (30, channels, 5, 4), dtype=np.uint8), "train_labels": np.arange(30, dtype=np.int32) % 3,
        "test_images": np.random.randint(0, 256, (6, channels, 5, 4), dtype=np.uint8), "test_labels": np.arange(6, dtype=np.uint8) % 3,
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
        with pytest.raises(ValueError, match=f"^path: .*mine{suffix}.*expected {words}"):
            data.arrays(write_arrays(path, stored | change))
    stored.pop("train_labels")
    with pytest.raises(ValueError, match="^path: cannot read .*train_labels"):
        data.arrays(write_arrays(path, stored))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"train_labels": s["train_labels"] + 1}, "at least two classes 0, 1, ..., each there, got \\[1 "),
        (lambda s: {"train_labels": s["train_labels"] * 0}, "at least two classes"),
        (lambda s: {"test_labels": s["test_labels"] + 100}, "expected test_labels below"),
        (lambda s: {"test_images": s["test_images"][..., :-1]}, "expected test_images of the shape of train_images"),
        (lambda s: {"test_images": s["test_images"][:0], "test_labels": s["test_labels"][:0]}, "expected images in test_images"),
        (lambda s: {k: s[k].transpose(0, 2, 3, 1) for k in ("train_images", "test_images")}, "looks like \\[N, H, W, C\\]"),
    ],
)
def test_arrays_that_would_train_something_else_are_refused(change, words, tmp_path):
    stored = some_arrays()
    with pytest.raises(ValueError, match=rf"^path: .*a\.npz.*{words}"):
        data.arrays(write_arrays(tmp_path / "a.npz", stored | change(stored)))


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
