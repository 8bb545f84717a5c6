"""Folders of images as users have them: which layouts are read, what is said of the others, and photos whose EXIF data are damaged."""

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from tiny_images import Image, make_folder, rows_of, save

from rse_fast import data
from rse_fast.data.folder import _decode
from rse_fast.train import Config
from rse_fast.train.command import main

for package in ("safetensors", "tqdm"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("no_cache_elsewhere")


def pixels_of(made) -> set[bytes]:
    return {pixels.transpose(2, 0, 1).tobytes() for pixels in made.values()}


# ------------------------------------------------------------------------------------------------------------------------- the parts
@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("train", "valid", "test"), ("training", "validation", "testing"), ("Train", "VAL", "Test")]
)
@pytest.mark.parametrize("lazy", [False, True])
def test_three_parts_are_each_their_own_folder(tmp_path, names, lazy):
    made = [make_folder(tmp_path / name, per_class=count) for name, count in zip(names, (6, 3, 2), strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = data.image_folder(tmp_path, lazy=lazy, resize=(9, 7) if lazy else None, workers=0 if lazy else None)
    parts = (splits.train, splits.val, splits.test)
    assert [len(part) for part in parts] == [12, 6, 4] and splits.classes == ("cat", "dog")
    for part, written in zip(parts, made, strict=True):
        found = {part[i].numpy().tobytes() for i in range(len(part))} if lazy else rows_of(part)
        assert found == pixels_of(written)
        by_pixels = {pixels.transpose(2, 0, 1).tobytes(): int(name.startswith("dog")) for name, pixels in written.items()}
        (images,) = part.fetch([torch.arange(len(part))])
        assert [by_pixels[image.numpy().tobytes()] for image in images] == part.labels.tolist()


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "TESTING"), ("training", "testing")])
def test_without_val_a_share_of_train_is_set_aside(tmp_path, names):
    train, test = (make_folder(tmp_path / name) for name in names)
    splits = data.image_folder(tmp_path)
    assert (len(splits.train), len(splits.val)) == (18, 2)
    assert rows_of(splits.train) | rows_of(splits.val) == pixels_of(train) and rows_of(splits.test) == pixels_of(test)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["train/cat", "train/dog", "val/cat", "val/dog"], r"found train/, val/ in .*, but no test/; understood are .*call it test/"),
        (["train/cat", "train/dog"], r"found train/ in .*, but no test/; understood are train/CLASS/\*"),
        (["test/cat", "test/dog"], "found test/ in .*, but no train/; understood"),
        (["valid/cat", "valid/dog"], "found valid/ in .*, but no train/ and no test/; understood"),
        (["train/cat", "train/dog", "more/cat", "more/dog"], "found train/ in .*, but no test/; understood"),
        (["train/cat", "train/dog", "val/cat", "val/dog", "valid/cat", "test/cat", "test/dog"], "holds both val/ and valid/"),
        (["train/cat", "train/dog", "test"], r"at least two class folders in '.*test', found \[\] and 3 images that lie in none; underst"),
        (["cat"], r"at least two class folders in .*, found \['cat'\]; understood"),
        (["set/train/cat", "set/train/dog", "set/test/cat", "set/test/dog"], "holds no data set, but '.*/set' seems to"),
        (["train/cat", "train/dog", "test/cat", "test/dog", "val/cat", "val/emu"], r"train/ and val/ differ.*\['dog', 'emu'\]"),
    ],
)  # fmt: skip
def test_a_message_says_what_was_found_and_what_is_understood(tmp_path, folders, words):
    for folder in folders:
        for i in range(3):
            save(tmp_path / folder / f"{i}.png", np.zeros((4, 4, 3), np.uint8))
    if not words.startswith("holds no"):
        with pytest.raises(ValueError, match=f"^path: .*{words}"):
            data.load(tmp_path)
    else:
        with pytest.raises(ValueError, match=words):
            data.load(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    make_folder(tmp_path, classes=("bus", "car", "train"), per_class=10)
    with pytest.warns(UserWarning, match="has no train/ and test/"):
        assert data.image_folder(tmp_path).classes == ("bus", "car", "train")


def test_what_is_not_read_is_told(tmp_path):
    for part in ("train", "test"):
        make_folder(tmp_path / part, per_class=4)
    make_folder(tmp_path / "extra", per_class=2)
    with pytest.warns(UserWarning, match="train/, test/ are read; passed over: 'extra'"):
        assert len(data.image_folder(tmp_path).train) == 6
    (tmp_path / "extra").rename(tmp_path / ".extra")
    save(tmp_path / "train" / "lost.png", np.zeros((9, 7, 3), np.uint8))
    with pytest.warns(UserWarning, match="1 images in '.*train' lie in no class folder"):
        assert len(data.image_folder(tmp_path).train) == 6


def test_files_of_a_class_that_are_not_read_are_told(tmp_path, recwarn):
    for part in ("train", "test"):
        make_folder(tmp_path / part, per_class=4)
    folder = next((tmp_path / "train").iterdir())
    for name in ("Thumbs.db", ".hidden.heic"):
        (folder / name).write_bytes(b"")
    assert len(data.image_folder(tmp_path).train) == 6 and not recwarn.list
    Image.new("RGB", (7, 9)).save(folder / "photo.JFIF", format="JPEG")
    (folder / "photo.heic").write_bytes(b"")
    (folder / "photo").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"files that are passed over: 2, such as '.*photo'; images are read by their names: \.bmp"):
        read = data.image_folder(tmp_path)
    assert len(read.train) + len(read.val) + len(read.test) == 2 * 8 + 1


