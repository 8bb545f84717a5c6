"""Folders and files that someone else wrote, or that a disk changed: no code of theirs runs, nothing is waited for, memory stays bounded,
and an error names the file."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from entropy import seeded
from tiny_images import cifar_batches, make_folder, save, write_cifar
from tiny_training import config, same, write_images

for package in ("safetensors", "tqdm"):
    pytest.importorskip(package)
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from rse_fast import certify_cli, data, predict_cli, run_inputs  # noqa: E402
from rse_fast.cli import wrapper  # noqa: E402
from rse_fast.data import lines  # noqa: E402
from rse_fast.evaluate import rows  # noqa: E402
from rse_fast.train import CheckpointError, Config, Trainer, checkpoint, load_model, train  # noqa: E402
from rse_fast.train.command import main  # noqa: E402
from rse_fast.train.log import read  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "no_cache_elsewhere")

PLANTED = "from pathlib import Path\nPath({place!r}).touch()\nfrom tiny_training import net\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images.npz", seeded(__name__))


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    train(config(images, epochs=1, save_steps=2), out)
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A run folder that a test may damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def own_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def no_hang():
    """What waits for a pipe is interrupted."""

    def interrupt(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def set_fields(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --------------------------------------------------------------------------------------------------------- whose code is imported
def test_a_run_folder_that_names_a_module_is_code_and_needs_trust(run, tmp_path, monkeypatch, own_path, capsys):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "it ran"
    Path("planted_in_a_run.py").write_text(PLANTED.format(place=str(place)))
    set_fields(run / "config.json", model="planted_in_a_run:net")
    for which in ("best", "last"):
        with pytest.raises(ValueError, match="^trust: .*config.json' names the model 'planted_in_a_run:net', code"):
            load_model(run, which)
    for command in (predict_cli.main, certify_cli.main):
        assert command([str(run), "--out", "out"]) == 2
        assert "--trust" in capsys.readouterr().err
    for arguments in (["--resume", str(run)], ["--config", str(run / "config.json"), "--out", "out"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("rse-fast train: --trust: ")
    assert not place.exists() and not Path("out").exists() and os.getcwd() not in sys.path
    assert predict_cli.main([str(run), "--out", "out", "--trust", "--draws", "2", "--device", "cpu"]) == 0
    assert place.exists() and sys.path[-1] == os.getcwd() and sys.path[0] != os.getcwd()


def test_a_teachers_folder_names_no_other_model(images, tmp_path):
    settings = config(images, epochs=1, defence="distillation")
    train(settings, tmp_path / "run")
    rows_of_log = (tmp_path / "run" / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "log.jsonl").write_text("".join(rows_of_log[:-1]))
    set_fields(tmp_path / "run" / "teacher" / "config.json", model="no_such_module:net")
    with pytest.raises(ValueError, match="another configuration"):
        train(settings, tmp_path / "run", resume=True)


def test_the_working_directory_replaces_no_package(images, tmp_path):
    """Where no model of the user's own is named, nothing is imported from there."""
    train(config(images, epochs=1, model="small"), tmp_path / "run")
    for package in ("scipy", "tqdm", "safetensors", "PIL", "sklearn", "tensorboard", "matplotlib"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(PLANTED.format(place=str(tmp_path / "it ran")))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "start.py").write_text("import sys\nfrom rse_fast import cli\nsys.exit(cli.main(sys.argv[1:]))\n")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "bin/start.py", "certify", "run", "--n0", "5", "--n", "20", "--images", "2", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "it ran").exists()


