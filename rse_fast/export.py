"""Writes a whole ensemble to one file that runs without this package: torch.export, AOTInductor, or ONNX.

The program takes images and a seed. Its noise is plain integer arithmetic on tensors, the torch form of `rse_fast.reference`; nothing of
this package is left in it.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import nn

from rse_fast import noise, reference
from rse_fast.address import NoiseAddress
from rse_fast.context import NoiseContext
from rse_fast.ensemble import fuse, plan
from rse_fast.ensemble.engine import DTYPES, Ensemble
from rse_fast.ensemble.prediction import DrawStatistics
from rse_fast.ensemble.prepare import Prepared
from rse_fast.ensemble.runner import Runner, mismatch, probe_images
from rse_fast.ensemble.softmax import log_softmax
from rse_fast.ensemble.unfit import unfit
from rse_fast.nn import noise_layers, number_layers

Writer: TypeAlias = Callable[[BinaryIO], object]  # of a file that is open

INT64, UINT64 = 7, 13  # of ONNX
RESULTS = ("probs", "labels", "votes", "entropy", "mutual_information")


def export(ensemble: Ensemble, example: torch.Tensor, path: str | os.PathLike[str], *, compiled: bool = False) -> None:
    """Writes ``ensemble`` as a program that runs in a process without rse-fast.

    The program takes ``x``, float32 [B, ...] for any B >= 1, and ``seed``, a 0-dim int64 tensor. It returns what `Ensemble.predict` gives
    for this seed, up to rounding: a dict of ``probs``, ``labels``, ``votes``, ``entropy`` and ``mutual_information``, in this order, as
    `Prediction` describes them. All draws of a batch run at once, so memory grows with B x draws.

    The seed is the defence: draw a fresh one for every call from the operating system, ``int.from_bytes(os.urandom(8), "little",
    signed=True)``, and do not let clients choose it.

    Args:
        ensemble: its draws and temperature, and its model with the weights and noise of now. Its dtype is the program's, and "auto"
            means float32, since another machine may run it. Its seed, max_rows, backend, algorithm and cuda_graphs are for calls here,
            and are not used.
        example: images [B, ...], B >= 1, of the shape to come; the values do not matter.
        path: what is written depends on its end. ".pt2": a program for `torch.export.load`. ".onnx": a model for ONNX Runtime (float32;
            ``pip install 'rse-fast[export]'``). An existing file is replaced once the new one is complete.
        compiled: with ".pt2", an AOTInductor package of machine code for processors like this one, for
            `torch._inductor.aoti_load_package`. It needs a C++ compiler here.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the ensemble has early exit or dtype "int8"; its model cannot be exported, for a reason that is given, or does not
            take images like the example; the path has another end or a folder that does not exist; a package is missing.

    Examples:
        >>> rse_fast.export(ensemble, images[:1], "model.pt2")
        >>> program = torch.export.load("model.pt2").module()  # in any process
        >>> program(images, torch.tensor(7))["labels"]
    """
    x, path = _check(ensemble, example, path, compiled), Path(path)
    if path.suffix == ".onnx":
        write = _onnx(_program(ensemble, x))
    elif compiled:
        write = _package(_program(ensemble, x))
    else:
        program = _program(ensemble, x)

        def write(file: BinaryIO) -> None:
            torch.export.save(program, file)

    from rse_fast.data.files import write_atomically

    write_atomically(path, write)


def _check(ensemble: Ensemble, example: torch.Tensor, path: str | os.PathLike[str], compiled: bool) -> torch.Tensor:
    """The example, on the ensemble's device."""
    if not isinstance(ensemble, Ensemble):
        raise TypeError(f"ensemble must be an rse_fast.Ensemble, got {type(ensemble).__name__}")
    if ensemble.early_exit is not None:
        raise ValueError(f"ensemble must take all its draws to be exported: early_exit must be None, got {ensemble.early_exit!r}")
    if ensemble.dtype == "int8":
        raise ValueError("ensemble must have dtype 'float32', 'bfloat16' or 'float16' to be exported, got 'int8'")
    x = ensemble.images(example, "example")
    if not x.shape[0]:
        raise ValueError(f"example must hold at least one image, got shape {tuple(x.shape)}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"path must end in .pt2 (torch.export) or .onnx, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"path must name a file in a folder that exists, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"path must name a file, got the folder {str(path)!r}")
    if path.suffix == ".onnx":
        if compiled:
            raise ValueError("compiled is for paths that end in .pt2, got True with .onnx")
        if _dtype(ensemble) != torch.float32:
            raise ValueError(f"ensemble must have dtype 'float32' or 'auto' for ONNX, got {ensemble.dtype!r}")
        if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
            raise ValueError(f"path ends in .onnx, which needs the package {missing[0]}: pip install 'rse-fast[export]'")
    return x


def _dtype(ensemble: Ensemble) -> torch.dtype:
    return DTYPES.get(ensemble.dtype, torch.float32)


class _Ensemble(nn.Module):
    """The program before it is traced."""

    def __init__(self, prepared: Prepared, draws: int, temperature: float):
        super().__init__()
        self.model, self._prepared = prepared.runner.model, prepared
        self._draws, self._temperature = draws, temperature

    def forward(self, x: torch.Tensor, seed: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = Ensemble._logits(self._prepared, x, NoiseContext(seed, x.shape[0], self._draws))
        statistics = DrawStatistics.empty(torch.arange(x.shape[0], device=x.device), logits.shape[2:])
        statistics.add(log_softmax(logits))
        summary = statistics.summary(self._temperature)
        return {name: summary[name] for name in RESULTS}


@torch.no_grad()
def _program(ensemble: Ensemble, x: torch.Tensor) -> torch.export.ExportedProgram:
    """The ensemble as a program of aten operations."""
    prepared = _prepare(ensemble, x)
    example = probe_images(x, 3).to(x.dtype), torch.zeros((), dtype=torch.int64, device=x.device)
    shapes: tuple[dict[int, Any], dict[int, Any]] = {0: torch.export.Dim.DYNAMIC}, {}
    try:
        traced = _Ensemble(prepared, ensemble.draws, ensemble.temperature)
        program = torch.export.export(traced, example, dynamic_shapes=shapes, strict=False)
        program = program.run_decompositions(PLAIN)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "no message")
        raise ValueError(f"model cannot be exported: torch.export gives up ({type(error).__name__}: {first})") from error
    return program


def _prepare(ensemble: Ensemble, x: torch.Tensor) -> Prepared:
    """A copy of the model, BatchNorm folded where that is the same function, that packs its batch where it has to."""
    number_layers(ensemble.model)
    dtype = _dtype(ensemble)
    noisy = any(layer.noise_enabled for layer in noise_layers(ensemble.model).values())

    def run(model: nn.Module) -> Runner:
        runner = Runner(model, dtype, dtype, noisy, x, logits=ensemble.logits)
        if runner.called is None and (refused := unfit(ensemble.model, x.shape, "example")):
            raise ValueError(refused)
        return runner

    model, problem = fuse.snapshot(ensemble.model, dtype, shape=x.shape[1:], merge=False)
    runner = run(model)
    if problem is not None or mismatch(runner, fuse.copy(ensemble.model, torch.float32), x, False) is not None:
        runner = run(fuse.copy(ensemble.model, dtype))
    if runner.random:
        raise ValueError("model cannot be exported: its forward draws random numbers of its own, which no seed addresses")
    return Prepared(runner, runner, plan.Planner(x.device))


def _add_noise(x: torch.Tensor, sigma: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """``x + sigma * eps`` in float32, rounded once to the dtype of x [images or draws * images, C, *spatial]."""
    at, spatial = NoiseAddress(*arguments[: len(NoiseAddress._fields)]), x.shape[2:]
    images = at.image_offset, at.draw_offset, at.sample_ids
    eps = reference.normal(at.seed, at.stream, at.images, at.draws, x.shape[1], spatial.numel(), *images, real=torch.float32)
    eps = eps.unflatten(1, spatial) if spatial else eps.squeeze(1)
    eps = eps.movedim(-1, 1).unflatten(0, (at.draws, at.images))
    packed = x.float().unflatten(0, (at.draws, at.images)) if x.shape[0] == at.rows else x.float().unsqueeze(0)
    sigma = sigma.reshape(-1, *[1] * len(spatial)) if sigma.dim() else sigma
    return (packed + sigma * eps).flatten(0, 1).to(x.dtype)


def _noisy_conv(x: Any, weight: Any, bias: Any, sigma: Any, *arguments: Any) -> torch.Tensor:
    *at, stride, padding, dilation, groups, _ = arguments
    return noise.convolution(_add_noise(x, sigma, *at), weight, bias, stride, padding, dilation, groups)


def _noisy_linear(x: Any, weight: Any, bias: Any, sigma: Any, *arguments: Any) -> torch.Tensor:
    return nn.functional.linear(_add_noise(x.movedim(-1, 1), sigma, *arguments).movedim(1, -1), weight, bias)


# The ops that the layers of an unfused model call, by operations of torch alone.
PLAIN = {
    torch.ops.rse_fast.add_noise.default: _add_noise,
    torch.ops.rse_fast.noisy_conv.default: _noisy_conv,
    torch.ops.rse_fast.noisy_linear.default: _noisy_linear,
}


def _package(program: torch.export.ExportedProgram) -> Writer:
    """Writes an AOTInductor package."""
    from torch._inductor import aoti_compile_and_package

    with tempfile.TemporaryDirectory() as folder:
        name = aoti_compile_and_package(program, package_path=os.path.join(folder, "program.pt2"))
        data = Path(name).read_bytes()
    return lambda file: file.write(data)


def _onnx(program: torch.export.ExportedProgram) -> Writer:
    """Writes an ONNX model."""
    import onnxscript

    op: Any = onnxscript.opset20

    def shift(value: Any, count: Any) -> Any:
        """The logical shift, one operation of ONNX, where torch translates the arithmetic one into six. For 32-bit words they agree."""
        unsigned = op.BitShift(op.Cast(value, to=UINT64), op.Cast(count, to=UINT64), direction="RIGHT")
        return op.Cast(unsigned, to=INT64)

    found: Any = torch.onnx.export(
        program, input_names=["x", "seed"], output_names=list(RESULTS), dynamo=True, verbose=False, external_data=False,
        opset_version=20, custom_translation_table={torch.ops.aten.__rshift__.Scalar: shift},
    )  # fmt: skip
    data = found.model_proto.SerializeToString()
    return lambda file: file.write(data)
