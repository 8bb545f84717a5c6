"""Where the noise of a convolution is made: the one table, its default from instruction counts until `bench.gpu` fills it on a device.

Two questions are asked of it, each about one convolution:

- ``input``: the noise at the convolution's own input. "in_kernel": made at the tiles of its implicit GEMM, again for every tap and
  tile of output channels. "separate": one pass of add_noise, then the vendor's convolution.
- ``output``: the noise that the *next* layer wants on this convolution's result. "epilogue": added while the result is in registers.
  "separate": the vendor's convolution, then one pass for affine map, activation and noise.

The gradient of the weight has no row: it reads one transient tensor, the noisy input, which one pass of add_noise regenerates, and then the
vendor computes it. A kernel of our own would make each value again for every tap and every tile of output channels, at 0.14-0.20 clocks an
element each, against 0.24 for the pass that it saves (sm_90, bfloat16). That pays only for 1x1 with one tile, by a quarter of one pass at
most, while the kernel (a split reduction over all pixels) would have to match the vendor's throughout.
"""

import fnmatch

import torch

__all__ = ["CHOICES", "WAYS", "look_up", "shape_class", "table"]

WAYS = {"input": ("in_kernel", "separate"), "output": ("epilogue", "separate")}

# (device name, dtype, question, shape class): patterns, the first match holds. Rows of a device go above the default.
CHOICES = {
    ("*", "*", "*", "grouped"): "separate",
    # torch has no convolution of these types to hand over to.
    ("*", "int8", "output", "*"): "epilogue",
    ("*", "float8_*", "output", "*"): "epilogue",
    ("*", "float32", "*", "*"): "separate",
    # Predicted: noise costs k * k * ceil(Cout / 256) times what a separate pass takes, which only these undercut (12-26 %, 10 %).
    ("*", "*", "input", "pointwise"): "in_kernel",
    ("*", "*", "input", "first"): "in_kernel",
    ("*", "*", "input", "*"): "separate",
    # Predicted: pays while the own convolution is within 20 % of the vendor's, which is sure only where both are bound by memory.
    ("*", "*", "output", "pointwise"): "epilogue",
    ("*", "*", "output", "*"): "separate",
}


def shape_class(weight: torch.Size, groups: int) -> str:
    """ "grouped" (or not 2-D), "first" (at most 4 input channels), "pointwise" (1x1 to at most 256 channels) or "other"."""
    c_out, c_in, *kernel = weight
    if groups != 1 or len(kernel) != 2:
        return "grouped"
    if c_in <= 4:
        return "first"
    return "pointwise" if list(kernel) == [1, 1] and c_out <= 256 else "other"


def look_up(device: str, dtype: torch.dtype, question: str, weight: torch.Size, groups: int) -> str:
    """One of ``WAYS[question]`` for a convolution of ``weight`` [Cout, Cin / groups, *kernel] on the device of that name."""
    wanted = (device, str(dtype).removeprefix("torch."), question, shape_class(weight, groups))
    return next(choice for key, choice in CHOICES.items() if all(map(fnmatch.fnmatchcase, wanted, key)))


def table() -> str:
    """`CHOICES` in Markdown."""
    lines = ["| device | dtype | noise at | convolution | made |", "|---|---|---|---|---|"]
    cells = [["any" if part == "*" else part for part in (*key, choice)] for key, choice in CHOICES.items()]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"
