"""Files with bytes changed, cut off, doubled or replaced: the reader reads them or says which file is damaged; within bounded time and
memory, and without running anything."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st

for package in ("PIL", "safetensors", "tqdm"):
    pytest.importorskip(package)
from safetensors.torch import save_file  # noqa: E402
from tiny_images import Unpickled, cifar_batches, random_pixels, save, write_cifar  # noqa: E402
from tiny_training import config, write_images  # noqa: E402

from rse_fast import certify_cli  # noqa: E402
from rse_fast.data import lines  # noqa: E402
from rse_fast.train import train  # noqa: E402

ROW = {"index": 1, "target": 1, "label": 3, "probability": 0.25, "entropy": None, "mutual_information": 0.0, "draws_used": 4}
EVALUATED = {
    "case": "pgd", "index": 1, "target": 1, "answers": [1, 2], "l2": 0.5, "linf": 0.1, "verdict": True, "queries": 2.0, "seconds": 0.1,
    "seeds": [5, 2**63], "by_draws": {"2": 1}, "example": "AAAA",
}  # fmt: skip


def certified() -> bytes:
    texts = ["\t".join(map(str, dataclasses.astuple(certify_cli.Row(i, 1, 1, 0.25, 1, 0.75, 90, 100, 0.5)))).encode() for i in range(3)]
    return "\t".join([*certify_cli.COLUMNS, "crc32\n"]).encode() + b"".join(t + f"\t{lines.checksum(t)}\n".encode() for t in texts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with whole files of every kind: (reader, what it is given, the file to change) by name."""
    root = tmp_path_factory.mktemp("whole")
    for name, suffix, options in (
        ("png", ".png", {}),
        ("jpg", ".jpg", {}),
        ("gif", ".gif", {}),
        ("tif", ".tiff", {"compression": "tiff_lzw"}),
        ("webp", ".webp", {}),
    ):
        for kind in ("cat", "dog"):
            for i in range(3):
                save(root / name / kind / f"{i}{suffix}", random_pixels(), **options)
    targets = {
        f"image {name}": ("folder", name, f"{name}/cat/0{suffix}")
        for name, suffix in (("png", ".png"), ("jpg", ".jpg"), ("gif", ".gif"), ("tif", ".tiff"), ("webp", ".webp"))
    }
    for name, kind in (("binary", "binary"), ("pickle 2", "2"), ("pickle 4", "4"), ("python 2", "python 2")):
        (root / name).mkdir()
        write_cifar(root / name, cifar_batches(20), kind)
        ending = ".bin" if name == "binary" else ""
        targets[f"cifar10 {name}"] = ("cifar10", name, f"{name}/data_batch_3{ending}")
    (root / "stl").mkdir()
    for part in ("train", "test"):
        (root / "stl" / f"{part}_X.bin").write_bytes(np.random.default_rng(0).integers(0, 256, (20, 3, 96, 96), dtype=np.uint8).tobytes())
        (root / "stl" / f"{part}_y.bin").write_bytes((np.arange(20) % 10 + 1).astype(np.uint8).tobytes())
    targets["stl10 images"], targets["stl10 labels"] = ("stl10", "stl", "stl/train_X.bin"), ("stl10", "stl", "stl/test_y.bin")
    images, labels = np.zeros((30, 1, 5, 4), np.uint8), np.arange(30) % 3
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(root / "arrays.npz", **arrays)
    np.savez_compressed(root / "packed.npz", **arrays)
    save_file({name: torch.from_numpy(value).clone() for name, value in arrays.items()}, root / "arrays.safetensors")
    for name in ("arrays.npz", "packed.npz", "arrays.safetensors"):
        targets[name] = ("arrays", name, name)
    train(config(write_images(root / "images.npz", np.random.default_rng(0)), epochs=1, save_steps=2), root / "run")
    checkpoint = sorted((root / "run" / "checkpoints").iterdir())[-1].name
    targets |= {f"run {name}": ("best", "run", f"run/{name}") for name in ("data.json", "best.safetensors")}
    names = [path.name for path in (root / "run" / "checkpoints" / checkpoint).iterdir()]
    targets |= {f"checkpoint {name}": ("last", "run", f"run/checkpoints/{checkpoint}/{name}") for name in names}
    targets |= {"config": ("config", "run/config.json", "run/config.json"), "log": ("log", "run/log.jsonl", "run/log.jsonl")}
    (root / "rows").mkdir()
    (root / "rows" / "rows-0.jsonl").write_bytes(b"".join(lines.json_line(EVALUATED | {"index": i}) for i in range(3)))
    (root / "rows" / "predictions-0.jsonl").write_bytes(b"".join(lines.json_line(ROW | {"index": i}) for i in range(3)))
    (root / "rows" / "certified.tsv").write_bytes(certified())
    (root / "settings").mkdir()
    (root / "settings" / "predict.json").write_text(json.dumps({"seed": 7}))
    targets |= {"rows": ("rows", "rows", "rows/rows-0.jsonl"), "predictions": ("predictions", "rows", "rows/predictions-0.jsonl")}
    targets |= {
        "certified": ("certified", "rows/certified.tsv", "rows/certified.tsv"),
        "settings": ("settings", "settings", "settings/predict.json"),
    }
    return root, targets