# -------------------------------------------------------------------------------------------------------------- signals and waiting
def test_before_the_loop_sigterm_ends_the_process_at_once(images, tmp_path):
    (tmp_path / "waits.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(300)\n")
    command = [sys.executable, "-m", "rse_fast.cli", "train", "--data", str(images), "--model", "waits:net", "--batch-size", "9"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"begun\n"
            process.terminate()
            assert process.wait(timeout=30) == -signal.SIGTERM
        finally:
            process.kill()
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize("what", ["pipe", "dangling link", "device"])
def test_only_regular_files_are_images(tmp_path, what):
    make_folder(tmp_path, per_class=3)
    bad = tmp_path / "dog" / "x.png"
    {"pipe": os.mkfifo, "dangling link": lambda p: p.symlink_to("nowhere"), "device": lambda p: p.symlink_to("/dev/zero")}[what](bad)
    with pytest.raises(ValueError, match=r"^path: .*dog'.* found 'x.png', which is (a link|no regular file)"):
        data.load(tmp_path)
    with pytest.raises(ValueError, match="^path: cannot read the image .*x.png"):
        data.FilePart((bad,), torch.zeros(1, dtype=torch.int64), (3, 9, 7), 0)[0]
    bad.unlink()
    (tmp_path / "emu").symlink_to("nowhere")
    with pytest.raises(ValueError, match="^path: .*emu' is a link to what is not there"):
        data.load(tmp_path)


def test_an_image_is_handed_to_no_other_program(tmp_path, monkeypatch):
    """PostScript under another name is Ghostscript's to Pillow."""
    make_folder(tmp_path / "images", per_class=3)
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path / 'it ran'}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    bad = tmp_path / "images" / "dog" / "x.png"
    bad.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="^path: cannot read the image .*x.png"):
        data.load(tmp_path / "images")
    assert not (tmp_path / "it ran").exists()


def test_links_in_a_circle_are_named(tmp_path):
    make_folder(tmp_path, per_class=3)
    (tmp_path / "dog" / "x.png").symlink_to("y.png")
    (tmp_path / "dog" / "y.png").symlink_to("x.png")
    with pytest.raises(ValueError, match="^path: .*[xy].png"):
        data.load(tmp_path)


def replace_by_pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.usefixtures("no_hang", "own_path")
def test_no_reader_waits_for_a_pipe(run, tmp_path):
    def refused(path, call, error=ValueError):
        kept = path.read_bytes() if path.exists() else None
        replace_by_pipe(path)
        with pytest.raises(error, match=path.name):
            call()
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)

    settings = Config.load(run / "config.json")
    newest = checkpoint.find(run / "checkpoints")[0]
    refused(run / "config.json", lambda: load_model(run))
    refused(run / "data.json", lambda: load_model(run, trust=True))
    refused(run / "best.safetensors", lambda: load_model(run, trust=True))
    refused(newest / "manifest.json", lambda: load_model(run, "last", trust=True))
    refused(newest / "state.pt", lambda: load_model(run, "last", trust=True))
    refused(run / "log.jsonl", lambda: train(settings, run, resume=True))
    refused(tmp_path / "rows-0.jsonl", lambda: rows.read(tmp_path))
    refused(tmp_path / "predictions-0.jsonl", lambda: predict_cli.read(tmp_path))
    refused(tmp_path / "certified.tsv", lambda: certify_cli.read_table(tmp_path / "certified.tsv"))
    refused(tmp_path / "predict.json", lambda: run_inputs.open_folder(tmp_path, "predict.json", {}, None))
    write_cifar(tmp_path, cifar_batches(), "binary")
    refused(tmp_path / "data_batch_4.bin", lambda: data.load(tmp_path))
    for suffix in (".npz", ".safetensors"):
        refused(tmp_path / f"arrays{suffix}", lambda suffix=suffix: data.arrays(tmp_path / f"arrays{suffix}"))


# ------------------------------------------------------------------------------------------------------ bounded time and memory
def nested(levels: int) -> list:
    """2^levels numbers to whoever walks through it, and as many lists in memory as it has levels."""
    value = [1]
    for _ in range(levels):
        value = [value, value]
    return value


