"""Image folders and digits: splits, decoding and its cache, errors that name the file; atomic files. Images are made here with Pillow."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_images import Image, Unpickled, cached_files, make_folder, random_pixels, rows_of, save

from rse_fast import data

pytestmark = [pytest.mark.usefixtures("no_cache_elsewhere"), pytest.mark.filterwarnings("ignore:.*has no train/ and test/")]


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


def test_16_bit_images_are_refused_and_named(tmp_path, rng):
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
    with pytest.raises(ValueError, match=r"^path: a class has only 2 images in .*few"):
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


def test_cache_is_used_while_nothing_changed(tmp_path):
    make_folder(tmp_path)
    first = data.image_folder(tmp_path)
    (cached,) = cached_files(Path.home())
    # The pixels of a file change while its name, size and time do not: only the cache can still know the old ones.
    victim = tmp_path / "cat" / "00.png"
    stat = victim.stat()
    victim.write_bytes(b"x" * stat.st_size)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = data.image_folder(tmp_path)
    for part, other in ((first.train, again.train), (first.val, again.val), (first.test, again.test)):
        assert torch.equal(part.images, other.images) and torch.equal(part.labels, other.labels)
    assert cached_files(Path.home()) == [cached]


def test_cache_is_renewed_when_a_file_changes_appears_or_goes(tmp_path):
    make_folder(tmp_path)
    data.image_folder(tmp_path)
    (cached,) = cached_files(Path.home())

    pixels = random_pixels()
    victim = tmp_path / "cat" / "00.png"
    save(victim, pixels)
    os.utime(victim, ns=(1, 10**18))
    changed = data.image_folder(tmp_path)
    assert pixels.transpose(2, 0, 1).tobytes() in rows_of(changed.train) | rows_of(changed.val) | rows_of(changed.test)
    assert cached_files(Path.home()) != [cached]
    assert len(cached_files(Path.home())) == 1  # the old array is gone

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
    assert len(cached_files(Path.home())) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "other shape"])
def test_damaged_cache_is_made_anew(tmp_path, damage):
    make_folder(tmp_path)
    first = data.image_folder(tmp_path)
    (cached,) = cached_files(Path.home())
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


def test_the_cache_is_the_users_and_leaves_the_data_alone(tmp_path, monkeypatch):
    make_folder(tmp_path / "images")
    before = sorted(tmp_path.rglob("*"))
    data.image_folder(tmp_path / "images")
    assert sorted(tmp_path.rglob("*")) == before
    assert len(cached_files(Path.home() / ".cache" / "rse-fast")) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data.image_folder(tmp_path / "images")
    assert len(cached_files(tmp_path / "xdg" / "rse-fast")) == 1


def test_the_cache_is_safe_where_several_write_it(tmp_path):
    """Processes at once see the same images; a leftover of one that was killed goes with the next write."""
    make_folder(tmp_path)
    code = "import sys, hashlib; from rse_fast import data; s = data.image_folder(sys.argv[1])\n"
    code += "print(hashlib.sha256(s.train.images.numpy().tobytes()).hexdigest())"
    several = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, tmp_path], stdout=subprocess.PIPE) for _ in range(3)]
    found = {process.communicate(timeout=120)[0] for process in several}
    assert len(found) == 1 and len(found.pop()) == 65 and [process.returncode for process in several] == [0] * 3
    (cached,) = cached_files(Path.home())
    (cached.parent / f".{cached.name}.0a1b2c3d.tmp").write_bytes(b"half")
    cached.unlink()
    data.image_folder(tmp_path)
    assert {path.name for path in cached.parent.iterdir()} == {cached.name, ".lock"}


def test_a_user_without_a_home_has_no_cache(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor the table of users says
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match="not cached.*RSE_FAST_CACHE"):
        assert len(data.image_folder(tmp_path).train) == 14
    assert sorted(tmp_path.rglob("*")) == before


def test_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    make_folder(tmp_path / "images")
    (tmp_path / "occupied").write_text("a file where a folder is needed")
    monkeypatch.setenv("RSE_FAST_CACHE", str(tmp_path / "occupied"))
    with pytest.warns(UserWarning, match="could not be cached"):
        assert len(data.image_folder(tmp_path / "images").train) == 14


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


def test_a_file_of_lines_is_one_process_alone_and_goes_on_behind_its_last_whole_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one\ntwo\nthr")
    code = "import sys; from rse_fast import data; f = data.append(sys.argv[1]); f.write(b'three\\n'); f.flush(); print('', flush=True)"
    code += "; input()"
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is writing '.*rows.jsonl'"):
            data.append(path)
        other.kill()
    with data.append(path) as file:
        file.write(b"four\n")
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def unknown(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unknown)
    with data.append(tmp_path / "rows.jsonl") as file:
        file.write(b"one\n")
    assert (tmp_path / "rows.jsonl").read_bytes() == b"one\n"


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
