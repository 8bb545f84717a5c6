"""Adapters of foolbox and pyautoattack: one function a method, from images and labels to candidates for adversarial images.

An attack on a random classifier keeps what one lucky query called adversarial. So an adapter gives candidates, what the library returns
and where its search ended, and `run` picks, image by image, the one whose true class is furthest behind another, or least ahead of it, in
draws of their own; for an attack that looks for the closest image, the closest that is wrong in these draws.
The libraries' own verdicts are kept beside (`Found.verdict`); no figure is made of them alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rse_fast.ensemble.runner import seeded
from rse_fast.evaluate.protocols import Case
from rse_fast.evaluate.target import Answer, Queries, derive


@dataclass(frozen=True)
class Found:
    """images float32 [B, ...] in [0, 1]; verdict bool [B]: what the library itself counts as adversarial; queries: images asked about;
    parts: of an attack that is several, the images that each of them would have found alone."""

    images: Tensor
    verdict: Tensor
    queries: int
    parts: dict[str, Tensor]


def run(case: Case, queries: Queries, select: Callable[[Tensor], Answer], x: Tensor, y: Tensor, seed: int) -> Found:
    """Attacks images x [B, C, H, W] float32 in [0, 1] with labels y int64 [B].

    select: answers to candidates, in draws that neither the attack nor the scoring uses. seed: of the library's own random choices.
    torch's global generators are left as they were.
    """
    if case.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {case.method!r}")
    queries.about(x, y)
    parts, candidates, verdict = [], [], torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for restart in range(case.restarts):
        with seeded(derive(seed, restart), x.device):
            found, lucky = METHODS[case.method](case, queries, x, y)
        for part, images in found.items() if isinstance(found, dict) else [("", found)]:
            parts += [part] * len(images)
            candidates += [_sendable(image.detach().to(torch.float32), x, queries) for image in images]
        verdict |= lucky
    for images in candidates:
        _check(case, images, x)
    if len(candidates) == 1:
        return Found(candidates[0], verdict, queries.images, {})
    answers = [select(images) for images in candidates]
    rank = torch.stack([lead(answer.probs, y) for answer in answers])
    if case.method == "cw":
        l2 = torch.stack([(images - x).flatten(1).norm(dim=-1) for images in candidates])
        rank = torch.where(torch.stack([answer.labels for answer in answers]) != y, l2, l2.max() + 1 + rank)
    best = {}
    for part in dict.fromkeys(["", *parts]):
        others = torch.tensor([part not in ("", other) for other in parts], device=x.device)
        choice = rank.masked_fill(others[:, None], float("inf")).argmin(0)
        best[part] = torch.stack(candidates)[choice, torch.arange(len(x), device=x.device)]
    return Found(best.pop(""), verdict, queries.images, best)


def lead(probs: Tensor, y: Tensor) -> Tensor:
    """How far the probability of class y [B] is above that of the best other class, [B]: below 0 where an image is wrong. probs [B, K]."""
    return probs.gather(-1, y[:, None])[:, 0] - probs.scatter(-1, y[:, None], -1.0).amax(-1)


def _sendable(images, x, queries):
    """Puts the original in place of an image with NaN pixels, which come from NaN gradients and which no attacker can send. The share of
    such gradients is a check of the report."""
    if not queries.gradients or not queries.gradients["nan"]:
        return images
    return torch.where(images.isnan().flatten(1).any(1).view(-1, *[1] * (x.dim() - 1)), x, images)


def _check(case, images, x):
    """Raises RuntimeError where a library left its ball, which would flatter it, or [0, 1], where no attacker can send its images."""
    distance = (images - x).flatten(1)
    norms = distance.abs().amax(-1) if case.norm == "Linf" else distance.norm(dim=-1)
    if case.eps is not None and not bool((norms <= case.eps * (1 + 1e-5) + 1e-6).all()):
        raise RuntimeError(f"the attack {case.name} left its ball: {case.norm} {norms.max().item():.6g} > {case.eps:.6g}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise RuntimeError(f"the attack {case.name} left the range of pixels [0, 1], or gave NaN")


def _clean(case, queries, x, y):
    return [x], torch.zeros(len(x), dtype=torch.bool, device=x.device)


def _foolbox(attack, queries, x, y, eps):
    import foolbox

    model = foolbox.PyTorchModel(queries, bounds=(0, 1), device=x.device)
    raw, clipped, verdict = attack(model, x, y, epsilons=eps)
    return (raw if eps is None else clipped), verdict


def _noise(case, queries, x, y):
    from foolbox import attacks

    kind = {"Linf": attacks.LinfAdditiveUniformNoiseAttack, "L2": attacks.L2AdditiveUniformNoiseAttack}[case.norm]
    images, verdict = _foolbox(kind(), queries, x, y, case.eps)
    return [images], verdict


def _fgsm(case, queries, x, y):
    from foolbox import attacks

    kind = {"Linf": attacks.LinfFastGradientAttack, "L2": attacks.L2FastGradientAttack}[case.norm]
    images, verdict = _foolbox(kind(), queries, x, y, case.eps)
    return [images], verdict


def _pgd(case, queries, x, y):
    from foolbox import attacks

    kind = {"Linf": attacks.LinfProjectedGradientDescentAttack, "L2": attacks.L2ProjectedGradientDescentAttack}[case.norm]
    images, verdict = _foolbox(kind(rel_stepsize=2.5 / case.steps, steps=case.steps), queries, x, y, case.eps)
    return [images], verdict


def _momentum(case, queries, x, y):
    from foolbox import attacks

    kinds = {"Linf": attacks.LinfMomentumIterativeFastGradientMethod, "L2": attacks.L2MomentumIterativeFastGradientMethod}
    attack = kinds[case.norm](rel_stepsize=2.5 / case.steps, steps=case.steps, random_start=True)
    images, verdict = _foolbox(attack, queries, x, y, case.eps)
    return [images], verdict


def _carlini_wagner(case, queries, x, y, **options):
    """(the closest image that one query called adversarial, or the last one where none was; the last one; whether there was one).

    abort_early is off: it stops where a noisy loss happens not to fall.
    """
    import foolbox

    attack = foolbox.attacks.L2CarliniWagnerAttack(steps=case.steps, abort_early=False, **options)
    closest = attack.run(foolbox.PyTorchModel(queries, bounds=(0, 1), device=x.device), x, y)
    last = queries.last.clamp(0, 1)
    found = closest.flatten(1).any(-1)  # foolbox gives zeros where it found nothing
    return torch.where(found.view(-1, *[1] * (x.dim() - 1)), closest, last), last, found


def _cw(case, queries, x, y):
    # One lucky query in a thousand flags an image that is almost never misclassified. With a margin to keep, most queries are wrong.
    margins = MARGINS if queries.random else MARGINS[:1]
    found = [_carlini_wagner(case, queries, x, y, binary_search_steps=6, stepsize=0.01, initial_const=0.1, confidence=m) for m in margins]
    return [closest for closest, _, _ in found], torch.stack([verdict for _, _, verdict in found]).any(0)


def _cw_c(case, queries, x, y):
    closest, last, found = _carlini_wagner(case, queries, x, y, binary_search_steps=1, stepsize=1e-3, initial_const=case.c, confidence=0)
    return [closest, last], found


def _apgd(case, queries, x, y):
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(
        queries, n_iter=case.steps, norm=case.norm, n_restarts=1, eps=case.eps, loss=case.method.removeprefix("apgd-"), eot_iter=1,
        device=x.device,
    )  # fmt: skip
    # Attacks every image, also those that one query found wrong before, and keeps the largest loss rather than the first lucky query.
    images = attack.perturb(x, y, best_loss=True)
    with torch.no_grad():
        return [images, queries.last], queries(images).argmax(-1) != y


def _square(case, queries, x, y):
    from pyautoattack.square import SquareAttack

    options = {"norm": case.norm, "n_queries": case.steps, "eps": case.eps, "n_restarts": 1, "seed": _seed(), "device": x.device}
    with torch.no_grad():
        if not queries.random:
            images = SquareAttack(queries, **options).perturb(x, y)
            return [images], (images != x).flatten(1).any(-1)
        # One lucky query would end the search for an image, and without one the original would come back. So the true class is put ahead
        # by more than a query can take from it: every query is spent, and where the search ended counts.
        ahead = torch.zeros_like(queries(x)).scatter_(1, y[:, None], 2 * _LEAST)
        attack = SquareAttack(lambda images: queries(images).clamp_min(-_LEAST) + ahead, **options)
        attack.init_hyperparam(x)
        _, images = attack.attack_single_run(x, y)
        return [images], queries(images).argmax(-1) != y


def _autoattack(case, queries, x, y):
    from pyautoattack import AutoAttack

    version = "rand" if queries.random else "standard"
    attack = AutoAttack(queries, norm=case.norm, eps=case.eps, seed=_seed(), version=version, device=x.device)
    attack.apgd.eot_iter = 1  # the draws are packed inside each query
    attack.fab.n_iter = case.steps  # 100 are the version's own
    for apgd in (attack.apgd, attack.apgd_targeted):
        apgd.n_iter = case.steps
        # When steps are halved: the constructor has derived it from its own number of steps.
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (max(1, int(share * case.steps)) for share in (0.22, 0.06, 0.03))
    attack.square.n_queries = 50 * case.steps
    with torch.no_grad():
        classes = queries(x[:1]).shape[1]
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
    attack.attacks_to_run = [name for name in attack.attacks_to_run if classes >= CLASSES.get(name, 2)]
    if not queries.random:
        images, answers = attack.run_standard_evaluation(x, y, batch_size=len(x))
        return [images], answers != y
    # The attacks of the version, on every image and for the largest loss. Run by the library they pass over an image that one query found
    # wrong, and give the original where no query was: scored again, both would flatter the defence.
    candidates = {}
    for name in attack.attacks_to_run:
        attack.apgd.loss = name.removeprefix("apgd-")
        candidates[name] = [attack.apgd.perturb(x, y, best_loss=True), queries.last]
    with torch.no_grad():
        wrong = [queries(images).argmax(-1) != y for found in candidates.values() for images in found]
    return candidates, torch.stack(wrong).any(0)


def _seed() -> int:
    """For a library that seeds the generator itself: a number from the generator that `run` has seeded."""
    return int(torch.randint(2**31, ()))


MARGINS = (0.0, 1.0, 2.0, 4.0)  # of log-probabilities
_LEAST = 64.0  # log-probabilities below -64 are all the same to Square
CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # without which the loss of an attack is not defined
METHODS = {
    "clean": _clean, "noise": _noise, "fgsm": _fgsm, "pgd": _pgd, "momentum": _momentum, "cw": _cw, "cw-c": _cw_c, "apgd-ce": _apgd,
    "apgd-dlr": _apgd, "square": _square, "autoattack": _autoattack,
}  # fmt: skip
