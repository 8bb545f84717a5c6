"""Noise on CUDA and ROCm: what runs where, and the launchers of the Triton kernels. Importing this does not import triton."""

import functools
import importlib
import importlib.util
import os
import shutil

import torch

from . import choices

__all__ = ["DTYPES", "LOW_PRECISION", "convolves", "launcher", "noise_choice", "problem", "runs_on"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)  # operands of convolutions only

_MODULES = {"noisy_conv": "conv", "conv_activate_noise": "conv"}


@functools.cache
def problem() -> str | None:
    """Why no kernel can run here, whatever the device, or None; found without importing triton."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton finds no C compiler, which it builds its launchers with (install gcc, or name one by CC)"
    return None


def runs_on(x: torch.Tensor) -> bool:
    """Whether the kernels take tensors like ``x``: a CUDA device from sm_80 on, a ROCm device, or any under Triton's interpreter.

    fp8 needs sm_89, and is the flavour that the device multiplies: e4m3fnuz on AMD's gfx942, e4m3fn elsewhere.
    """
    if not x.is_cuda:
        return x.dtype in (*DTYPES, *LOW_PRECISION) and os.environ.get("TRITON_INTERPRET") == "1"
    return x.dtype in _device_dtypes(x.device)


@functools.cache
def _device_dtypes(device: torch.device) -> tuple:
    if torch.version.hip is not None:
        fnuz = torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")
        return (*DTYPES, torch.int8, torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn)
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return ()
    return (*DTYPES, torch.int8, torch.float8_e4m3fn) if capability >= (8, 9) else (*DTYPES, torch.int8)


@functools.cache
def launcher(name: str):
    """The launcher "add_noise", "sigma_grad", "noisy_conv" or "conv_activate_noise"; the first call imports triton."""
    return getattr(importlib.import_module(f".{_MODULES.get(name, name)}", __name__), name)


def convolves(question: str, x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether our own kernel makes a convolution and the noise at its "input" or "output", by the table, for images [N, C, H, W]."""
    return x.dim() == 4 and runs_on(x) and noise_choice(question, x, weight, groups) != "separate"


def noise_choice(question: str, x: torch.Tensor, weight: torch.Tensor, groups: int) -> str:
    """`choices.look_up` for tensors like ``x``."""
    return choices.look_up(_device_name(x.device), x.dtype, question, weight.shape, groups)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
