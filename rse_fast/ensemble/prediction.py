"""What an ensemble says of images: the statistics of their draws, and the prediction made of them."""

from dataclasses import dataclass

import torch

from rse_fast.ensemble.softmax import votes
from rse_fast.ensemble.temperature import rescale


@dataclass(frozen=True)
class Prediction:
    """What `Ensemble.predict` returns for B images and K classes, all on the device of the images that were given.

    A model that classifies pixels, by logits [N, K, H, W], gives labels, entropy and mutual_information [B, H, W], and probs and votes
    [B, K, H, W].

    An image for which the model gives NaN in any draw has label -1 and NaN probs, and a RuntimeWarning says so at each call
    (``warnings.simplefilter("error", RuntimeWarning)`` makes it an error). Infinite logits count as numbers without bound.

    Attributes:
        labels: int64 [B], argmax of probs; -1 where they are NaN.
        probs: float32 [B, K], mean softmax over the draws, at the ensemble's temperature.
        entropy: float32 [B], of probs, in nats: total uncertainty.
        mutual_information: float32 [B], entropy of the mean softmax minus the mean entropy of the draws, in nats, >= 0: how much the draws
            disagree. The same at every temperature.
        votes: int64 [B, K], how many draws had each class on top; a draw that is NaN has none.
        draws_used: int64 [B], how many draws each image took: fewer than all with early exit.
        seed: the seed that reproduces this prediction, in [0, 2^64).
    """

    labels: torch.Tensor
    probs: torch.Tensor
    entropy: torch.Tensor
    mutual_information: torch.Tensor
    votes: torch.Tensor
    draws_used: torch.Tensor
    seed: int


@dataclass
class DrawStatistics:
    """What the draws of some images add up to, one row an image.

    index int64 [A]; used int64 [A], the draws counted; sums float64 [A, K] of softmax; votes int64 [A, K] of argmax; entropies float64
    [A], the sum of the draws' entropies in nats. Of pixels: sums and votes [A, H, W, K], entropies [A, H, W].
    """

    index: torch.Tensor
    used: torch.Tensor
    sums: torch.Tensor
    votes: torch.Tensor
    entropies: torch.Tensor

    @classmethod
    def empty(cls, index: torch.Tensor, row: tuple[int, ...]) -> "DrawStatistics":
        """Of images without draws; ``row``: shape of an image's logits, the classes last."""

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(index.shape[0], *shape, dtype=dtype, device=index.device)

        counts, real = torch.int64, torch.float64
        return cls(index, zeros(dtype=counts), zeros(*row, dtype=real), zeros(*row, dtype=counts), zeros(*row[:-1], dtype=real))

    def add(self, log_p: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Counts draws given as float32 log-softmax [m, A, ..., K]: all of them, or those where ``counts`` (bool [m, A])."""
        p = log_p.exp()
        entropy = -(p * log_p.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
        vote = votes(log_p)
        if counts is not None:  # a draw that does not count may be NaN
            each = counts.view(*counts.shape, *[1] * (p.dim() - 2))
            p, entropy, vote = p.masked_fill(~each, 0), entropy.masked_fill(~each[..., 0], 0), vote * each
        self.used += len(log_p) if counts is None else counts.sum(0)
        self.sums += p.sum(0, dtype=torch.float64)
        self.votes += vote.sum(0)
        self.entropies += entropy.sum(0, dtype=torch.float64)

    def summary(self, temperature: float = 1.0) -> dict[str, torch.Tensor]:
        """What `Prediction` holds of them, by its names. An image, or a pixel, of NaN has label -1."""
        used = self.used.clamp_min(1)
        mean = self.sums / used.view(-1, *[1] * (self.sums.dim() - 1))
        total = -torch.special.xlogy(mean, mean).sum(-1)
        # No image may be there to tell the number of classes.
        labels = mean.argmax(-1).masked_fill(mean.isnan().any(-1), -1) if mean.shape[-1] else self.index
        probs, entropy = mean, total
        if temperature != 1:  # a softmax that is 0 in float32 counts as the least number that is not
            probs = rescale(mean.clamp_min(2.0**-149).log(), temperature).exp()
            entropy = -torch.special.xlogy(probs, probs).sum(-1)
        return {
            "labels": labels,
            "probs": probs.float().movedim(-1, 1).contiguous(),
            "entropy": entropy.float(),
            "mutual_information": (total - self.entropies / used.view(-1, *[1] * (total.dim() - 1))).clamp_min(0).float(),
            "votes": self.votes.movedim(-1, 1).contiguous(),
            "draws_used": self.used,
        }

    def select(self, rows: torch.Tensor | slice) -> "DrawStatistics":
        """The statistics of some images: ``rows`` is an index or a mask over A, or a slice."""
        return DrawStatistics(*(t[rows] for t in vars(self).values()))

    @staticmethod
    def cat(statistics: list["DrawStatistics"]) -> "DrawStatistics":
        return DrawStatistics(*(torch.cat(ts) for ts in zip(*(vars(t).values() for t in statistics), strict=True)))
