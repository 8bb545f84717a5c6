"""For the files here, each kind run in a process of its own: kernels are either interpreted or compiled, never both.

`tests/kernels/test_triton.py` runs ``kernel_*.py`` in the interpreter and ``compile_*.py`` ahead of time, `tests/kernels/test_gpu.py` runs
``kernel_*.py`` and ``device_*.py`` on the device, which is then torch's default device.

In an interpreting process (TRITON_INTERPRET=1) faults of the interpreter are repaired: float32 becomes bfloat16 and fp8 by rounding to
nearest even, carries included; `tl.dot` takes bfloat16 operands as numbers, not as their bits; the type of AMD's fp8 is known; bounds of
loops may be arrays of one value (triton before 3.7 with numpy from 2.4 on). Every launch is recorded: the kernel, its operand's dtype,
its options.
"""

import inspect
import os
import pkgutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
POINTERS |= {torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e4m3fnuz: "*fp8e4b8"}
launched = set()


def forms(name: str, arguments: dict) -> set:
    """What a launch, or a case of `aot`, shows of a kernel: "NAME", "NAME dtype", "NAME OPTION on or off"; tensors by their pointers."""
    operand = next((arguments[key] for key in ("x_ptr", "g_ptr") if key in arguments), "")
    operand = POINTERS[operand.dtype] if isinstance(operand, torch.Tensor) else operand
    options = {f"{name} {key} {'on' if value else 'off'}" for key, value in arguments.items() if isinstance(value, bool) and key != "FAST"}
    return {name, f"{name} {operand}".strip(), *options}


def kernels() -> dict:
    """Every function of the package that is launched, by name: Triton's functions called ``*_kernel``."""
    from rse_fast.kernels import triton as package

    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in ("aot", "budgets"):
            members = inspect.getmembers(import_module(f"{package.__name__}.{module.name}"))
            found.update({name: value for name, value in members if name.endswith("_kernel")})
    return found


def pytest_configure(config):
    if INTERPRETED:
        _repair_interpreter()
        _record_launches()


def pytest_sessionfinish(session):
    if record := os.environ.get("RSE_FAST_TEST_LAUNCHED"):
        Path(record).write_text("\n".join(sorted(launched)))


def _record_launches():
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def recorded(self, *args, **kwargs):
        launched.update(forms(self.fn.__name__, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}))
        return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = recorded


def _repair_interpreter():
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot, patch_lang = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang

    def rounding_convert(data, source, target, mode):
        narrow = {
            tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
            tl.float8e4nv: (torch.float8_e4m3fn, torch.int8, np.uint8),
            tl.float8e4b8: (torch.float8_e4m3fnuz, torch.int8, np.uint8),
        }
        if source == tl.float32 and target in narrow:
            dtype, bits, unsigned = narrow[target]
            return torch.from_numpy(np.ascontiguousarray(data)).to(dtype).view(bits).numpy().view(unsigned)
        return convert(data, source, target, mode)

    def dot_of_numbers(self, a, b, d, *options):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return dot(self, a, b, d, *options)

    def patch_lang_further(function):
        scope = patch_lang(function)
        tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())
        to_ir = tl.core.dtype.to_ir
        tl.core.dtype.to_ir = lambda self, builder: builder.get_fp8e4b8_ty() if self == tl.float8e4b8 else to_ir(self, builder)
        return scope

    interpreter._convert_float = rounding_convert
    interpreter._patch_lang = patch_lang_further
    interpreter.InterpreterBuilder.create_dot = dot_of_numbers


@pytest.fixture(autouse=True)
def default_device(request):
    with torch.device("cpu" if INTERPRETED or request.path.name.startswith("compile_") else "cuda"):
        yield


@pytest.fixture
def seed(rng):
    return torch.tensor(int(rng.integers(-(2**63), 2**63)))