PICKLES = {
    "nested labels": lambda: pickle.dumps({b"data": np.zeros((20, 3072), np.uint8), b"labels": [nested(60)] * 20}, 2),
    "nested keys": lambda: b"\x80\x02})" + b"".join(bytes([113, i, 104, i, 134]) for i in range(60)) + b"Ns.",
    "deep": lambda: b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
    "huge memo index": lambda: b"\x80\x02]r\xff\xff\xff\x7f.",
    "huge string announced": lambda: b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "bytearray announced": lambda: b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",
    "many opcodes": lambda: b"\x80\x02](" + b"N" * 30_000_000 + b"e.",
    "one text encoded often": lambda: b"c_codecs\nencode\nq\x00X" + (10**6).to_bytes(4, "little") + b"x" * 10**6
    + b"q\x01X\x06\0\0\0latin1q\x02]" + b"h\x00h\x01h\x02\x86Ra" * 3000 + b".",
    "no end": lambda: b"\x80\x02N",
    "empty": lambda: b"",
}  # fmt: skip


def write_pickles(folder: Path) -> list[str]:
    for name, make in PICKLES.items():
        (folder / name).mkdir()
        write_cifar(folder / name, cifar_batches(), "2")
        (folder / name / "data_batch_1").write_bytes(make())
    return list(PICKLES)


def test_pickles_take_bounded_time_and_memory(tmp_path):
    """Each within 20 seconds and 600 MiB more than the process has, its file named."""
    names = write_pickles(tmp_path)
    code = (
        "import resource, sys, time\nfrom rse_fast import data\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)\n"
        "for name in sys.argv[2:]:\n"
        "    begin = time.monotonic()\n"
        "    try:\n        data.cifar10(sys.argv[1] + '/' + name)\n        print('read', name)\n"
        "    except ValueError as error:\n"
        "        assert 'data_batch_1' in str(error) and len(str(error)) < 1000 and 'MemoryError' not in str(error), str(error)[:1000]\n"
        "    assert time.monotonic() - begin < 20, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path, *names], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def some_arrays() -> dict[str, np.ndarray]:
    images, labels = np.zeros((30, 1, 5, 4), np.uint8), np.arange(30) % 3
    return {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}


def header(shape, dtype="|u1") -> bytes:
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_arrays_are_no_larger_than_they_say_and_than_memory(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, **some_arrays())
    whole = path.read_bytes()

    def rewritten(name, content):
        np.savez(path, **{key: value for key, value in some_arrays().items() if key != name})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{name}.npy", content)

    rewritten("train_images", header((10**9, 1, 1000, 1000)) + b"x")  # announced, and not there
    with pytest.raises(ValueError, match="bomb.npz.*train_images should have 10{12}"):
        data.load(path)
    rewritten("train_images", header((1, 1, 2, 2)) + bytes(2**22))  # there, and not announced
    with pytest.raises(ValueError, match="bomb.npz.*train_images should have"):
        data.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("train_images.npy", header((1, 1, 2, 2)) + bytes(4))
    with pytest.raises(ValueError, match="bomb.npz.*compressed"):
        data.load(path)

    path.write_bytes(whole)
    assert len(data.load(path).test) == 30
    save_file({name: torch.from_numpy(value).clone() for name, value in some_arrays().items()}, tmp_path / "bomb.safetensors")
    monkeypatch.setattr("rse_fast.data.releases.memory", lambda: 2000.0)
    for name in ("bomb.npz", "bomb.safetensors"):
        with pytest.raises(ValueError, match="more than half of this machine"):
            data.load(tmp_path / name)


def test_sparse_files_are_not_read(tmp_path, run, own_path):
    write_cifar(tmp_path, cifar_batches(), "binary")
    os.truncate(tmp_path / "data_batch_2.bin", 2**40)
    with pytest.raises(ValueError, match="data_batch_2.bin.* has 1099511627776 bytes, more than"):
        data.load(tmp_path)
    for name in ("config.json", "data.json"):
        kept = (run / name).read_bytes()
        os.truncate(run / name, 2**40)
        with pytest.raises(ValueError, match=f"{name}.*more than"):
            load_model(run, trust=True)
        (run / name).write_bytes(kept)
    os.truncate(run / "best.safetensors", 2**40)
    with pytest.raises(CheckpointError, match="best.safetensors.*more than the weights"):
        load_model(run, trust=True)


# ---------------------------------------------------------------------------------------------------------------- what a disk changed
def test_damaged_best_weights_are_refused(run, rng):
    path = run / "best.safetensors"
    whole = path.read_bytes()
    good = load_model(run, trust=True).state_dict()
    refused = 0
    for _ in range(150):
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            assert same(load_model(run, trust=True).state_dict(), good)
        except CheckpointError as error:
            assert "best.safetensors" in str(error) or "do not fit" in str(error)
            refused += "SHA-256" in str(error)
    assert refused > 20
    path.write_bytes(whole[:-4] + bytes(4))
    drop_end(run)
    with pytest.raises(CheckpointError, match="best.safetensors.*SHA-256"):  # nor are they told for the best of the run
        train(Config.load(run / "config.json"), run, resume=True)


def drop_end(run: Path) -> None:
    kept = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(kept[:-1]))


