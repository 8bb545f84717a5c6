"""How cost grows, from what was measured, and a plan past one machine: writes bench/SCALING.md from results files."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import networks, results

DEVICES = (1, 8, 64)
IMAGES, VOTES = 50_000, 100_000
BATCH = 128  # training images a device and step
# Data-sheet figures of the GPU that stands for a device where none was measured, and the shares of them that the prediction assumes.
GPU = {"name": "H200 SXM", "tflops": 989.0, "share": 0.4, "gbytes": 4800.0, "reached": 0.9}
# Forward passes, as predicted, that an image costs in training: on a CPU; on that GPU, as on the H100 that was measured, where the pass of
# every activation over memory counts and not the arithmetic (7.6 for VGG16, 10.2 for ResNet-50).
PASSES = {"measured": 3, "predicted": 9}
NVLINK, NETWORK = 450.0, 50.0  # GB/s a device and direction: within a node of 8, and between nodes
COMMAND = "rse-fast bench --results"


# ---------------------------------------------------------------------------------------------------------------------- fits
def fit(x, y) -> dict[str, float]:
    """Least squares of ``y = a + b x``, how well it holds (r2, 1 where y is constant), and the exponent of growth at the two largest x."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    b, a = np.polyfit(x, y, 1)
    total = ((y - y.mean()) ** 2).sum()
    r2 = 1.0 if total <= 1e-18 * (y**2).sum() else 1 - ((y - a - b * x) ** 2).sum() / total
    exponent = np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2])
    return {"a": float(a), "b": float(b), "r2": float(r2), "exponent": float(exponent)}


# case's name: what x is, and the power of the case's value that it is
AXES = {"draws": ("draws", 1), "batch": ("images", 1), "side": ("pixels an image", 2), "depth": ("convolutions", 1)}


def fits(found: dict) -> list[dict]:
    """A `fit` for each axis, implementation and metric of suite "growth", with the range of what was measured."""
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for row in found["rows"]:
        if row["suite"] == "growth" and row["p50"] is not None:
            axis, value = row["case"].split("=")
            key = axis, row["implementation"], row["metric"], row["unit"]
            groups.setdefault(key, []).append((float(value) ** AXES[axis][1], row["p50"]))
    made = []
    for (axis, name, metric, unit), points in groups.items():
        if len(points) >= 3:
            x, y = zip(*sorted(points), strict=True)
            made.append({"axis": AXES[axis][0], "implementation": name, "metric": metric, "unit": unit, "x": x, "y": y, **fit(x, y)})
    return made


# ------------------------------------------------------------------------------------------------------------------ one device
def work(kind: str) -> dict[str, float]:
    """Of one pass of one image: multiply-adds, elements that pass the noise, and the network's parameters; counted on the meta device."""
    network, side = networks.KINDS[kind]
    counted = {"multiply_adds": 0, "elements": 0}

    def count(layer, inputs, output):
        counted["multiply_adds"] += output.numel() * layer.weight[0].numel()
        counted["elements"] += inputs[0].numel()

    with torch.device("meta"):
        model = network().eval()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(count)
        model(torch.empty(1, 3, side, side))
    return {**counted, "parameters": sum(p.numel() for p in model.parameters())}


def predicted_rate(kind: str) -> float:
    """Passes a second of one GPU that nobody measured: arithmetic at ``share`` of the bfloat16 peak, and, one after the other, each noisy
    layer's pass over memory (read and write, 2 bytes an element) at ``reached`` of the bandwidth."""
    w = work(kind)
    seconds = 2 * w["multiply_adds"] / (GPU["tflops"] * 1e12 * GPU["share"]) + 4 * w["elements"] / (GPU["gbytes"] * 1e9 * GPU["reached"])
    return 1 / seconds


def measured_rate(found: dict, kind: str) -> tuple[float, str] | None:
    """(passes a second, case) of suite "ensemble", the largest rse-fast reached at 10 draws or more."""
    rates = []
    for row in found["rows"]:
        match = re.fullmatch(rf"{kind} \d+x\d+ B=\d+ n=(\d+)", row["case"])
        if match and row["suite"] == "ensemble" and row["implementation"] == "rse_fast" and row["p50"] and int(match[1]) >= 10:
            rates.append((row["p50"] * int(match[1]), row["case"]))
    return max(rates, default=None)


