"""What rse-fast aims to reach: every target, where it is measured, and what measuring it needs.

The CPU's targets were set for two cores with AVX-512 BF16 instructions, the GPU's for an H200; they are judged on whatever is measured.
"""

import fnmatch
from dataclasses import dataclass

from .measure import target


@dataclass(frozen=True)
class Target:
    """One target: the first measured target of ``suite`` whose case and wording match decides."""

    hardware: str  # "CPU" or "GPU"
    task: str
    suite: str
    case: str  # pattern
    what: str  # pattern
    wanted: float
    unit: str
    at_most: bool = False


TARGETS = (
    Target("CPU", "add_noise float32, 4M elements", "noise", "float32 contiguous 4M", "rate, fresh memory*", 2, "G/s"),
    Target("CPU", "add_noise float32, mapped memory", "noise", "float32 contiguous 4M", "rate, memory already mapped", 2, "G/s"),
    Target("CPU", "add_noise float32, against eager", "noise", "float32 contiguous 4M", "against eager", 6, "x"),
    Target("CPU", "add_noise float32, against torch.compile", "noise", "float32 contiguous 4M", "against torch.compile", 30, "x"),
    Target("CPU", "add_noise bfloat16, 4M elements", "noise", "bfloat16 channels_last 4M", "rate, fresh memory*", 2, "G/s"),
    Target("CPU", "add_noise bfloat16, mapped memory", "noise", "bfloat16 channels_last 4M", "rate, memory already mapped", 2, "G/s"),
    Target("CPU", "VGG16 32x32, B=16, n=10", "ensemble", "VGG16 * B=16 n=10", "rate", 110, "images/s"),
    Target("CPU", "VGG16 B=16, n=10, cost over plain", "ensemble", "VGG16 * B=16 n=10", "cost over the plain*", 1.05, "x", True),
    Target("CPU", "VGG16 B=16, n=10, against the best peer", "ensemble", "VGG16 * B=16 n=10", "against the best peer", 2.6, "x"),
    Target("CPU", "VGG16 trained, exact early exit", "early_exit", "VGG16*B=16 n=10", "rate with exact early exit*", 160, "images/s"),
    Target("CPU", "exact early exit against all draws", "early_exit", "VGG16*B=16 n=10", "exact early exit against all draws", 1.4, "x"),
    Target("CPU", "n=100, early_exit=0.999 against all draws", "early_exit", "VGG16*n=100", "*against all draws", 5, "x"),
    Target("CPU", "n=100, early_exit=0.999, labels equal", "early_exit", "VGG16*n=100, labels*", "labels equal*", 0.999, ""),
    Target("CPU", "VGG16 32x32, B=1, n=10", "ensemble", "VGG16 * B=1 n=10", "rate", 90, "images/s"),
    Target("CPU", "VGG16 B=1, n=10, against the eager loop", "ensemble", "VGG16 * B=1 n=10", "against the eager loop", 6, "x"),
    Target("CPU", "VGG16 B=16, n=10, float32, time over plain", "ensemble", "VGG16 * B=16 n=10", "float32, time over*", 0.6, "x", True),
    Target("CPU", "VGG16 B=16, n=10, float32, against the best peer", "ensemble", "VGG16 * B=16 n=10", "float32, against*", 2.8, "x"),
    Target("CPU", "VGG16 B=1, n=10, float32, time over plain", "ensemble", "VGG16 * B=1 n=10", "float32, time over*", 0.75, "x", True),
    Target("CPU", "SmallNet B=16, n=10, float32, time over plain", "ensemble", "SmallNet *", "float32, time over*", 0.75, "x", True),
    Target("CPU", "ResNet-14 B=16, n=10, float32, time over plain", "ensemble", "ResNet-14 *", "float32, time over*", 0.75, "x", True),
    Target("CPU", "ResNet-50 B=1, n=10, float32, time over plain", "ensemble", "ResNet-50 *", "float32, time over*", 0.95, "x", True),
    Target("CPU", "VGG16 B=16, n=10, bfloat16, over direct", "ensemble", "VGG16 * B=16 n=10", "bfloat16, against direct*", 1.2, "x"),
    Target("CPU", "gradient of 20 draws, VGG16, float32, over direct", "attack", "VGG16 *", "float32, against direct*", 1.5, "x"),
    Target("CPU", "certify, SmallNet, n=10,000, over direct", "certify", "SmallNet * n=10000", "against direct*", 1.4, "x"),
    Target("CPU", "noisy layer, forward, over the eager noise layer's", "host", "convolution *", "forward over*", 1.2, "x", True),
    Target("CPU", "noisy layer, both ways, over the eager noise layer's", "host", "convolution *", "forward and*", 1.15, "x", True),
    Target("CPU", "remembered Triton launch, over Triton's own", "host", "launch *", "over Triton's*", round(12 / 42, 3), "x", True),
    Target("CPU", "compiled step over the compiled plain one", "train", "*, compiled", "step time*", 1.08, "x", True),
    Target("CPU", "compiled step against compiled eager noise", "train", "*, compiled", "against eager*", 2, "x"),
    Target("CPU", "int8, against our bfloat16 engine", "int8", "*", "*bfloat16*", 1.6, "x"),
    Target("CPU", "int8, labels equal", "int8", "*", "*labels*", 0.995, ""),
    Target("CPU", "training step, activation bytes saved over the plain network's", "train", "*", "*saved*", 1.01, "x", True),
    Target("GPU", "add_noise bfloat16, 1 GiB, of the copy's bandwidth", "noise", "bfloat16 * 512M", "of the copy*", 0.9, ""),
    Target("GPU", "ensemble of 10, large batch, cost over plain", "ensemble", "*n=10", "cost over the plain*", 1.03, "x", True),
    Target("GPU", "ensemble of 10, large batch, over torch.compile", "ensemble", "*n=10", "against torch.compile", 1.3, "x"),
    Target("GPU", "ensemble of 10, large batch, against eager loop", "ensemble", "*n=10", "against the eager loop", 3, "x"),
    Target("GPU", "ensemble of 10, B=1..8, against eager loop", "ensemble", "* B=[18] n=10", "against the eager loop", 10, "x"),
    Target("GPU", "training step time over the plain network's", "train", "*", "*time*", 1.05, "x", True),
    Target("GPU", "training peak memory over the plain network's", "train", "*", "*peak*", 1.01, "x", True),
)


def judge(found: list[dict]) -> list[tuple[Target, dict]]:
    """Every aim with the measured target that decides it, or one without a value that says what measuring it needs."""
    return [(aim, _decide(aim, found)) for aim in TARGETS]


def _decide(aim: Target, found: list[dict]) -> dict:
    for t in found:
        here = "CPU" if t["device"] == "cpu" else "GPU"
        if here != aim.hardware or t["suite"] != aim.suite or t["target"] != aim.wanted:
            continue
        if fnmatch.fnmatch(t["case"], aim.case) and fnmatch.fnmatch(t["what"], aim.what):
            return t
    on_gpu = any(t["device"] != "cpu" for t in found)
    needs = "a CUDA GPU" if aim.hardware == "GPU" and not on_gpu else f"rse-fast bench --suite {aim.suite}"
    return target(aim.suite, aim.case, aim.what, None, aim.wanted, aim.unit, at_most=aim.at_most, needs=needs)