def test_weights_without_a_digest_are_refused(run):
    path = run / "best.safetensors"
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    tensors, sha256 = load_file(path), facts.pop("sha256")
    for changed in (facts, facts | {"sha257": sha256}, facts | {"sha256": ""}):
        save_file(tensors, path, changed)
        with pytest.raises(CheckpointError, match="best.safetensors.*SHA-256 differs, or is missing"):
            load_model(run, trust=True)


PREDICTED = [
    {"index": i, "target": i, "label": 3, "probability": 0.25, "entropy": None, "mutual_information": 0.0, "draws_used": 4}
    for i in range(3)
]
EVALUATED = [
    {"case": "pgd", "index": i, "target": 1, "answers": [1, 2], "l2": 0.5, "linf": 0.1, "verdict": True, "queries": 2.0, "seconds": 0.1,
     "seeds": [5, 2**63], "by_draws": {"2": 1}, "example": "AAAA"} for i in range(2)
]  # fmt: skip
CERTIFIED = [certify_cli.Row(i, 1, 1, 0.25 * i, 1, 0.75, 90, 100, 0.5) for i in range(3)]


def certified_text() -> bytes:
    texts = ["\t".join(map(str, dataclasses.astuple(row))).encode() for row in CERTIFIED]
    return "\t".join([*certify_cli.COLUMNS, "crc32\n"]).encode() + b"".join(t + f"\t{lines.checksum(t)}\n".encode() for t in texts)


FILES = {
    "predictions-0.jsonl": (lambda folder: list(predict_cli.read(folder).values()), b"".join(map(lines.json_line, PREDICTED)), PREDICTED),
    "rows-0.jsonl": (lambda folder: list(rows.read(folder).values()), b"".join(map(lines.json_line, EVALUATED)), EVALUATED),
    "certified.tsv": (lambda folder: certify_cli.read_table(folder / "certified.tsv"), certified_text(), CERTIFIED),
}


@pytest.mark.parametrize("name", FILES)
def test_every_bit_that_flips_in_a_file_of_rows_is_noticed(name, tmp_path):
    """But for the last newline, without which its line was cut off, and is made again."""
    reader, content, expected = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert reader(tmp_path) == expected
    for place in range(len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=name):
            reader(tmp_path)
    for bit in range(8):
        path.write_bytes(content[:-1] + bytes([10 ^ (1 << bit)]))
        assert reader(tmp_path) == expected[:-1]


@pytest.mark.parametrize("name", FILES)
def test_rows_without_a_checksum_are_refused(name, tmp_path):
    reader, content, expected = FILES[name]
    whole = content.splitlines()
    bare = [line.rpartition(b"\t" if name == "certified.tsv" else b', "crc32"')[0] for line in whole]
    if name != "certified.tsv":
        bare = [line + b"}" for line in bare]
        assert [json.loads(line) for line in bare] == expected
    for lined in (bare, [*whole, bare[-1]]):
        (tmp_path / name).write_bytes(b"\n".join([*lined, b""]))
        with pytest.raises(ValueError, match=name):
            reader(tmp_path)


