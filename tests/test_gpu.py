"""The Triton kernels on a GPU: everything the interpreter shows, and what only a device can show. Skipped where there is none."""

import importlib.util
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent / "triton"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a GPU and triton"),
]


@pytest.mark.parametrize("file", sorted(path.name for kind in ("kernel", "device") for path in HERE.glob(f"{kind}_*.py")))
def test_on_the_device(file, run_python):
    done = run_python("-m", "pytest", "-q", HERE / file)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
