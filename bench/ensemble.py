"""Suite "ensemble": images/s of n noisy passes against every peer and against the deterministic network, over batches and draws."""

import contextlib
import copy
import functools
import time

import torch

import rse_fast
from rse_fast.ensemble.runner import has_bfloat16
from rse_fast.kernels.cpu import winograd

from . import networks, peers
from .measure import Refused, Row, best_peer, compare, default_device, ratio, selected, target
from .networks import SIGMAS

# (network, batch, draws, peers): "few" that show how throughput grows, the "eager" ones, those that torch "compiles" too, or "all". What
# compiles comes last where compiling takes minutes.
CASES = {
    "cpu": (
        ("VGG16", 16, 10, "all"), ("VGG16", 1, 10, "all"), ("ResNeXt29", 4, 10, "all"), ("ResNet-50", 1, 10, "all"),
        ("VGG16", 4, 10, "few"), ("VGG16", 64, 10, "few"), ("VGG16", 4, 1, "few"), ("VGG16", 4, 50, "few"), ("VGG16", 4, 100, "few"),
        ("VGG16", 1024, 1, "few"), ("SmallNet", 16, 10, "eager"), ("ResNet-14", 16, 10, "eager"),
    ),
    "cuda": (
        ("VGG16", 512, 10, "eager"), ("VGG16", 1, 10, "eager"), ("VGG16", 8, 10, "eager"), ("ResNet-50", 64, 10, "eager"),
        ("ResNet-50", 1, 10, "eager"), ("ResNeXt29", 256, 10, "eager"), ("VGG16", 64, 10, "few"), ("VGG16", 64, 1, "few"),
        ("VGG16", 64, 50, "few"), ("VGG16", 64, 100, "few"), ("ResNet-50", 8, 10, "few"), ("VGG16", 256, 10, "compiled"),
        ("ResNet-50", 128, 10, "compiled"), ("VGG16", 1024, 10, "all"),
    ),
}  # fmt: skip
DIRECT = "direct convolutions"  # the vendor's, in every layer
CHUNK = {"cpu": 80, "cuda": 1024}  # rows: where the plain network's own throughput peaks
ROUNDING = 1e-4  # of probabilities, in float32