# ------------------------------------------------------------------------------------------------------- well formed, and wrong
BRACKETS = "[" * 100_000
CONTENTS = {
    "brackets": BRACKETS, "objects": '{"a":' * 100_000, "not UTF-8": b'{"a": "\xff\xfe"}', "a list": "[]", "null": "null", "empty": "",
    "a number": "7", "no fields": "{}",
}  # fmt: skip


def put(path: Path, content) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.usefixtures("own_path")
@pytest.mark.parametrize("content", CONTENTS)
def test_json_that_says_something_else_is_named(run, tmp_path, content):
    newest = checkpoint.find(run / "checkpoints")[0]
    settings = Config.load(run / "config.json")
    for path, call in (
        (run / "config.json", lambda: load_model(run)),
        (run / "data.json", lambda: load_model(run, trust=True)),
        (newest / "manifest.json", lambda: load_model(run, "last", trust=True)),
        (run / "log.jsonl", lambda: train(settings, run, resume=True)),
        (tmp_path / "predict.json", lambda: run_inputs.open_folder(tmp_path, "predict.json", {"draws": 3}, None)),
        (tmp_path / "rows-0.jsonl", lambda: rows.read(tmp_path)),
        (tmp_path / "predictions-0.jsonl", lambda: predict_cli.read(tmp_path)),
        (tmp_path / "certified.tsv", lambda: certify_cli.read_table(tmp_path / "certified.tsv")),
    ):
        kept = path.read_bytes() if path.exists() else None
        text = CONTENTS[content]
        lined = path.suffix in (".jsonl", ".tsv")
        put(path, text + (b"\n" if isinstance(text, bytes) else "\n") if lined else text)
        if not (lined and content == "empty") and not (path.name == "config.json" and content == "no fields"):
            with pytest.raises(ValueError, match=path.name):
                call()
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)


@pytest.mark.usefixtures("own_path")
@pytest.mark.parametrize(
    "fields",
    [
        {"shape": []}, {"shape": None}, {"shape": ""}, {"shape": {}}, {"shape": [[3], 8, 8]}, {"shape": [-3, 8, 8]},
        {"shape": [True, 8, 8]}, {"shape": [10**12, 8, 8]}, {"classes": []}, {"classes": None}, {"classes": 10}, {"classes": [1, 2, 3]},
        {"classes": "abc"},
    ],
)  # fmt: skip
def test_facts_that_fit_no_data_set_are_named(run, fields):
    set_fields(run / "data.json", **fields)
    with pytest.raises(ValueError, match="^run: cannot read '.*data.json'"):
        load_model(run, trust=True)


@pytest.mark.parametrize("fields", [{"lr": 10**400}, {"resize": [1, 2, 3]}, {"model": None}, {"data": ["x"]}, {"epochs": {}}])
def test_configurations_name_their_file(run, fields):
    set_fields(run / "config.json", **fields)
    with pytest.raises(ValueError, match=f"{next(iter(fields))}.*config.json"):
        Config.load(run / "config.json")


@pytest.mark.parametrize("name", FILES)
def test_rows_without_a_field_or_with_another_kind_are_named(name, tmp_path):
    reader, _, expected = FILES[name]
    if name == "certified.tsv":
        for text in ("0\t1\t1\tinf\t1\t0.7\t9\t9\t0.1", "-1\t1\t1\t0.1\t1\t0.7\t9\t9\t0.1", "0\t1\t1\t0.1\t7\t0.7\t9\t9\t0.1", "0\t1"):
            sealed = f"{text}\t{lines.checksum(text.encode())}\n".encode()
            (tmp_path / name).write_bytes(certified_text().splitlines(keepends=True)[0] + sealed)
            with pytest.raises(ValueError, match=f"line 2 of .*{name}"):
                reader(tmp_path)
        return
    for field in expected[0]:
        if field not in ("by_draws", "example"):
            (tmp_path / name).write_bytes(lines.json_line({key: value for key, value in expected[0].items() if key != field}))
            with pytest.raises(ValueError, match=f"line 1 of .*{name}.*{field} is missing"):
                reader(tmp_path)
        (tmp_path / name).write_bytes(lines.json_line(expected[0] | {field: [None]}))
        with pytest.raises(ValueError, match=f"line 1 of .*{name}.*{field} is"):
            reader(tmp_path)


