"""Suite "convolution": 3x3 convolutions of VGG16, ResNet-18, ResNet-50 and SmallNet, the vendor's against ours with and without noise."""

import torch
from torch.nn.functional import conv2d

from rse_fast.address import NoiseAddress
from rse_fast.kernels import cpu
from rse_fast.kernels.cpu import winograd

from .measure import Refused, Row, compare, default_device, ratio, target

# Distinct 3x3 convolutions of stride 1 behind the first: (inputs, outputs, side), and how many there are.
SHAPES = {
    "VGG16": {(64, 64, 32): 1, (64, 128, 16): 1, (128, 128, 16): 1, (128, 256, 8): 1, (256, 256, 8): 2,
              (256, 512, 4): 1, (512, 512, 4): 2, (512, 512, 2): 3},
    "ResNet-18": {(64, 64, 56): 4, (128, 128, 28): 3, (256, 256, 14): 3, (512, 512, 7): 3},
    "ResNet-50": {(64, 64, 56): 3, (128, 128, 28): 3, (256, 256, 14): 5, (512, 512, 7): 2},
    "SmallNet": {(32, 32, 32): 1, (32, 64, 16): 1, (64, 64, 16): 1, (64, 128, 8): 1, (128, 128, 8): 2},
}  # fmt: skip
ROWS = (10, 80, 160)
TARGET = 0.5  # of the vendor's time, over VGG16 at 80 rows
DIRECT = "oneDNN direct"


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def layer(inputs: int, outputs: int, side: int, rows: int) -> tuple[list[Row], dict[str, float | None]]:
    """Rows and rates (multiplications and additions of the direct convolution a second) of one shape."""
    x = channels_last(torch.randn(rows, inputs, side, side))
    weight, bias = torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5), torch.randn(outputs)
    geometry, sigma = ([1, 1], [1, 1], [1, 1], 1), torch.tensor([0.1])
    at = NoiseAddress(torch.tensor(1), 0, rows)
    noisy = torch.empty_like(x)
    cpu.add_noise(x, noisy, True, sigma, at, None, None, False)

    def direct():
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
        return lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], "")

    def ours(tile, **noise):
        transformed, out = winograd.transform_weight(weight, tile), channels_last(torch.empty(rows, outputs, side, side))

        def run():
            winograd.convolution(x, transformed, out, 1, bias=bias, **noise)
            return out

        return run

    builders = {
        DIRECT: direct,
        "NNPACK": lambda: lambda: torch._nnpack_spatial_convolution(x, weight, bias, [1, 1], [1, 1]),
        **{f"rse_fast F{tile}": lambda tile=tile: ours(tile) for tile in (2, 4)},
        **{f"rse_fast F{tile} with noise": lambda tile=tile: ours(tile, at=at, sigma=sigma) for tile in (2, 4)},
    }

    def check(name, result, _):
        read = noisy if name.endswith("noise") else x
        want = conv2d(read[:2].double(), weight.double(), bias.double(), padding=1)
        if not (off := (result[:2].double() - want).abs().max().item()) <= 1e-4:
            raise Refused(f"off by {off:.3g} from float64")

    work = 2 * 9 * inputs * outputs * side**2 * rows / 1e9
    case = f"{inputs}->{outputs} {side}x{side}, {rows} rows"
    rows_, rates = compare("convolution", case, "direct operations", "GOP/s", work, builders, check, seconds=0.5, rounds=21)
    return rows_, {name: rate and rate / work for name, rate in rates.items()}


def network(name: str, rows: int) -> tuple[list[Row], list[dict]]:
    """All layers of a network; each of ours in the faster form."""
    found, seconds = [], {DIRECT: 0.0, "plain": 0.0, "noise": 0.0}
    for shape, count in SHAPES[name].items():
        rows_, rates = layer(*shape, rows)
        found += rows_
        best = {key: [rates[f"rse_fast F{tile}{end}"] for tile in (2, 4)] for key, end in (("plain", ""), ("noise", " with noise"))}
        for key in seconds:
            rate = rates[DIRECT] if key == DIRECT else max((r for r in best[key] if r), default=None)
            seconds[key] = None if rate is None or seconds[key] is None else seconds[key] + count / rate
    case = f"3x3 convolutions of {name}, {rows} rows"
    wanted = TARGET if (name, rows) == ("VGG16", 80) else 1
    return found, [
        target("convolution", case, what, ratio(seconds[key], seconds[DIRECT]), wanted, "x", at_most=True)
        for key, what in (("noise", "time with noise over oneDNN's direct without"), ("plain", "time without noise over oneDNN's direct"))
    ]


def cases() -> dict:
    if default_device().type != "cpu" or cpu.load().handle is None:
        return {}
    return {f"{name}, {rows} rows": lambda name=name, rows=rows: network(name, rows) for name in SHAPES for rows in ROWS}
