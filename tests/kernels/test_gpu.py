"""The Triton kernels on a GPU: everything the interpreter shows, and what only a device can show. Skipped where there is none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent / "triton"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a GPU and triton"),
]


@pytest.mark.parametrize("file", sorted(path.name for kind in ("kernel", "device") for path in HERE.glob(f"{kind}_*.py")))
def test_on_the_device(file):
    """In a process of its own; beside others where pytest-xdist is installed, for most of the time goes into compiling."""
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *workers, str(HERE / file)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