@pytest.mark.usefixtures("own_path")
def test_a_checkpoint_that_is_whole_and_of_something_else_is_named(run):
    settings = Config.load(run / "config.json")
    folder = run / "checkpoints"
    parts, state = checkpoint.newest(folder, settings.fingerprint)
    for wrong_parts, wrong_state in (
        (parts, {}), ({}, state), (parts, {"best": None}), (parts, state | {"optimizer": {}}), (parts, state | {"scheduler": 3}),
        ({"average": parts["model"]}, state),
    ):  # fmt: skip
        checkpoint.save(folder, 6, settings.fingerprint, wrong_parts, wrong_state, keep=1)
        drop_end(run) if read(run / "log.jsonl")[-1]["event"] == "end" else None
        with pytest.raises(CheckpointError, match="checkpoints"):
            train(settings, run, resume=True)


def test_names_that_are_not_utf8_are_named(tmp_path):
    for root, make in (("file", lambda p: p / "cat" / "b\udcff.png"), ("class", lambda p: p / "d\udcff" / "0.png")):
        make_folder(tmp_path / root, per_class=3)
        save(make(tmp_path / root), np.zeros((9, 7, 3), np.uint8), format="png")
        with pytest.raises(ValueError, match=r"^path: the name b'.*\\xff.*' in .* is not UTF-8"):
            data.load(tmp_path / root)


# ----------------------------------------------------------------------------------------------------- folders and who writes them
@pytest.mark.usefixtures("own_path")
def test_two_threads_do_not_train_in_one_folder(images, tmp_path, monkeypatch):
    settings, out = config(images, epochs=2), tmp_path / "run"
    inside, go_on, ended = threading.Event(), threading.Event(), []
    advance = Trainer.advance

    def slow(self):
        inside.set()
        assert go_on.wait(60)
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", slow)
    first = threading.Thread(target=lambda: ended.append(train(settings, out)["event"]))
    first.start()
    try:
        assert inside.wait(60)
        # But for the lock: to open and close it here would give it up.
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
        with pytest.raises(ValueError, match="^out: another thread of this process is writing"):
            train(settings, out, resume=True)
        assert {path: path.read_bytes() for path in before} == before
        child = os.fork()  # and the refusal has left the lock on other processes as it was
        if not child:
            try:
                data.claim(out / ".lock")
                os._exit(1)
            except ValueError as error:
                os._exit(0 if "another process" in str(error) else 2)
            finally:
                os._exit(3)
    finally:
        go_on.set()
        first.join(120)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ended == ["end"]
    with data.claim(out / ".lock"):
        pass


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_done(images, tmp_path, capsys, own_path):
    (tmp_path / "occupied").write_text("a file where a folder is needed")
    out = str(tmp_path / "occupied" / "run")
    assert main(["--data", str(images), "--out", out, "--model", "tiny_training:net", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rse-fast train: --out: cannot write in {out!r}") and "name another folder" in said and "saved" not in said
    with pytest.raises(ValueError, match="^out: cannot write in"):
        run_inputs.open_folder(Path(out), "predict.json", {}, None)
    full = OSError(28, "No space left on device")
    assert wrapper.unwritten(full, tmp_path, "*.jsonl").endswith("(No space left on device); name another folder with --out")
    (tmp_path / "rows-0.jsonl").write_text("{}\n")
    assert wrapper.unwritten(full, tmp_path, "*.jsonl").endswith(f"what was saved before is in {tmp_path}")


def test_a_folder_without_permission_is_told(tmp_path, monkeypatch):
    # Permissions do not bind root, who may run these tests.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="^out: cannot write in .*may not be written to; name another folder"):
        data.check_writable(tmp_path / "new")
    assert not (tmp_path / "new").exists()