class Reference:
    """Softmax of single draws of the eager float32 network, which every implementation's mean over ``draws`` has to agree with."""

    def __init__(self, plain, x, draws, resamples=200):
        eager = peers.eager_rse(plain, *SIGMAS)
        count = min(32, max(8, 512 // len(x)))
        with torch.no_grad():
            drawn = torch.stack([eager(x).softmax(-1) for _ in range(count)])
            self.calm = plain(x).softmax(-1)
            low = peers.deterministic(plain, torch.bfloat16)(x.bfloat16()).float().softmax(-1) if has_bfloat16(x.device) else self.calm
        self.mean, self.rounding = drawn.mean(0), ROUNDING + 4 * (low - self.calm).abs().max()
        pick = lambda n: drawn[torch.randint(count, (n,))].mean(0)  # noqa: E731
        self.chance = max(distance(pick(draws), pick(count)) for _ in range(resamples))

    def check(self, name: str, probs: torch.Tensor, again: torch.Tensor) -> None:
        """Raises unless ``probs`` [B, K] is no further from the reference than twice what chance does at most in bootstrap samples of the
        reference, plus four times what bfloat16 does to the network, and unless a second call gave other noise."""
        calm = name.endswith("(limit)")
        want, allowed = (self.calm, self.rounding) if calm else (self.mean, 2 * self.chance + self.rounding)
        if probs.shape != want.shape or not (off := distance(probs, want)) <= allowed:
            raise Refused(f"its mean softmax is off by {off:.3g}, where chance and rounding allow {allowed:.3g}")
        if not calm and torch.equal(probs, again):
            raise Refused("two calls gave the same noise")


def distance(probs: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Mean over images of the total variation distance."""
    return (probs.float() - want).abs().sum(-1).mean() / 2


def check_exact(ensemble, model, x, rounding) -> None:
    """Raises unless the packed ensemble is the mean of sequential passes with the same noise, made by the plain-torch backend."""
    want = 0
    with torch.no_grad():
        for d in range(ensemble.draws):
            with rse_fast.context.NoiseContext(torch.tensor(3, device=x.device), len(x), 1, 0, d, "torch"):
                want = want + model.eval()(x).softmax(-1) / ensemble.draws
    error = (ensemble.predict(x, seed=3).probs - want).abs().max()
    if not error <= rounding:
        raise Refused(f"the ensemble is off by {error:.3g} from sequential passes with the same noise")


def measure(kind: str, batch: int, draws: int, which: str) -> tuple[list[Row], list[dict]]:
    """One case: rows for every implementation, and the targets it is held to. The images are the same at every call: weights and
    activations, hundreds of times larger, are what goes through the cache."""
    device, side = default_device(), networks.KINDS[kind][1]
    plain = networks.plain(kind, device)
    noisy = rse_fast.convert(copy.deepcopy(plain), *SIGMAS)
    eager = peers.eager_rse(plain, *SIGMAS)
    x = networks.images(batch, side, device)
    reference = Reference(plain, x, draws)
    low, last = has_bfloat16(device), dict(memory_format=torch.channels_last)

    def ours(dtype, algorithm="auto"):
        rounding = ROUNDING if dtype == "float32" else reference.rounding
        check_exact(rse_fast.Ensemble(noisy, min(draws, 4), dtype=dtype), noisy, x[:4], rounding)
        ensemble = rse_fast.Ensemble(noisy, draws, dtype=dtype, algorithm=algorithm)
        return lambda: ensemble.predict(x).probs

    def limit(dtype, chunk):
        model, cast = peers.deterministic(plain, dtype), x.to(dtype, **last)
        return lambda: peers.chunked(model, cast, draws, CHUNK[device.type] if chunk else batch * draws)

    def autocast(run):
        def low_precision():
            with torch.autocast(device.type, torch.bfloat16):
                return run()

        return low_precision

    def bound(build, *arguments, **options):
        run = build(*arguments, **options)
        return lambda: run(x, draws)

    dtypes = {"float32": torch.float32, **({"bfloat16": torch.bfloat16} if low else {})}
    builders = {"rse_fast": lambda: ours("auto")}
    if which != "few":
        for dtype in dtypes if device.type == "cpu" else ["float32"] if low else []:
            builders[f"rse_fast {dtype}"] = lambda dtype=dtype: ours(dtype)
        for dtype in dtypes if device.type == "cpu" else []:
            builders[f"rse_fast {dtype}, {DIRECT}"] = lambda dtype=dtype: ours(dtype, "direct")
    builders["eager loop"] = lambda: lambda: peers.loop(eager, x, draws)
    builders["eager packed"] = lambda: lambda: peers.packed(eager, x, draws)
    if which != "few" and low:
        builders["eager loop, bfloat16 autocast"] = lambda: autocast(lambda: peers.loop(eager, x, draws))
        builders["eager packed, bfloat16 autocast"] = lambda: autocast(lambda: peers.packed(eager, x, draws))
    searched = ["max-autotune"] if which == "all" and device.type == "cuda" else []
    for mode in ["default", *searched] if which in ("compiled", "all") else []:
        name = f"torch.compile {mode}".removesuffix(" default")
        builders[f"{name} loop"] = lambda mode=mode: bound(peers.compiled, eager, packs=False, mode=mode)
        builders[f"{name} packed"] = lambda mode=mode: bound(peers.compiled, eager, packs=True, mode=mode)
        if low:
            builders[f"{name} packed, bfloat16 autocast"] = lambda mode=mode: autocast(bound(peers.compiled, eager, packs=True, mode=mode))
    if which == "all":
        builders["torch.vmap"] = lambda: lambda: peers.vmap(eager, x, draws)
        builders["pytorch-rse in a loop"] = lambda: bound(peers.pytorch_rse, plain, *SIGMAS)
        builders["baal ModelWrapper"] = lambda: bound(peers.baal, eager)
    for name, dtype in dtypes.items():
        builders[f"plain network, packed {name} (limit)"] = functools.partial(limit, dtype, False)
        if which != "few":
            builders[f"plain network, packed {name} in chunks (limit)"] = functools.partial(limit, dtype, True)
    case = case_name(kind, batch, draws)
    rows, rates = compare("ensemble", case, "images", "images/s", batch, builders, reference.check, seconds=2.5, rounds=15, least=3)
    if which == "few":
        return rows, []
    if selected("rse_fast"):
        shares = time_shares(rse_fast.Ensemble(noisy, draws, cuda_graphs=False), x)  # a graph does not say which operator a kernel is of
        rows += [Row("ensemble", case, "rse_fast", f"time in {what}", "", *[share] * 3) for what, share in shares.items()]
    return rows, targets(device, kind, batch, draws, case, rates)


# Most time of ten float32 draws over the plain network's packed float32 forward.
WINOGRAD = {("VGG16", 16): 0.6, ("VGG16", 1): 0.75, ("SmallNet", 16): 0.75, ("ResNet-14", 16): 0.75, ("ResNet-50", 1): 0.95}


def winograd_targets(device, kind, batch, draws, case, rates) -> list[dict]:
    """What the choice of the convolutions' algorithm is held to, on CPUs."""
    if device.type != "cpu" or draws != 10 or (kind, batch) not in WINOGRAD:
        return []
    plain = [rate for name, rate in rates.items() if name.startswith("plain network, packed float32") and rate is not None]
    cost = ratio(max(plain, default=None), rates.get("rse_fast float32"))
    what, most = "float32, time over the plain network's packed forward", WINOGRAD[kind, batch]
    found = [target("ensemble", case, what, cost, most, "x", at_most=True)]
    if (kind, batch) == ("VGG16", 16):
        if "rse_fast bfloat16" in rates:
            gain = ratio(rates["rse_fast bfloat16"], rates[f"rse_fast bfloat16, {DIRECT}"])
            found.append(target("ensemble", case, f"bfloat16, against {DIRECT}", gain, 1.2, "x"))
        peers = {name: rate for name, rate in rates.items() if "bfloat16" not in name}
        gain = ratio(rates.get("rse_fast float32"), best_peer(peers))
        found.append(target("ensemble", case, "float32, against the best float32 peer", gain, 2.8, "x"))
    return found


def time_shares(ensemble, x, calls: int = 3) -> dict[str, float]:
    """Where the time of ``predict`` goes, as shares that sum to 1: of the calling thread on a CPU, of the device on a GPU."""
    ensemble.predict(x)
    activity = torch.profiler.ProfilerActivity
    shares = {"convolutions and linear layers": 0.0, "noise and what is fused into it": 0.0, "everything else": 0.0}
    products, noise, rest = shares
    own = {products: 0.0}  # of the C++ convolutions, which torch's profiler does not see; noise is an op while a profile is made
    with timed(winograd, "convolution", own, products):
        with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if x.is_cuda else [])]) as profile:
            begin = time.perf_counter()
            for _ in range(calls):
                ensemble.predict(x)
            whole = (time.perf_counter() - begin) * 1e6

    def kind(operator):
        if operator.startswith("rse_fast::"):
            return noise
        return products if "convolution" in operator or operator in ("aten::mm", "aten::addmm") else rest

    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:  # an operator; it has the time of the GPU kernels that it launched
            shares[kind(event.key)] += event.self_device_time_total if x.is_cuda else event.self_cpu_time_total
    for what, seconds in own.items():
        shares[what] += seconds * 1e6
    if not x.is_cuda:
        shares[rest] = max(0.0, whole - shares[products] - shares[noise])
    total = sum(shares.values())
    return {what: time_of / total for what, time_of in shares.items()}


