"""Suite "train": a training step with noise against the plain network's (the limit) and against eager noise layers: time and memory."""

import copy
import dataclasses
import functools
import itertools

import torch
from torch import nn

import rse_fast
from rse_fast import functional
from rse_fast.address import NoiseAddress
from rse_fast.kernels import cpu
from rse_fast.layout import layout
from rse_fast.nn import noise_layers
from rse_fast.train.captured import Captured

from . import networks, peers
from .measure import Refused, Row, compare, default_device, peak_memory, ratio, selected, target
from .networks import SIGMAS

# (network, batch)
CASES = {
    "cpu": (("VGG16", 32), ("ResNeXt29", 16), ("SmallNet", 64), ("ResNet-50", 2), ("ResNet-50", 8)),
    "cuda": (("VGG16", 512), ("ResNeXt29", 256), ("ResNet-50", 128)),
}
COMPILED = {"cpu": (("ResNet-14", 32),), "cuda": (("VGG16", 512), ("ResNet-50", 128))}  # steps under torch.compile
LIMIT = " (limit)"
ALONE = "the noise alone" + LIMIT
MOST = {"cpu": (1.10, 1.03), "cuda": (1.05, 1.01)}  # time and peak memory over the plain network's


def saved_bytes(run) -> int:
    """Bytes of the storages that ``run(model)`` saves for backward, each counted once, parameters not. ``run()`` returns the model and
    what holds the graph."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model, graph = run()  # alive until the sum is taken, so that no address comes twice
        for parameter in model.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
        return sum(storage.nbytes() for storage in storages.values())


class Step:
    """A step of SGD with momentum on one batch, channels last, under autocast for a lower ``dtype``. Returns the loss.

    compiled: the network's forward and backward go through torch.compile, the optimiser does not.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, dtype: torch.dtype, compiled: bool = False):
        self.model = copy.deepcopy(model).train().to(memory_format=torch.channels_last)
        self.run = torch.compile(self.model) if compiled else self.model
        self.x, self.dtype = x.contiguous(memory_format=torch.channels_last), dtype
        self.labels = torch.arange(len(x), device=x.device) % 10
        self.optimiser = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)

    def loss(self):
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.dtype != torch.float32):
            return nn.functional.cross_entropy(self.run(self.x), self.labels)

    def __call__(self):
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def saved(self):
        return saved_bytes(lambda: (self.model, self.loss()))


class NoiseAlone:
    """The noise of a step and nothing else: each layer's input plus noise, for forward and again for backward, which has only the seed.

    On a CPU the kernel writes to memory that is already mapped: a step with noise cannot do with less beyond the plain one's time. Returns
    an element of the last result.
    """

    def __init__(self, step: Step):
        self.inputs = []

        def note(layer, args):
            self.inputs.append((args[0].to(step.dtype), layer.current_sigma()))

        hooks = [layer.register_forward_pre_hook(note) for layer in noise_layers(step.model).values()]
        with torch.no_grad():
            step.loss()
        for hook in hooks:
            hook.remove()
        largest = max(x.numel() for x, _ in self.inputs)
        self.out = torch.empty(largest, dtype=step.dtype, device=step.x.device)
        self.seed = torch.tensor(7, device=step.x.device)

    def __call__(self):
        for x, sigma in 2 * self.inputs:
            if x.is_cuda:
                out = functional.add_noise(x, sigma, seed=self.seed)
            else:
                out = self.out[: x.numel()].as_strided(x.shape, x.stride())
                cpu.add_noise(x, out, layout(x) == "flat", sigma, NoiseAddress(self.seed, 0, len(x)), None, None, False)
        return out.flatten()[0]


def ready(name: str, step: Step) -> Step:
    """The step, once its noise is known to be there, or not to be: the same weights give two losses, or one."""
    first, second = step.loss(), step.loss()
    if (first != second) == name.endswith(LIMIT):
        raise Refused(f"two passes with the same weights gave the losses {first:.6g} and {second:.6g}")
    return step


def check(name, first, second) -> None:
    """Raises unless losses are finite."""
    if not (first.isfinite() and second.isfinite()):
        raise Refused(f"its losses are {first:.3g} and {second:.3g}")