def trained_rate(found: dict, kind: str) -> float | None:
    """Images a second of rse-fast's training step in suite "train", the largest over batches and dtypes."""
    rates = []
    for row in found["rows"]:
        match = re.fullmatch(rf"{kind} \d+x\d+ B=(\d+) .*", row["case"])
        if match and row["suite"] == "train" and row["metric"] == "steps" and row["implementation"].startswith("rse_fast") and row["p50"]:
            rates.append(row["p50"] * int(match[1]))
    return max(rates, default=None)


# ---------------------------------------------------------------------------------------------------------------- many devices
def inference(rate: float, devices: int, draws: int = 10) -> float:
    """Images/s: images are independent, and each device draws its own noise from the seed, so nothing is exchanged but results."""
    return rate / draws * devices


def training(rate: float, parameters: float, devices: int) -> tuple[float, float, float]:
    """(images/s if gradients are exchanged during backward, images/s if after it, seconds of the exchange), at ``rate`` images/s a device.

    A step is ``BATCH`` images a device; the exchange is a ring all-reduce of float32 gradients, whose slowest link counts.
    """
    step = BATCH / rate
    link = NVLINK if devices <= 8 else NETWORK
    exchange = 2 * (devices - 1) / devices * 4 * parameters / (link * 1e9)
    return BATCH * devices / max(step, exchange), BATCH * devices / (step + exchange), exchange


