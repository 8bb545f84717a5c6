"""The classifier under attack: what is deployed, what an attack may query, and which noise each of them gets.

Every seed is derived from the evaluation's master seed and a path of words, so attack, selection and scoring have streams of their own,
and a batch that is done again after an interrupt gives the same rows.
"""

import copy
import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rse_fast.ensemble import Ensemble
from rse_fast.nn import noise_layers
from rse_fast.outputs import Choice, take


def derive(master: int, *path) -> int:
    """A seed in [0, 2^63) for the use that ``path`` (words and numbers) names; different paths give independent seeds."""
    digest = hashlib.sha256(repr((master, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Plain(nn.Module):
    """A deterministic network as a classifier: the log of its softmax, always in eval mode."""

    def __init__(self, model: nn.Module, logits: Choice = None):
        super().__init__()
        self.model, self.logits = model.eval(), logits

    def train(self, mode: bool = True):
        return self  # whatever an attack calls

    def forward(self, x: Tensor) -> Tensor:
        return take(self.model(x), self.logits).float().log_softmax(-1)


class MeanLogits(nn.Module):
    """The log of the softmax of the mean logits of ``draws`` passes, where an ensemble takes the mean softmax. For an attack's gradient."""

    def __init__(self, ensemble: Ensemble, draws: int):
        super().__init__()
        self.ensemble, self.draws = ensemble, draws

    def forward(self, x: Tensor) -> Tensor:
        passes = self.ensemble(x.repeat(self.draws, *[1] * (x.dim() - 1)))  # one draw of each row: its logits, but for a constant
        return passes.unflatten(0, (self.draws, len(x))).mean(0).log_softmax(-1)


class Target:
    """A network and the classifier that is made of it.

    model: with noisy layers it is deployed as an `Ensemble` of ``draws``, without as it is. plain: another network, to transfer from.
    logits: where they are in what the model returns; in the plain network's output they are found by themselves.
    """

    def __init__(
        self, model: nn.Module, draws: int, *, plain: nn.Module | None = None, dtype: str = "auto", logits: Choice = None
    ):  # fmt: skip
        self.model, self.dtype, self.plain, self.logits = model.eval().requires_grad_(False), dtype, plain, logits
        self.draws = draws if noise_layers(model) else 0
        self._made = {}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def classifier(self, kind: str, draws: int = 1) -> nn.Module:
        """ "deployed" in ``draws`` draws; "mean-logits" of as many; "noise-off"; "plain"; one module for each."""
        key = kind, draws if kind in ("deployed", "mean-logits") and self.draws else 1
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def _make(self, kind, draws):
        if kind == "plain":
            if self.plain is None:
                raise ValueError("plain: this evaluation has no plain network to transfer from")
            return Plain(self.plain.requires_grad_(False))
        if not self.draws:
            return Plain(self.model, self.logits)
        if kind == "mean-logits":
            return MeanLogits(self._make("deployed", 1), draws)
        model = self.model
        if kind == "noise-off":
            model = copy.deepcopy(model)
            for layer in noise_layers(model).values():
                layer.noise_enabled = False
        # One algorithm, whatever is the fastest here and now: attacks amplify rounding, and a run that continues shall find what it did.
        return Ensemble(model, draws, dtype=self.dtype, algorithm="direct", logits=self.logits)

    def queries(self, case, seed: int) -> "Queries":
        """What the attack of a case may ask."""
        kind = {"fixed-draw": "deployed"}.get(case.source, case.source)
        if case.victim == "noise-off":
            kind = "noise-off"
        fixed = case.source == "fixed-draw" or case.victim == "fixed-seed"
        return Queries(self.classifier(kind, 1 if case.source == "fixed-draw" else case.eot), seed, fixed)

    def answer(self, victim: str, x: Tensor, seed: int, image_offset: int, draws: int | None = None) -> "Answer":
        """What the victim says to images x [B, ...]: one query of the classifier as it is deployed, or of one with other ``draws``."""
        classifier = self.classifier("noise-off" if victim == "noise-off" else "deployed", draws or self.draws)
        if isinstance(classifier, Ensemble):
            prediction = classifier.predict(x, seed=seed, image_offset=image_offset)
            return Answer(prediction.labels, prediction.probs)
        with torch.no_grad():
            probs = classifier(x).exp()
        return Answer(probs.argmax(-1).masked_fill(probs.isnan().any(-1), -1), probs)


@dataclass(frozen=True)
class Answer:
    """labels int64 [B], -1 where the classifier gave NaN; probs float32 [B, K]."""

    labels: Tensor
    probs: Tensor


class Queries(nn.Module):
    """A classifier that gives every query fresh noise (unless ``fixed``), counts the images asked about, and remembers the last ones.

    The noise comes from derived seeds alone: an attack that seeds torch's generators, or switches modes, changes nothing of it.
    It watches the gradients that attacks get: see `gradients`. Of an image that is classified with confidence the gradient of a loss may be
    smaller than the least number of a low precision, so it goes back through the network at another scale.
    """

    def __init__(self, classifier: nn.Module, seed: int, fixed: bool = False):
        super().__init__()
        self.classifier, self.seed, self.fixed = classifier, seed, fixed
        self.calls = self.images = 0
        self.last: Tensor | None = None
        self._gradients, self._broken, self._right, self._zero = 0, 0, 0, 0
        self._truth: tuple[Tensor, Tensor] | None = None
        self.eval()

    def about(self, x: Tensor, y: Tensor) -> None:
        """Tells what is attacked: images x [B, ...] and their labels y [B]."""
        self._truth = x.flatten(1), y

    @property
    def random(self) -> bool:
        return self._ensemble is not None and not self.fixed

    @property
    def _ensemble(self) -> Ensemble | None:
        """Which draws the noise."""
        found = self.classifier.ensemble if isinstance(self.classifier, MeanLogits) else self.classifier
        return found if isinstance(found, Ensemble) else None

    def forward(self, x: Tensor) -> Tensor:
        if self._ensemble is not None:
            self._ensemble.seed = self.seed if self.fixed else derive(self.seed, self.calls)
        self.calls += 1
        self.images += len(x)
        self.last = x.detach()
        if not (x.requires_grad and torch.is_grad_enabled()):
            return self.classifier(x)
        x = x.view_as(x)
        logits = self.classifier(x)
        if logits.requires_grad:
            scale = _Scale()
            logits.register_hook(scale.take)
            x.register_hook(scale.give)
        x.register_hook(functools.partial(self._note, self._still_right(x.detach(), logits.detach())))
        return logits

    def _still_right(self, x, logits) -> Tensor | bool:
        """Whether each image is classified as it should be, [B]; True where nobody has said what is attacked."""
        if self._truth is None:
            return True
        images, labels = self._truth
        if len(x) != len(images):  # an attack asks about some of them: those that they are closest to
            labels = labels[torch.cdist(x.flatten(1), images).argmin(1)]
        return logits.argmax(-1) == labels

    def _note(self, right, gradient):
        flat = gradient.detach().flatten(1)
        self._gradients += len(flat)
        self._broken += (~flat.isfinite()).any(1).sum()  # tensors: no step of an attack waits for a device
        # A loss may well have no slope once it has its aim: DLR where the true class is third, C&W beyond its margin.
        self._right += (torch.ones_like(flat[:, 0], dtype=torch.bool) & right).sum()
        self._zero += ((flat == 0).all(1) & right).sum()

    @property
    def gradients(self) -> dict[str, float] | None:
        """Of the images' gradients that an attack got, the shares "nan" (or infinite), "right" (where the image was still classified right)
        and "zero" (exactly, and still right); None if it got none."""
        if not self._gradients:
            return None
        counts = {"nan": self._broken, "right": self._right, "zero": self._zero}
        return {kind: float(count) / self._gradients for kind, count in counts.items()}


class _Scale:
    """Brings the gradient of each image's logits to a size near 1 on its way back, and to what it was at the image. By powers of two, so
    that only what would have vanished, or overflowed, becomes another number."""

    def take(self, gradient: Tensor) -> Tensor:
        size = gradient.abs().amax(-1)
        _, exponent = torch.frexp(size)
        self._exponent = exponent.masked_fill(~(size.isfinite() & (size > 0)), 0).clamp(-100, 100)
        return torch.ldexp(gradient, -self._exponent[:, None])

    def give(self, gradient: Tensor) -> Tensor:
        return torch.ldexp(gradient, self._exponent.view(-1, *[1] * (gradient.dim() - 1)))