def measure(kind: str, batch: int, dtype: torch.dtype) -> tuple[list[Row], list[dict]]:
    """One case: steps/s, bytes saved for backward, and the allocator's peak, for each implementation, and the targets."""
    device, side = default_device(), networks.KINDS[kind][1]
    plain = networks.plain(kind, device)
    x = networks.images(batch, side, device)
    models = _models(plain)
    steps = {name: Step(model, x, dtype) for name, model in models.items()}
    case = f"{kind} {side}x{side} B={batch} {str(dtype)[6:]}"
    builders = {name: lambda name=name, step=step: ready(name, step) for name, step in steps.items()}
    builders[ALONE] = lambda: NoiseAlone(steps["rse_fast"])
    captured = {name: f"{name.removesuffix(LIMIT)}, one CUDA graph{LIMIT * name.endswith(LIMIT)}" for name in models}
    if device.type == "cuda":  # what a step takes when nothing waits for its launches
        builders |= {captured[name]: lambda model=model: _captured(Step(model, x, dtype)) for name, model in models.items()}
    rows, medians = compare("train", case, "steps", "steps/s", 1, builders, check, seconds=5, least=7)
    rows = [_milliseconds(row) if row.implementation == ALONE else row for row in rows]
    saved = {name: step.saved() / 1e6 for name, step in steps.items() if selected(name)}
    peak = {name: peak_memory(step) for name, step in steps.items() if selected(name)}
    rows += [Row("train", case, name, "saved for backward", "MB", *[value] * 3) for name, value in saved.items()]
    rows += [Row("train", case, name, "peak memory", "MB", *[value] * 3) for name, value in peak.items()]
    ours, eager, limit = models
    most_time, most_memory = MOST[device.type]
    in_graphs = all(medians.get(name) for name in captured.values())
    fast_ours, fast_eager, fast_limit = captured.values() if in_graphs else models
    how = " in a CUDA graph" if in_graphs else ""

    def over(what, value, most):
        return target("train", case, f"{what} over the plain network's", value, most, "x", at_most=True)

    wanted = [
        over(f"step time{how}", ratio(medians[fast_limit], medians[fast_ours]), most_time),
        target("train", case, f"against eager noise layers{how}", ratio(medians[fast_ours], medians[fast_eager]), 1.5, "x"),
        over("bytes saved", ratio(saved.get(ours), saved.get(limit)), 1.01),
        over("peak", ratio(peak.get(ours), peak.get(limit)), most_memory),
    ]
    if in_graphs:
        wanted += [
            over("step time, launch by launch", ratio(medians[limit], medians[ours]), most_time),
            target("train", case, "against eager noise layers, launch by launch", ratio(medians[ours], medians[eager]), 1.5, "x"),
        ]
    return rows, wanted


def _models(plain: nn.Module) -> dict[str, nn.Module]:
    return {
        "rse_fast": rse_fast.convert(copy.deepcopy(plain), *SIGMAS),
        "eager noise layers": peers.eager_rse(plain, *SIGMAS),
        "no noise" + LIMIT: plain,
    }


def measure_compiled(kind: str, batch: int, dtype: torch.dtype) -> tuple[list[Row], list[dict]]:
    """One case under torch.compile: steps/s, and bytes saved for backward by the compiled graphs, for each implementation."""
    device, side = default_device(), networks.KINDS[kind][1]
    x = networks.images(batch, side, device)
    torch._dynamo.reset()
    steps = {name: Step(model, x, dtype, compiled=True) for name, model in _models(networks.plain(kind, device)).items()}
    case = f"{kind} {side}x{side} B={batch} {str(dtype)[6:]}, compiled"
    builders = {name: lambda name=name, step=step: ready(name, step) for name, step in steps.items()}
    rows, medians = compare("train", case, "steps", "steps/s", 1, builders, check, seconds=5, least=7)
    saved = {name: step.saved() / 1e6 for name, step in steps.items() if selected(name)}
    rows += [Row("train", case, name, "saved for backward", "MB", *[value] * 3) for name, value in saved.items()]
    ours, eager, limit = steps
    return rows, [
        target("train", case, "step time over the plain network's", ratio(medians[limit], medians[ours]), 1.08, "x", at_most=True),
        target("train", case, "against eager noise layers", ratio(medians[ours], medians[eager]), 2, "x"),
        target("train", case, "bytes saved over the plain network's", ratio(saved.get(ours), saved.get(limit)), 1.01, "x", at_most=True),
    ]


def _captured(step: Step):
    run = Captured(lambda: (step(),))
    for _ in range(4):  # until it is replayed
        run()
    return lambda: run()[0].clone()  # the next call overwrites it


def _milliseconds(row: Row) -> Row:
    """The noise alone is no rival whose steps/s could be compared: a row of its own, in milliseconds a step."""
    times = {name: value and 1e3 / value for name, value in (("p20", row.p80), ("p50", row.p50), ("p80", row.p20))}
    return dataclasses.replace(row, metric="time of the noise alone", unit="ms", **times)


def cases() -> dict:
    dtypes, kind_of_device = (torch.float32, torch.bfloat16), default_device().type
    eager = itertools.product(((measure, "", *case) for case in CASES[kind_of_device]), dtypes)
    compiled = itertools.product(((measure_compiled, ", compiled", *case) for case in COMPILED[kind_of_device]), dtypes)
    return {
        f"{kind} B={batch} {str(dtype)[6:]}{how}": functools.partial(run, kind, batch, dtype)
        for (run, how, kind, batch), dtype in (*eager, *compiled)
    }
