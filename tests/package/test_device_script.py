"""bench/device.sh, whose first minute on a device must not be lost to a typo: its dry run here, and that a typo fails it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("tqdm")
pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).parents[2]
GPU = "gpu"  # apart: the script looks for files with the mark
SUITES = ("host", "noise", "train", "ensemble", "attack", "certify")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (ROOT / "bench" / "device.sh").exists(), reason="a script of a Linux checkout"
)


def device_sh(out, *arguments, root=ROOT, **env):
    env = {name: value for name, value in os.environ.items() if name != "DATA"} | {"PYTHON": sys.executable, "OUT": str(out)} | env
    return subprocess.run(["bash", root / "bench" / "device.sh", *arguments], env=env, capture_output=True, text=True, timeout=600)


def test_every_part_runs_dry(tmp_path):
    done = device_sh(tmp_path, "--dry")
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (tmp_path / "failed.txt").read_text() == ""
    listed = {line.split(":")[0] for line in logs["suites"].splitlines()}
    assert listed == set(SUITES)
    assert "VGG16 B=512" in logs["suites"]  # the cases of a GPU, not of this machine
    marked = {path.name for path in ROOT.glob("tests/*/test_*.py") if f"mark.{GPU}" in path.read_text()}
    assert all(name in logs["tests"] for name in marked)
    assert "convolution pointwise" in logs["kernels"] and "kernel_conv.py" in logs["memcheck"]
    assert '"commit"' in logs["environment"] and {"profile", "ncu_flat", "ncu_planar"} <= logs.keys()
    assert '"event": "end"' in (tmp_path / "rse" / "log.jsonl").read_text()
    assert not [*tmp_path.glob("suites.*s*"), *tmp_path.glob("kernels.[jm]*")]  # nothing was measured


@pytest.mark.parametrize(
    "part, right, wrong",
    [("noise", "--seconds", "--secnds"), ("tests", "-m gpu", "-m gpuu")],
)
def test_a_typo_fails_it(tmp_path, part, right, wrong):
    copy = tmp_path / "copy"
    (copy / "bench").mkdir(parents=True)
    for path in (*ROOT.glob("bench/*.py"), *(ROOT / name for name in ("rse_fast", "kernels", "tests", "pyproject.toml"))):
        (copy / path.relative_to(ROOT)).symlink_to(path)
    text = (ROOT / "bench" / "device.sh").read_text()
    assert right in text
    (copy / "bench" / "device.sh").write_text(text.replace(right, wrong))
    done = device_sh(tmp_path / "out", "--dry", part, root=copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed:" in done.stderr


def test_arguments_that_do_not_fit_are_named(tmp_path):
    for arguments, named in (((), "name parts"), (("--dry", "kernel"), "no part kernel; there are: tests kernels"), (("paper",), "DATA")):
        done = device_sh(tmp_path / "out", *arguments)
        assert done.returncode == 2 and named in done.stderr
    assert not (tmp_path / "out").exists()
