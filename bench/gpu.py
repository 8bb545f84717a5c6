"""``python -m bench.gpu [--out DIR]``: the kernels on a GPU against a copy, eager torch and torch.compile; JSON and Markdown.

Bandwidth counts the bytes that have to move (each input read once, each output written once). ``--once`` launches one kernel a few
times and measures nothing, for a profiler to watch; ``--host`` profiles the host.
"""

import argparse
import datetime
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

import rse_fast
from rse_fast import autograd, functional
from rse_fast.address import NoiseAddress
from rse_fast.kernels.triton import conv

from . import measure, networks, results, train
from .peers import eager_noise

GIB = 2**30
TARGET = 0.9  # of the copy's bandwidth, for add_noise in bfloat16 at 1 GiB


@dataclass(frozen=True)
class Row:
    """One implementation of one case: milliseconds, and bytes that had to move over the median time: in GB/s, of the first row's (the
    copy), and of what the device's memory can move by its clock and width (0 where the driver does not say)."""

    case: str
    implementation: str
    p20: float
    p50: float
    p80: float
    gigabytes: float
    bandwidth: float = 0.0
    of_copy: float = 0.0
    of_roofline: float = 0.0


def check() -> None:
    """Raises unless the kernels are right: what is timed is what is tested."""
    x = torch.randn(3, 64, 10, 8, device="cuda")
    seed, sigma, each = torch.tensor(5, device="cuda"), torch.tensor(0.5, device="cuda"), torch.rand(64, device="cuda")
    weight = torch.randn(64, 64, 1, 1, device="cuda")
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            y, w = x.to(dtype).contiguous(memory_format=layout), weight.to(dtype)
            epsilon = torch.finfo(dtype).eps
            calls = {
                "add_noise": (lambda b, y=y: functional.add_noise(y, sigma, seed=seed, backend=b), epsilon, 1e-3),
                "activate_noise": (lambda b, y=y: functional.activate_noise(y, sigma, seed=seed, pool=True, backend=b)[0], epsilon, 1e-3),
                "sigma_grad": (lambda b, y=y: autograd.sigma_grad(y, NoiseAddress(seed, 0, 3), True, b), 1e-3, 1e-1),
                "conv_activate_noise": (
                    lambda b, y=y, w=w: functional.conv_activate_noise(y, w, each, seed=seed, scale=each, act="relu", backend=b), 2e-2, 0.5
                ),
            }  # fmt: skip
            for name, (call, relative, absolute) in calls.items():
                got, want = call("triton").double(), call("torch").double()
                if not ((got - want).abs() <= want.abs() * relative + absolute).all():
                    raise AssertionError(f"{name} is wrong for {dtype}, {layout}: nothing is timed")


def memory_roofline() -> float:
    """GB/s of the device's memory by its clock and width; 0 where the driver does not tell."""
    try:
        return triton.testing.get_dram_gbps()
    except Exception:  # drivers differ in what they still report
        return 0.0


def timed(case: str, implementations: dict, gigabytes: float) -> list[Row]:
    """One row each; the first implementation is the copy that the others are compared with."""
    rows, copy, roofline = [], None, memory_roofline()
    for name, run in implementations.items():
        p50, p20, p80 = do_bench(run, warmup=50, rep=300, quantiles=(0.5, 0.2, 0.8))
        copy = copy or gigabytes / p50
        bandwidth = gigabytes / p50 * 1e3
        rows.append(Row(case, name, p20, p50, p80, gigabytes, bandwidth, gigabytes / p50 / copy, bandwidth / roofline if roofline else 0.0))
    return rows


def noise_case(dtype: torch.dtype, layout: torch.memory_format) -> list[Row]:
    """Noise on 1 GiB [N, 64, 64, 64], alone and behind an affine map with ReLU."""
    x = torch.randn(GIB // (dtype.itemsize * 2**18), 64, 64, 64, device="cuda", dtype=dtype).contiguous(memory_format=layout)
    out, seed, sigma = torch.empty_like(x), torch.tensor(7, device="cuda"), torch.tensor(0.1, device="cuda")
    scale, shift = torch.rand(64, device="cuda"), torch.rand(64, device="cuda")
    column = lambda p: p.view(-1, 1, 1)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: eager_noise(x, 0.1))
    compiled_affine = torch.compile(lambda x: eager_noise((x * column(scale) + column(shift)).relu().to(dtype), 0.1))
    deterministic = torch.compile(lambda x: (x * column(scale) + column(shift)).relu().to(dtype))
    flat = "channels_last" if layout is torch.channels_last else "contiguous"
    case = f"{str(dtype)[6:]} {flat} 1 GiB"
    implementations = {
        "copy": lambda: out.copy_(x),
        "rse_fast": lambda: functional.add_noise(x, sigma, seed=seed),
        "torch.compile": lambda: compiled(x),
        "eager": lambda: eager_noise(x, 0.1),
        "rse_fast affine relu": lambda: functional.add_noise(x, sigma, seed=seed, scale=scale, shift=shift, act="relu"),
        "torch.compile affine relu": lambda: compiled_affine(x),
        "torch.compile affine relu without noise": lambda: deterministic(x),
    }
    return timed(f"add_noise {case}", implementations, 2 * GIB / 1e9)