class Reader:
    """The process that reads. One that died is told of, and the next question starts another."""

    def __init__(self, root, targets, home):
        self.root, self.targets, self.process = root, targets, None
        path = str(Path(__file__).parents[1] / "helpers")
        self.environment = {**os.environ, "PYTHONPATH": path, "HOME": str(home), "RSE_FAST_CACHE": str(home), "OMP_NUM_THREADS": "1"}

    def ask(self, kind, path) -> dict:
        if self.process is None:
            command = [sys.executable, "-W", "ignore", "-m", "read_files"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment)
            for reader, given_path in {(reader, given_path) for reader, given_path, _ in self.targets.values()}:
                answer = self._ask(reader, self.root / given_path)  # whole files; and then all is imported
                assert answer["error"] is None, (reader, answer)
            self._ask("limit", "")
        return self._ask(kind, path)

    def _ask(self, kind, path):
        self.process.stdin.write(f"{kind} {path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            died, self.process = self.process.wait(timeout=10), None
            raise AssertionError(f"the reader of {path} ended with status {died}")
        return json.loads(answer)

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def reader(whole, tmp_path_factory):
    one = Reader(*whole, tmp_path_factory.mktemp("home"))
    yield one
    one.close()


@st.composite
def changed(draw, content: bytes):
    """Other bytes, one to four changes away."""
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        size = len(content)
        # The first and the last bytes hold what says how large and where things are.
        place = draw(st.integers(0, size) | st.integers(0, min(size, 200)) | st.integers(max(0, size - 200), size))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 1000]))
        how = draw(
            st.sampled_from(["flip", "random", "same", "number", "cut", "end", "double", "insert", "digits", "brackets", "text", "code"])
        )
        before, middle, after = content[:place], content[place : place + length], content[place + length :]
        if how == "flip" and middle:
            middle = bytes([middle[0] ^ 1 << draw(st.integers(0, 7))]) + middle[1:]
        elif how == "random":
            middle = draw(st.binary(min_size=len(middle), max_size=len(middle)))
        elif how == "same":
            middle = bytes([draw(st.sampled_from([0, 255, 32, 128]))]) * len(middle)
        elif how == "number":
            value = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
            width = draw(st.sampled_from([2, 4, 8]))
            middle, after = (value % 256**width).to_bytes(width, draw(st.sampled_from(["little", "big"]))), content[place + width :]
        elif how == "cut":
            middle = b""
        elif how == "end":
            middle = after = b""
        elif how == "double":
            middle = middle * draw(st.sampled_from([2, 3, 100]))
        elif how == "insert":
            middle = draw(st.binary(max_size=40)) + middle
        elif how == "digits":
            after = after.translate(bytes.maketrans(b"0123456789", b"9999999999"), b"") if place % 2 else b"9" * 400 + after
        elif how == "brackets":
            middle = draw(st.sampled_from([b"[", b'{"a":', b"(", b"]"])) * 30_000
        elif how == "text":
            middle = draw(
                st.sampled_from([b"null", b"-1", b"1e999", b"NaN", b'"\xff"', b"\x00", b"../../x", b"true", b"{}", b"[]", b"1" * 5000])
            )
        elif how == "code":
            middle = draw(
                st.sampled_from([pickle.dumps(Unpickled(Path("it ran")), p) for p in (0, 2, 4)] + [b"cos\nsystem\n(S'touch it_ran'\ntR."])
            )
        content = before + middle + after
    return content


@cases(0.1)
@given(data=st.data())
def test_changed_files(data, whole, reader, tmp_path_factory):
    root, targets = whole
    name = data.draw(st.sampled_from(sorted(targets)))
    kind, given_path, file = targets[name]
    content = (root / file).read_bytes()
    huge = data.draw(st.integers(0, 19)) == 0
    other = content if huge else data.draw(changed(content))
    folder = tmp_path_factory.mktemp("changed")
    top = given_path.split("/")[0]
    (shutil.copytree if (root / top).is_dir() else shutil.copyfile)(root / top, folder / top)
    (folder / file).write_bytes(other)
    if huge:
        os.truncate(folder / file, 2**38)  # takes no room on disk
    try:
        answer = reader.ask(kind, folder / given_path)
    finally:
        ran = [path for path in (folder / "it ran", folder / "it_ran", Path("it ran"), Path("it_ran")) if path.exists()]
        shutil.rmtree(folder)
    assert not answer["forbidden"] and not ran, answer
    assert answer["seconds"] < 20
    if answer["error"] is not None:
        error, is_value_error, text = answer["error"]
        assert is_value_error, answer["error"]
        assert "MemoryError" not in text and len(text) < 1500
        named = [Path(file).name, Path(file).stem, *(["checkpoints", "checkpoint"] if "checkpoints" in file else [])]
        assert any(part in text for part in named), (named, text)
