"""What rse-fast promises to reach: every target, where it is measured, and what measuring it needs.

The CPU's targets were set for two cores with AVX-512 BF16 instructions, the GPU's for an H200; they are judged on whatever is measured.
"""

import fnmatch
from dataclasses import dataclass

from .measure import target


@dataclass(frozen=True)
class Promise:
    """One target: the first measured target of ``suite`` whose case and wording match decides."""

    hardware: str  # "CPU" or "GPU"
    task: str
    suite: str
    case: str  # pattern
    what: str  # pattern
    wanted: float
    unit: str
    at_most: bool = False


PROMISES = (
    Promise("CPU", "add_noise float32, 4M elements", "noise", "float32 contiguous 4M", "rate, fresh memory*", 2, "G/s"),
    Promise("CPU", "add_noise float32, mapped memory", "noise", "float32 contiguous 4M", "rate, memory already mapped", 2, "G/s"),
    Promise("CPU", "add_noise float32, against eager", "noise", "float32 contiguous 4M", "against eager", 6, "x"),
    Promise("CPU", "add_noise float32, against torch.compile", "noise", "float32 contiguous 4M", "against torch.compile", 30, "x"),
    Promise("CPU", "add_noise bfloat16, 4M elements", "noise", "bfloat16 channels_last 4M", "rate, fresh memory*", 2, "G/s"),
    Promise("CPU", "add_noise bfloat16, mapped memory", "noise", "bfloat16 channels_last 4M", "rate, memory already mapped", 2, "G/s"),
    Promise("CPU", "VGG16 32x32, B=16, n=10", "ensemble", "VGG16 * B=16 n=10", "rate", 110, "images/s"),
    Promise("CPU", "VGG16 B=16, n=10, cost over plain", "ensemble", "VGG16 * B=16 n=10", "cost over the plain*", 1.05, "x", True),
    Promise("CPU", "VGG16 B=16, n=10, against the best peer", "ensemble", "VGG16 * B=16 n=10", "against the best peer", 2.6, "x"),
    Promise("CPU", "VGG16 trained, exact early exit", "early_exit", "VGG16*B=16 n=10", "rate with exact early exit*", 160, "images/s"),
    Promise("CPU", "exact early exit against all draws", "early_exit", "VGG16*B=16 n=10", "exact early exit against all draws", 1.4, "x"),
    Promise("CPU", "n=100, early_exit=0.999 against all draws", "early_exit", "VGG16*n=100", "*against all draws", 5, "x"),
    Promise("CPU", "n=100, early_exit=0.999, labels equal", "early_exit", "VGG16*n=100, labels*", "labels equal*", 0.999, ""),
    Promise("CPU", "VGG16 32x32, B=1, n=10", "ensemble", "VGG16 * B=1 n=10", "rate", 90, "images/s"),
    Promise("CPU", "VGG16 B=1, n=10, against the eager loop", "ensemble", "VGG16 * B=1 n=10", "against the eager loop", 6, "x"),
    Promise("CPU", "int8, against our bfloat16 engine", "int8", "*", "*bfloat16*", 1.6, "x"),
    Promise("CPU", "int8, labels equal", "int8", "*", "*labels*", 0.995, ""),
    Promise("CPU", "training step, activation bytes saved over the plain network's", "train", "*", "*saved*", 1.01, "x", True),
    Promise("GPU", "add_noise bfloat16, 1 GiB, of the copy's bandwidth", "noise", "bfloat16 * 512M", "of the copy*", 0.9, ""),
    Promise("GPU", "ensemble of 10, large batch, cost over plain", "ensemble", "*n=10", "cost over the plain*", 1.03, "x", True),
    Promise("GPU", "ensemble of 10, large batch, over torch.compile", "ensemble", "*n=10", "against torch.compile", 1.3, "x"),
    Promise("GPU", "ensemble of 10, large batch, against eager loop", "ensemble", "*n=10", "against the eager loop", 3, "x"),
    Promise("GPU", "ensemble of 10, B=1..8, against eager loop", "ensemble", "* B=[18] n=10", "against the eager loop", 10, "x"),
    Promise("GPU", "training step time over the plain network's", "train", "*", "*time*", 1.05, "x", True),
    Promise("GPU", "training peak memory over the plain network's", "train", "*", "*peak*", 1.01, "x", True),
)


def judge(found: list[dict]) -> list[tuple[Promise, dict]]:
    """Every promise with the measured target that decides it, or one without a value that says what measuring it needs."""
    return [(promise, _decide(promise, found)) for promise in PROMISES]


def _decide(promise: Promise, found: list[dict]) -> dict:
    for t in found:
        here = "CPU" if t["device"] == "cpu" else "GPU"
        if here != promise.hardware or t["suite"] != promise.suite or t["target"] != promise.wanted:
            continue
        if fnmatch.fnmatch(t["case"], promise.case) and fnmatch.fnmatch(t["what"], promise.what):
            return t
    needs = "a CUDA GPU" if promise.hardware == "GPU" else f"rse-fast bench --suite {promise.suite}"
    return target(promise.suite, promise.case, promise.what, None, promise.wanted, promise.unit, at_most=promise.at_most, needs=needs)