@contextlib.contextmanager
def timed(module, name: str, seconds: dict[str, float], what: str):
    """Adds the time of each call of a function of ``module`` to ``seconds[what]``."""
    function = getattr(module, name)

    def call(*arguments, **options):
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[what] += time.perf_counter() - begin

    setattr(module, name, call)
    try:
        yield
    finally:
        setattr(module, name, function)


def targets(device, kind, batch, draws, case, rates) -> list[dict]:
    ours, loop = rates["rse_fast"], rates["eager loop"]
    bounds = [rate for name, rate in rates.items() if name.endswith("(limit)") and rate is not None]
    cost = ratio(max(bounds, default=None), ours)
    compiled = [rate for name, rate in rates.items() if name.startswith("torch.compile") and rate is not None]
    of_algorithms = winograd_targets(device, kind, batch, draws, case, rates)
    if device.type == "cpu" and kind == "VGG16":
        if batch == 1:
            return [
                *of_algorithms,
                target("ensemble", case, "rate", ours, 90, "images/s"),
                target("ensemble", case, "against the eager loop", ratio(ours, loop), 6, "x"),
            ]
        return [
            *of_algorithms,
            target("ensemble", case, "rate", ours, 110, "images/s"),
            target("ensemble", case, "against the best peer", ratio(ours, best_peer(rates)), 2.6, "x"),
            target("ensemble", case, "cost over the plain network's packed forward", cost, 1.05, "x", at_most=True),
        ]
    if device.type == "cuda" and kind in ("VGG16", "ResNet-50"):
        if batch <= 8:
            return [target("ensemble", case, "against the eager loop", ratio(ours, loop), 10, "x")]
        return [
            target("ensemble", case, "cost over the plain network's packed forward", cost, 1.03, "x", at_most=True),
            target("ensemble", case, "against torch.compile", ratio(ours, max(compiled, default=None)), 1.3, "x"),
            target("ensemble", case, "against the eager loop", ratio(ours, loop), 3, "x"),
        ]
    return of_algorithms


def case_name(kind: str, batch: int, draws: int) -> str:
    side = networks.KINDS[kind][1]
    return f"{kind} {side}x{side} B={batch} n={draws}"


def cases() -> dict:
    return {case_name(*case[:3]): functools.partial(measure, *case) for case in CASES[default_device().type]}