def eager_activation(x: torch.Tensor, pool: bool) -> tuple[torch.Tensor, torch.Tensor]:
    clean = torch.nn.functional.max_pool2d(x.relu(), 2) if pool else x.relu()
    return eager_noise(clean, 0.1), clean


def other_cases() -> list[Row]:
    x = torch.randn(256, 64, 64, 64, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    packed, seed, sigma = x.repeat(8, 1, 1, 1), torch.tensor(7, device="cuda"), torch.tensor(0.1, device="cuda")
    moved = (x.numel() + packed.numel()) * 2 / 1e9
    rows = timed(
        "add_noise bfloat16 channels_last, 256 images to 8 draws",
        {
            "repeat without noise": lambda: x.repeat(8, 1, 1, 1),
            "rse_fast lazy packing": lambda: functional.add_noise(x, sigma, seed=seed, images=256, draws=8),
            "eager on the packed batch": lambda: eager_noise(packed, 0.1),
        },
        moved,
    )
    flat = packed.movedim(1, -1).reshape(-1)
    for pool in (False, True):
        out = packed.numel() // (4 if pool else 1)
        rows += timed(
            f"activate_noise bfloat16 channels_last 1 GiB{', 2x2 max-pool' if pool else ''}",
            {
                "two copies of the result" if pool else "two copies": lambda n=out: (flat[:n].clone(), flat[:n].clone()),
                "rse_fast": lambda p=pool: functional.activate_noise(packed, sigma, seed=seed, act="relu", pool=p),
                "eager": lambda p=pool: eager_activation(packed, p),
            },
            (packed.numel() + 2 * out) * 2 / 1e9,
        )
    for per_channel in (False, True):
        rows += timed(
            f"sigma_grad bfloat16 channels_last 1 GiB, {'per channel' if per_channel else 'total'}",
            {
                "sum (reads alone)": lambda: packed.sum(dtype=torch.float32),
                "rse_fast": lambda p=per_channel: autograd.sigma_grad(packed, NoiseAddress(seed, 0, 2048), p, "triton"),
            },
            packed.numel() * 2 / 1e9,
        )
    return rows


CONVOLUTIONS = {  # shape class: images, Cin, size, Cout, kernel
    "pointwise": (128, 64, 56, 256, 1),
    "first": (1024, 3, 32, 64, 3),
    "other": (1024, 64, 32, 64, 3),
}


def convolution_case(name: str) -> tuple[list[Row], list[str]]:
    """Noise in the kernel, in the producer's epilogue and apart, for one shape class; and the lines that `CHOICES` should have."""
    images, c_in, size, c_out, kernel = CONVOLUTIONS[name]
    last = dict(memory_format=torch.channels_last)
    x = torch.randn(images, c_in, size, size, device="cuda", dtype=torch.bfloat16).contiguous(**last)
    w = torch.randn(c_out, c_in, kernel, kernel, device="cuda", dtype=torch.bfloat16).contiguous(**last)
    seed, sigma, each = torch.tensor(7, device="cuda"), torch.tensor(0.1, device="cuda"), torch.rand(c_out, device="cuda")
    noise, pad = (sigma, NoiseAddress(seed, 0, images)), (kernel // 2, kernel // 2)
    geometry = ((1, 1), pad, (1, 1))
    plain = lambda x: torch.nn.functional.conv2d(x, w, padding=pad)  # noqa: E731
    epilogue = lambda dtype: conv.conv_activate_noise(narrow[dtype], weights[dtype], *noise, each, each, True, *geometry)  # noqa: E731
    dtypes = [torch.bfloat16, *([torch.int8] if c_in % 32 == 0 else [])]
    if torch.cuda.get_device_capability() >= (8, 9) and c_in % 32 == 0:
        dtypes.append(torch.float8_e4m3fn)
    narrow, weights = {d: x.to(d) for d in dtypes}, {d: w.to(d) for d in dtypes}
    implementations = {
        "vendor without noise": lambda: plain(x),
        "separate": lambda: plain(autograd.add_noise(x, *noise, backend="triton")),
        "in_kernel": lambda: conv.noisy_conv(x, w, None, *noise, *geometry),
        "vendor, then affine relu noise": lambda: autograd.add_noise(plain(x), *noise, each, each, True, "triton"),
        **{f"epilogue {str(d)[6:]}": lambda d=d: epilogue(d) for d in dtypes},
    }
    case = f"conv {name}: {images}x{c_in}x{size}x{size} to {c_out}, {kernel}x{kernel}"
    rows = timed(case, implementations, (x.numel() + images * c_out * size**2) * 2 / 1e9)
    times = {r.implementation: r.p50 for r in rows}
    device = torch.cuda.get_device_name()
    best = {
        "input": min(("separate", "in_kernel"), key=times.get),
        "output": "epilogue" if times["epilogue bfloat16"] < times["vendor, then affine relu noise"] else "separate",
    }
    return rows, [f'("{device}", "bfloat16", "{question}", "{name}"): "{choice}",' for question, choice in best.items()]


def environment() -> dict:
    def output(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:  # the tool is not here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "device": torch.cuda.get_device_name(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "commit": results.commit(Path(rse_fast.__file__).parent),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def markdown(environment: dict, rows: list[Row], held: bool, choices: list[str]) -> str:
    lines = [
        f"# Kernels on {environment['device']}",
        "",
        ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
        + f"; driver {environment['driver']}; commit {environment['commit'][:12]}; {environment['date']}",
        "",
        f"add_noise in bfloat16 at 1 GiB at {TARGET:.0%} of the copy or more: {'yes' if held else 'NO'}.",
        "",
        "| case | implementation | ms p50 | p20 | p80 | GB/s | of the first row | of the memory's peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        times = f"{r.p50:.4f} | {r.p20:.4f} | {r.p80:.4f}"
        lines.append(f"| {r.case} | {r.implementation} | {times} | {r.bandwidth:.0f} | {r.of_copy:.2f} | {r.of_roofline:.2f} |")
    lines += ["", "Lines for `CHOICES` in `kernels/triton/choices.py`:", "", "```python", *choices, "```"]
    return "\n".join(lines) + "\n"


def once(name: str) -> None:
    """Launches what a profiler is to watch."""
    layout = torch.contiguous_format if name.endswith("planar") else torch.channels_last
    x = torch.randn(2048, 64, 64, 64, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout)
    seed, sigma, each = torch.tensor(7, device="cuda"), torch.tensor(0.1, device="cuda"), torch.rand(64, device="cuda")
    for _ in range(3):
        functional.add_noise(x, sigma, seed=seed, scale=each, shift=each, act="relu")
    torch.cuda.synchronize()


def host() -> None:
    """Prints where the host's time goes in training steps whose launches it cannot keep up with."""
    model, x = rse_fast.convert(networks.plain("VGG16", torch.device("cuda"))), torch.rand(8, 3, 32, 32, device="cuda")
    step = train.Step(model, x, torch.bfloat16)
    for _ in range(5):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, with_stack=True) as profile:
        for _ in range(10):
            step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60))
    print(profile.key_averages(group_by_stack_n=3).table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


def run() -> tuple[list[measure.Row], list[dict]]:
    """The same cases as suite "gpu" of `rse-fast bench`: bandwidth, and the target of the noise."""
    torch.backends.cudnn.benchmark = True
    check()
    rows = []
    for row in [row for case in cases_of_noise() for row in noise_case(*case)] + other_cases():
        name = "copy (limit)" if row.implementation == "copy" else row.implementation
        figures = (row.gigabytes / milliseconds * 1e3 for milliseconds in (row.p80, row.p50, row.p20))
        rows.append(measure.Row("gpu", row.case, name, "bandwidth", "GB/s", *figures))
    return rows, []


def cases() -> dict:
    """Empty where there is no GPU."""
    return {"all": run} if measure.default_device().type == "cuda" else {}


def cases_of_noise() -> list[tuple[torch.dtype, torch.memory_format]]:
    layouts = (torch.channels_last, torch.contiguous_format)
    return [(dtype, layout) for dtype in (torch.bfloat16, torch.float32) for layout in layouts]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/device"), help="folder for the results (default: %(default)s)")
    parser.add_argument("--once", choices=("flat", "planar"), help="launch one kernel and measure nothing")
    parser.add_argument("--host", action="store_true", help="profile the host in training steps and measure nothing else")
    parser.add_argument("--list", action="store_true", help="print what would be measured, launch and measure nothing")
    arguments = parser.parse_args()
    if arguments.list:
        noise = [f"add_noise {str(dtype)[6:]} {str(layout)[6:]}" for dtype, layout in cases_of_noise()]
        print("\n".join([*noise, *(f"convolution {name}" for name in CONVOLUTIONS)]))
        return 0
    if arguments.host:
        host()
        return 0
    if arguments.once:
        once(arguments.once)
        return 0
    torch.backends.cudnn.benchmark = True  # the vendor at its best
    check()
    rows = [row for case in cases_of_noise() for row in noise_case(*case)] + other_cases()
    convolutions = [convolution_case(name) for name in CONVOLUTIONS]
    rows += [row for found, _ in convolutions for row in found]
    choices = [line for _, lines in convolutions for line in lines]
    held = all(r.of_copy >= TARGET for r in rows if r.case.startswith("add_noise bfloat16") and r.implementation == "rse_fast")
    about = environment()
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": about, "rows": [asdict(r) for r in rows], "choices": choices}, indent=1)
    arguments.out.joinpath("kernels.json").write_text(text + "\n")
    arguments.out.joinpath("kernels.md").write_text(markdown(about, rows, held, choices))
    print(markdown(about, rows, held, choices))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
