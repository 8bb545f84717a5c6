"""Noise on CUDA and ROCm: what runs where, and the launchers of the Triton kernels. Importing this does not import triton."""

import functools
import importlib
import importlib.util
import os

import torch

__all__ = ["DTYPES", "available", "convolves", "launcher", "runs_on"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def available() -> bool:
    """Whether triton can be imported; found without importing it."""
    return importlib.util.find_spec("triton") is not None


def runs_on(x: torch.Tensor) -> bool:
    """Whether the kernels take tensors like ``x``: a CUDA device from sm_80 on, a ROCm device, or any under Triton's interpreter."""
    if x.dtype not in DTYPES:
        return False
    return _runs_on_device(x.device) if x.is_cuda else os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _runs_on_device(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def launcher(name: str):
    """The launcher "add_noise", "sigma_grad" or "noisy_conv", from the module of that name; the first call imports triton."""
    module = {"noisy_conv": "conv"}.get(name, name)
    return getattr(importlib.import_module(f".{module}", __name__), name)


def convolves(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether a noisy convolution makes its noise in its own kernel: by the table of choices, for channels-last images."""
    if x.dim() != 4 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    choose = importlib.import_module(".conv", __name__).choose
    return choose(_device_name(x.device), x.dtype, weight.shape, groups) == "in_kernel"


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
