"""Suite "int8": ensembles on bytes against those of the higher precision; what the vendor's convolution allows; whether labels agree."""

import torch

import rse_fast
from rse_fast.ensemble.convolution import byte_forms
from rse_fast.ensemble.quantize import weight_bits
from rse_fast.ensemble.runner import has_bfloat16

from . import networks, trained
from .ensemble import distance
from .measure import Refused, Row, compare, default_device, ratio, target
from .networks import SIGMAS

# 3x3 convolutions of VGG16 behind its first: (inputs, outputs, side), and how many there are.
SHAPES = {
    (64, 64, 32): 1, (64, 128, 16): 1, (128, 128, 16): 1, (128, 256, 8): 1, (256, 256, 8): 2,
    (256, 512, 4): 1, (512, 512, 4): 2, (512, 512, 2): 3,
}  # fmt: skip
ROWS = 80  # of a packed batch of bfloat16; twice as many are 1 % faster in either


def speed() -> tuple[list[Row], list[dict]]:
    """The engine in each dtype, with the same noise."""
    case, x, calm = "VGG16 32x32 B=16 n=10", networks.images(16, 32, default_device()), "float32"
    noisy = rse_fast.convert(networks.plain("VGG16", default_device()), *SIGMAS)
    bfloat16 = has_bfloat16(default_device())
    dtypes = ["int8", *(["bfloat16"] if bfloat16 else []), calm]
    of_bytes, direct = bool(byte_forms()), "rse_fast int8, direct convolutions"
    want = rse_fast.Ensemble(noisy, 10, seed=1, dtype=calm).predict(x).probs
    other = rse_fast.Ensemble(noisy, 10, seed=2, dtype=calm).predict(x).probs

    def build(dtype, algorithm="auto"):
        calibration = networks.images(64, 32, default_device()) if dtype == "int8" else None
        ensemble = rse_fast.Ensemble(noisy, 10, seed=1, dtype=dtype, calibration=calibration, algorithm=algorithm)
        return lambda: ensemble.predict(x).probs

    def check(name, probs, _):
        if not (off := distance(probs, want)) <= (most := distance(other, want)):
            raise Refused(f"its mean softmax is off by {off:.3g} from float32 with the same noise, other noise makes {most:.3g}")

    builders = {f"rse_fast {dtype}": lambda dtype=dtype: build(dtype) for dtype in dtypes}
    builders[direct] = lambda: build("int8", "direct")
    rows, rates = compare("int8", case, "images", "images/s", 16, builders, check, seconds=4, rounds=15, least=3)
    byte = rates["rse_fast int8"]
    return rows, [
        target("int8", case, "int8 against our bfloat16 engine", ratio(byte, rates.get("rse_fast bfloat16")), 1.6, "x",
               needs="" if bfloat16 else "a processor that computes in bfloat16"),
        target("int8", case, "int8 against int8 with direct convolutions", ratio(byte, rates.get(direct)), 1.4, "x",
               needs="" if of_bytes else "a processor with AVX-512 VNNI and BF16"),
    ]  # fmt: skip


def vendor() -> tuple[list[Row], list[dict]]:
    """oneDNN's convolutions at VGG16's shapes: what any engine on it is bound by."""
    layers, work = {"int8": [], "float32": [], **({"bfloat16": []} if has_bfloat16(default_device()) else {})}, 0
    for (inputs, outputs, side), count in SHAPES.items():
        work += 2 * 9 * inputs * outputs * side**2 * ROWS * count / 1e9
        geometry, bias = ([1, 1], [1, 1], [1, 1], 1), torch.rand(outputs)
        x = torch.rand(ROWS, inputs, side, side).contiguous(memory_format=torch.channels_last)
        weight, steps, zeros = torch.randn(outputs, inputs, 3, 3), torch.full((outputs,), 0.01), torch.zeros(outputs, dtype=torch.int64)
        bytes_, narrow = (x * 255).to(torch.uint8), (weight * 16).clamp(-64, 64).to(torch.int8)
        packed = torch.ops.onednn.qconv_prepack(narrow, steps, 0.02, 20, *geometry, list(x.shape))
        arguments = (0.02, 20, packed, steps, zeros, bias, *geometry, 0.1, 0, torch.uint8, "relu", [], "")
        layers["int8"] += [lambda a=(bytes_, *arguments): torch.ops.onednn.qconv_pointwise(*a)] * count
        for dtype in list(layers)[1:]:
            y, real = x.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype))
            packed = torch.ops.mkldnn._reorder_convolution_weight(real, *geometry, list(x.shape))
            a = (y, packed, bias.to(y.dtype), *geometry, "none", [], "")
            layers[dtype] += [lambda a=a: torch.ops.mkldnn._convolution_pointwise(*a)] * count

    def run(calls):
        for call in calls:
            call()

    builders = {f"oneDNN {dtype} (limit)": lambda calls=calls: lambda: run(calls) for dtype, calls in layers.items()}
    rows, _ = compare("int8", f"VGG16's 3x3 convolutions, {ROWS} rows", "operations", "GOP/s", work, builders, seconds=3, least=3)
    return rows, []


def agreement() -> tuple[list[Row], list[dict]]:
    """Labels of int8 against float32 with the same noise, on a VGG16 trained on digits."""
    model, x, y = trained.digits()
    return compared("VGG16 on digits n=10", model, x[64:], y[64:], x[:64])


def compared(case: str, model, x, y, calibration, draws: int = 10) -> tuple[list[Row], list[dict]]:
    """Rows and targets of an int8 ensemble against the float32 one. Nothing is timed."""
    floats = rse_fast.Ensemble(model, draws, seed=1, dtype="float32")
    bytes_ = rse_fast.Ensemble(model, draws, seed=1, dtype="int8", calibration=calibration)
    want, got = (ensemble.predict(x) for ensemble in (floats, bytes_))
    single = torch.stack([rse_fast.Ensemble(model, 1, seed=s, dtype="float32").predict(x[:200]).probs for s in range(20)])
    error = (single.std(0) / 10).mean().item()  # of a mean of 100 draws
    equal = (got.labels == want.labels).float().mean().item()
    off = (got.probs - want.probs).abs().mean().item()
    accuracy = [(p.labels == y).float().mean().item() for p in (got, want)]
    report = bytes_.quantization
    case = f"{case}, {len(x)} images, {len(report.quantized)} layers in int8, weights of {weight_bits()} bits"
    rows = [
        Row("int8", case, "rse_fast int8", "labels equal to those of float32", "", equal, equal, equal),
        Row("int8", case, "rse_fast int8", "mean difference of probs", "", off, off, off),
        Row("int8", case, "rse_fast float32", "standard error of probs at n=100", "", error, error, error),
        Row("int8", case, "rse_fast int8", "accuracy", "", *[accuracy[0]] * 3),
        Row("int8", case, "rse_fast float32", "accuracy", "", *[accuracy[1]] * 3),
    ]
    return rows, [
        target("int8", case, "labels equal to those of float32", equal, 0.995, ""),
        target("int8", case, "mean difference of probs over the standard error at n=100", off / error, 1, "x", at_most=True),
        target("int8", case, "accuracy lost or won", abs(accuracy[0] - accuracy[1]), 0.002, "", at_most=True),
    ]


def cases() -> dict:
    if default_device().type != "cpu":
        return {}
    return {"VGG16 32x32 B=16 n=10": speed, "VGG16's 3x3 convolutions": vendor, "VGG16 on digits n=10, labels": agreement}
