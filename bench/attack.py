"""Suite "attack": the gradient of an n-draw ensemble's loss (expectation over transformation), as an attack asks for it at every step.

The peers run one draw after the other: foolbox's wrapper, which averages logits, and n separate backward passes, which average losses.
"""

import copy
import functools

import torch
from torch import nn

import rse_fast
from rse_fast.ensemble.runner import has_bfloat16

from . import networks, peers
from .ensemble import DIRECT
from .measure import Refused, Row, best_peer, compare, default_device, peak_memory, ratio, selected, target
from .networks import SIGMAS

# (network, batch, draws), and the draws at which memory is compared
CASES = {"cpu": (("VGG16", 16, 20), ("SmallNet", 16, 20)), "cuda": (("VGG16", 64, 20), ("ResNet-50", 16, 20))}
MORE_DRAWS = 100


def of_log_probabilities(model, x, y):
    """d (-log p_y) / dx, where the model gives log-probabilities or logits."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(nn.functional.cross_entropy(model(x).float(), y, reduction="sum"), x)[0]


def foolbox_wrapper(model, x, y, draws, weights):
    """foolbox's ExpectationOverTransformationWrapper under its own `value_and_grad`; ``weights``: gradients of the weights are computed
    as well, as happens where nobody switches them off."""
    import eagerpy
    import foolbox

    model = copy.deepcopy(model).requires_grad_(weights)
    wrapped = foolbox.models.ExpectationOverTransformationWrapper(foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), draws)
    y = eagerpy.astensor(y)

    def run():
        model.zero_grad(set_to_none=True)
        _, g = eagerpy.value_and_grad(lambda images: eagerpy.crossentropy(wrapped(images), y).sum(), eagerpy.astensor(x))
        return g.raw

    return run


def separate(model, x, y, draws):
    """The mean of the gradients of ``draws`` noisy passes, as AutoAttack's eot_iter has it."""
    return sum(of_log_probabilities(model, x, y) for _ in range(draws)) / draws


def check_exact(noisy, plain, x, y, draws, dtype) -> None:
    """Raises unless the ensemble's gradient is that of the unfused model's mean softmax, in float32 with the same noise by plain torch.

    The norm of the difference may be 2 %, for rounding moves values across the kinks of ReLU and max-pool, and four times what ``dtype``
    does to the gradient of the network without noise.
    """
    low = peers.deterministic(plain, dtype)
    calm = of_log_probabilities(plain, x, y)
    rounding = (of_log_probabilities(lambda x: low(x.to(dtype)), x, y) - calm).norm() / calm.norm()
    with rse_fast.context.NoiseContext(torch.tensor(3, device=x.device), len(x), draws, backend="torch"):
        want = of_log_probabilities(lambda x: noisy.eval()(x).softmax(-1).unflatten(0, (draws, -1)).mean(0).log(), x, y)
    got = of_log_probabilities(rse_fast.Ensemble(noisy, draws, seed=3, dtype=str(dtype)[6:]), x, y)
    off = (got - want).norm() / want.norm()
    if not off <= 0.02 + 4 * rounding:
        raise Refused(f"its gradient is off by {off:.3g} from that of the unfused model with the same noise")


class Reference:
    """The mean direction of many separate passes. An implementation's gradient must point there, as far as chance allows: on a network
    whose gradient is mostly noise, which one of random weights can be, that is not far."""

    def __init__(self, model, x, y, draws):
        self.mean = separate(model, x, y, 3 * draws)
        cosines = torch.tensor([self.cosine(separate(model, x, y, draws)) for _ in range(5)])
        self.chance = (cosines.mean() - 5 * cosines.std()).item()

    def cosine(self, g):
        return nn.functional.cosine_similarity(g.flatten(1).float(), self.mean.flatten(1)).mean().item()

    def check(self, name, first, second) -> None:
        if not first.isfinite().all() or self.cosine(first) < self.chance:
            raise Refused(f"its gradient's cosine to the reference is {self.cosine(first):.3g}, of separate ones {self.chance:.3g} or more")
        if torch.equal(first, second):
            raise Refused("two calls gave the same noise")


def measure(kind: str, batch: int, draws: int) -> tuple[list[Row], list[dict]]:
    device, side = default_device(), networks.KINDS[kind][1]
    plain = networks.plain(kind, device).requires_grad_(False)
    noisy = rse_fast.convert(copy.deepcopy(plain), *SIGMAS)
    eager = peers.eager_rse(plain, *SIGMAS).to(memory_format=torch.channels_last)
    x = networks.images(batch, side, device)
    y = plain(x).argmax(-1)

    def autocast():
        def run():
            with torch.autocast(device.type, torch.bfloat16):
                return separate(eager, x, y, draws)

        return run

    @functools.cache  # each is built several times
    def checked(dtype):
        real = torch.float32 if dtype == "float32" or not has_bfloat16(device) else torch.bfloat16
        check_exact(noisy, plain, x[:4], y[:4], 5, real)

    def ours(dtype, count=draws, algorithm="auto"):
        checked(dtype)
        ensemble = rse_fast.Ensemble(noisy, count, dtype=dtype, algorithm=algorithm)
        return lambda: of_log_probabilities(ensemble, x, y)

    builders = {
        "rse_fast": lambda: ours("auto"),
        "foolbox wrapper": lambda: foolbox_wrapper(eager, x, y, draws, weights=True),
        "foolbox wrapper, weights frozen": lambda: foolbox_wrapper(eager, x, y, draws, weights=False),
        "separate backward passes": lambda: lambda: separate(eager, x, y, draws),
    }
    if has_bfloat16(device):
        builders["rse_fast float32"] = lambda: ours("float32")
        builders["separate backward passes, bfloat16 autocast"] = autocast
    if device.type == "cpu":
        builders[f"rse_fast, {DIRECT}"] = lambda: ours("auto", algorithm="direct")
        builders[f"rse_fast float32, {DIRECT}"] = lambda: ours("float32", algorithm="direct")
    case = f"{kind} {side}x{side} B={batch} n={draws}"
    reference = Reference(eager, x, y, draws)
    rows, rates = compare("attack", case, "images", "images/s", batch, builders, reference.check, seconds=6, least=3, rounds=15)
    peak = {name: peak_memory(builders[name]()) for name in list(builders)[:4] if selected(name) and rates[name]}
    if selected("rse_fast"):
        peak[f"rse_fast, n={MORE_DRAWS}"] = peak_memory(ours("auto", MORE_DRAWS))
    rows += [Row("attack", case, name, "peak memory", "MB", *[value] * 3) for name, value in peak.items()]
    wanted = [
        target("attack", case, "against foolbox's wrapper", ratio(rates["rse_fast"], rates["foolbox wrapper"]), 2, "x"),
        target("attack", case, "against the fastest peer", ratio(rates["rse_fast"], best_peer(rates)), 1, "x"),
        target("attack", case, f"peak memory, n={MORE_DRAWS} over n={draws}",
               ratio(peak.get(f"rse_fast, n={MORE_DRAWS}"), peak.get("rse_fast")), 1.5, "x", at_most=True),
    ]  # fmt: skip
    if device.type == "cpu" and kind == "VGG16":
        own = rates.get("rse_fast float32", rates["rse_fast"])
        wanted.append(target("attack", case, f"float32, against {DIRECT}", ratio(own, rates[f"rse_fast float32, {DIRECT}"]), 1.5, "x"))
    return rows, wanted


def cases() -> dict:
    return {f"{k} B={b} n={n}": functools.partial(measure, k, b, n) for k, b, n in CASES[default_device().type]}
