"""Suite "noise": ``x + sigma * eps`` against eager torch, torch.compile and a copy."""

import torch

from bench.measure import Row, interleaved, target
from bench.peers import eager_noise
from rse_fast import functional, reference
from rse_fast.kernels import cpu

SHAPE = (64, 64, 32, 32)  # 4M elements


def check(dtype, layout) -> None:
    """Raises unless the op is right: what is timed is what is tested."""
    x = torch.randn(3, 8, 9, 7).to(dtype).contiguous(memory_format=layout)
    got = functional.add_noise(x, 0.1, seed=5).double()
    want = reference.add_noise(x.double(), torch.tensor(0.1), torch.tensor(5), 0, 3, 1)
    step = want.abs().max() * torch.finfo(dtype).eps + 1e-6
    if not (got - want).abs().max() <= step:
        raise AssertionError(f"add_noise is wrong for {dtype}, {layout}: not timed")


def measure(dtype, layout) -> tuple[list[Row], list[dict]]:
    """One case: rows for every implementation, and the targets it is held to."""
    check(dtype, layout)
    x = torch.randn(SHAPE).to(dtype).contiguous(memory_format=layout)
    out, sigma, seed = torch.empty_like(x), torch.tensor(0.1), torch.tensor(7)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: eager_noise(x, 0.1))
    flat = layout is torch.channels_last
    implementations = {
        "rse_fast": lambda: functional.add_noise(x, sigma, seed=seed),
        "eager": lambda: eager_noise(x, 0.1),
        "torch.compile": lambda: compiled(x),
        "copy": lambda: out.copy_(x),
    }
    if cpu.load().handle is not None:  # the kernel alone, into memory that is already mapped
        arguments = (x, out, flat, sigma, seed, 0, SHAPE[0], 1, 0, 0, None, None, False)
        implementations["rse_fast kernel, no allocation"] = lambda: cpu.add_noise(*arguments)
    case = f"{str(dtype)[6:]} {'channels_last' if flat else 'contiguous'} 4M"
    rates = interleaved(implementations, x.numel() / 1e9)
    rows = [Row("noise", case, name, "normals", "G/s", *r) for name, r in rates.items()]
    ours, eager, inductor = rates["rse_fast"][1], rates["eager"][1], rates["torch.compile"][1]
    targets = [target("noise", case, "rate, fresh memory for the result", ours, 2, "G/s")]
    if (kernel := rates.get("rse_fast kernel, no allocation")) is not None:
        targets.append(target("noise", case, "rate, memory already mapped", kernel[1], 2, "G/s"))
    if dtype == torch.float32:
        targets.append(target("noise", case, "against eager", ours / eager, 6, "x"))
        targets.append(target("noise", case, "against torch.compile", ours / inductor, 30, "x"))
    return rows, targets


def run() -> tuple[list[Row], list[dict]]:
    cases = [measure(d, f) for d in (torch.float32, torch.bfloat16) for f in (torch.contiguous_format, torch.channels_last)]
    return [row for rows, _ in cases for row in rows], [t for _, targets in cases for t in targets]