def test_a_split_that_was_not_asked_for_is_told(tmp_path):
    make_folder(tmp_path)
    with pytest.warns(UserWarning, match="no train/ and test/: of each class, 30% .*testing and 10% for validation"):
        data.image_folder(tmp_path, test_fraction=0.3)


# ---------------------------------------------------------------------------------------------------------------- the command line
TINY = ["--model", "tiny_training:net", "--epochs", "1", "--batch-size", "4", "--device", "cpu", "--defence", "plain"]


def test_the_command_names_its_own_options_and_takes_what_an_error_asks_for(tmp_path, capsys):
    for part in ("train", "test"):
        make_folder(tmp_path / "images" / part)
    save(tmp_path / "images" / "train" / "cat" / "odd.png", np.zeros((20, 30, 3), np.uint8))
    flags = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "run"), *TINY]
    assert main(flags) == 2
    assert "--resize N or HxW" in capsys.readouterr().err
    for size, wanted in (("12", (3, 12, 12)), ("12x10", (3, 12, 10))):
        out = str(tmp_path / size)
        assert main([*flags, "--resize", size, "--out", out]) == 0
        config = Config.load(tmp_path / size / "config.json")
        assert data.load(config.data, resize=config.resize).train.shape == wanted
    assert main(["--data", str(tmp_path / "nowhere"), *TINY]) == 2
    assert capsys.readouterr().err.startswith("rse-fast train: --data: expected a folder of images")
    for wrong in ([3], [3, 0], [1, 2, 3], "12x10", [3.0, 4]):
        with pytest.raises((TypeError, ValueError), match="^resize: expected"):
            Config(resize=wrong)


# ------------------------------------------------------------------------------------------------------------------------------ EXIF
def exif(*entries) -> bytes:
    """EXIF data of (tag, kind, count, value) beside an orientation of 6: a quarter turn."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in ((0x0112, 3, 1, struct.pack("<HH", 6, 0)), *entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1 + len(entries)) + packed + bytes(4)


def stored(kind: str, pixels: np.ndarray, raw: bytes) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, exif=raw)
    return out.getvalue()


@pytest.mark.parametrize(
    "entry",
    [
        (0x011A, 2, 4, b"7/2\0"), (0x0100, 8, 1, struct.pack("<hh", -3, 0)), (0x0101, 11, 1, struct.pack("<f", 1.5)),
        (0x8769, 4, 1, struct.pack("<I", 2**31)), (0x8825, 4, 1, struct.pack("<I", 8)), (0x010F, 2, 2**32 - 1, b"\xff\xff\xff\xff"),
        (0x9999, 99, 7, b"????"), (0x011A, 5, 1, struct.pack("<I", 10**6)), (0x0128, 3, 0, bytes(4)), (0x927C, 7, 4, b"\xff\xfe\xfd\xfc"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_other_entries_of_the_exif_data_do_not_matter(tmp_path, rng, entry):
    pixels = rng.integers(0, 256, (4, 8, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(stored("PNG", pixels, exif(entry)))
    assert np.array_equal(_decode(tmp_path / "a.png", None, 3).transpose(1, 2, 0), np.rot90(pixels, -1))
    (tmp_path / "a.jpg").write_bytes(stored("JPEG", pixels, exif(entry)))
    assert _decode(tmp_path / "a.jpg", None, 3).shape == (3, 8, 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_an_image_whose_pixels_decode_is_never_refused_for_its_exif_data(tmp_path, rng, kind):
    pixels = rng.integers(0, 256, (4, 8, 3), dtype=np.uint8)
    whole, path = exif((0x011A, 5, 1, struct.pack("<I", 30)), (0x0131, 2, 4, b"abc\0")), tmp_path / "a"
    for _ in range(150):
        raw = bytearray(whole)
        for place in rng.integers(6, len(raw), rng.integers(1, 12)):
            raw[place] = rng.integers(256)
        path.write_bytes(stored(kind, pixels, bytes(raw[: rng.integers(6, len(raw) + 1)])))
        assert sorted(_decode(path, None, 3).shape) == [3, 4, 8]


@pytest.mark.parametrize("turn", range(1, 9))
def test_each_orientation_is_made_upright(tmp_path, rng, turn):
    from PIL import ImageOps

    pixels = rng.integers(0, 256, (4, 8, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=tags)
    with Image.open(tmp_path / "a.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(_decode(tmp_path / "a.png", None, 3).transpose(1, 2, 0), upright)