def certification(rate: float, devices: int, n0: int = 100) -> float:
    """Hours for IMAGES images at VOTES votes; images are dealt out whole, so the device with the most decides."""
    return -(-IMAGES // devices) * (VOTES + n0) / rate / 3600


# ------------------------------------------------------------------------------------------------------------------- the page
def write(page: Path, paths: list[Path]) -> None:
    """Writes ``page`` from results files: the fits of each, and the plan from what each measured, or predicted where no GPU was."""
    measured = [(path, results.load(path)) for path in paths]
    lines = [
        "# How cost grows, and a plan past one machine",
        "",
        f"Written by `{COMMAND} {' '.join(map(str, paths))}`. *Measured* figures come from those files; *predicted* ones were calculated",
        "as described here and have not been seen on any device.",
        "",
        "## Growth",
        "",
        "A chain of 3x3 convolutions of 64 channels with BatchNorm and ReLU; where nothing else is said 8 images of 32x32, 10 draws, 6",
        "convolutions. Fits are least squares of `a + b x`; the exponent is that between the two largest x: 1 is linear, 0 is flat.",
    ]
    for path, found in measured:
        if made := fits(found):
            lines += ["", f"{results.machine(found['rows'][0])} ({path}), measured:", "", *_fit_table(made)]
    lines += ["", "## One device", "", *_one_device(measured)]
    lines += ["", "## Many devices", "", *_assumptions()]
    for kind in ("VGG16", "ResNet-50"):
        lines += ["", f"### {kind} at {networks.KINDS[kind][1]}x{networks.KINDS[kind][1]}", "", *_plan(kind, measured)]
    results.write_whole(page, "\n".join(lines) + "\n")


def _fit_table(made: list[dict]) -> list[str]:
    lines = ["| x | implementation | figure | from x | to x | from | to | a | b | r2 | exponent |", "|---" * 11 + "|"]
    for f in made:
        ends = (f"{end:.3g}" for end in (f["x"][0], f["x"][-1], f["y"][0], f["y"][-1]))
        fitted = (f"{f['a']:.3g}", f"{f['b']:.3g}", f"{f['r2']:.4f}", f"{f['exponent']:.2f}")
        lines.append(_row(f["axis"], f["implementation"], f"{f['metric']}, {f['unit']}", *ends, *fitted))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rates(kind: str, measured) -> list[tuple[str, float | None, str, float | None]]:
    """(device, passes a second, how that is known, training images a second), None for what was not measured, of each device; and of the
    predicted GPU where no GPU's passes were measured."""
    known, gpus = [], 0
    for path, found in measured:
        rate, trained = measured_rate(found, kind), trained_rate(found, kind)
        if rate or trained:
            speed, how = (rate[0], f"measured: {rate[1]} in {path}") if rate else (None, "not measured")
            known.append((results.machine(found["rows"][0]), speed, how, trained))
            gpus += bool(rate) and found["rows"][0]["device"] != "cpu"
    if not gpus:
        known.append((GPU["name"], predicted_rate(kind), "predicted", None))
    return known


def _one_device(measured) -> list[str]:
    arithmetic, memory = f"2 M / ({GPU['share']:g} x {GPU['tflops']:g} TFLOP/s)", f"4 E / ({GPU['reached']:g} x {GPU['gbytes']:g} GB/s)"
    lines = [
        f"Predicted for one {GPU['name']}: `1 / ({arithmetic} + {memory})` passes a second,",
        "with M multiply-adds and E elements that pass the noise, of one image (bfloat16: read and written once by the pass that makes the",
        "noise). Peak and bandwidth are the data sheet's; the two shares are assumptions.",
        "",
        "| network | M | E | parameters | device | passes/s | |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("VGG16", "ResNeXt29", "ResNet-50"):
        w = work(kind)
        for name, rate, how, _ in (found for found in _rates(kind, measured) if found[1]):
            counts = (f"{w['multiply_adds'] / 1e9:.3g} G", f"{w['elements'] / 1e6:.3g} M", f"{w['parameters'] / 1e6:.3g} M")
            lines.append(_row(kind, *counts, name, f"{rate:,.0f}", how))
    return lines


def _assumptions() -> list[str]:
    return [
        "- The noise is a pure function of (seed, layer, draw, image, position), so images, draws or both can be dealt out to devices",
        "  in any way and the result is the same; what is exchanged is 4 bytes a class and image at the end.",
        "- Inference: 10 draws an image, no early exit.",
        f"- Training: {BATCH} images a device and step, one draw; where no step was measured an image costs as much as",
        f"  {PASSES['measured']} forward passes on a CPU and {PASSES['predicted']} predicted ones on a GPU (on an H100: 7.6 for VGG16,",
        "  10.2 for ResNet-50). Gradients are float32 and go round a",
        f"  ring: `2 (N - 1) / N x 4 P` bytes a device and step, over links of {NVLINK:g} GB/s a direction within a node of 8 (NVLink)",
        f"  and {NETWORK:g} GB/s between nodes (400 Gbit/s). The larger figure: the exchange hides behind backward as far as it can;",
        "  the smaller: it does not.",
        f"- Certification: {IMAGES:,} images at n = {VOTES:,} (and n0 = 100), every vote taken; images are dealt out whole.",
        "- Data loading, stragglers and failures are left out. Several devices multiply what one does: also where one was measured,",
        "  figures for more than one are predicted.",
    ]


def _plan(kind: str, measured) -> list[str]:
    parameters = work(kind)["parameters"]
    lines = ["| device | how many | inference, images/s | training, images/s | exchange a step | certification |", "|---" * 6 + "|"]
    for name, rate, how, trained in _rates(kind, measured):
        for devices in DEVICES:
            fast, slow, exchange = training(trained or rate / PASSES[how.partition(":")[0]], parameters, devices)
            together = certified = "not measured"
            if rate:
                hours = certification(rate, devices)
                certified = f"{f'{hours:.3g} hours' if hours < 1000 else f'{hours / 8766:.3g} years'} (predicted)"
                together = f"{inference(rate, devices):,.0f} ({how.partition(':')[0] if devices == 1 else 'predicted'})"
            step = f"{slow:,.0f} to {fast:,.0f} (predicted)" if devices > 1 else f"{fast:,.0f} ({'measured' if trained else 'predicted'})"
            lines.append(_row(name, str(devices), together, step, f"{1e3 * exchange:.2g} ms", certified))
    return lines
