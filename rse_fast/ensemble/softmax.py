"""Softmax of logits that may be infinite, and the log of its mean over draws: value and gradient are the limits of large numbers.

A head that masks classes gives -inf, and float16 overflows to inf. Torch's own formulas then meet inf - inf, and the gradient is NaN
although the value is right. Here an infinite logit stands for a number M (or -M) that grows without bound, the same M everywhere. A
log-probability is then ``order * M + level``: order 0 for the largest logits of a row, below 0 for those that vanish beside them, and a
level that is finite. NaN stays NaN, and makes its whole row NaN.
"""

import math

import torch

_VANISHING = 104.0  # exp(-104) is 0 in float32


class _Level(torch.autograd.Function):
    """Logits with 0 in place of infinite ones. The gradient goes through as it is: a number that grows still has one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits):
        return logits.masked_fill(logits.isinf(), 0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def jvp(ctx, t):
        return t


def _parts(logits):
    """(order, level) of the log-softmax of float logits [..., K]."""
    order = logits.isposinf().to(torch.int8) - logits.isneginf().to(torch.int8)
    order = order - order.amax(-1, keepdim=True)
    order = order.masked_fill(logits.isnan().any(-1, keepdim=True), 0)
    level = _Level.apply(logits)
    largest = level.masked_fill(order < 0, -math.inf)
    return order, torch.where(order < 0, level - largest.logsumexp(-1, keepdim=True), largest.log_softmax(-1))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """The log-softmax of float logits [..., K], which may be infinite; -inf where the probability is 0. For values, without gradient."""
    order, level = _parts(logits)
    return level.masked_fill(order < 0, -math.inf)


def votes(scores: torch.Tensor) -> torch.Tensor:
    """int64 [..., K]: 1 for the class with the largest of the scores [..., K]; none where one of them is NaN."""
    top = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])
    return top.masked_fill_(scores.isnan().any(-1, keepdim=True), 0)


def contending(logits: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both of two logits [N, K, ...], float64, with 0 for each class that has probability 0 in every row.

    The size of a class that is masked by -inf or -1e4 would hide how the others differ.
    """
    both = torch.stack([logits, others]).double()
    if logits.dim() < 2 or not logits.numel():  # what a model returns in the place of logits
        return both[0], both[1]
    top = both.masked_fill(both.isnan(), -math.inf).amax(2, keepdim=True)
    vanishing = (top - both > _VANISHING).all(1, keepdim=True).all(0)
    logits, others = both.masked_fill(vanishing, 0)
    return logits, others


def distance(values: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the difference, norm of ``values``): what both have, infinite or NaN, is no difference; NaN from a number is NaN."""
    same = (values == others) | (values.isnan() & others.isnan())
    return (values - others).masked_fill(same, 0).norm(), values.masked_fill(~values.isfinite(), 0).norm()


class LogSumOfDraws:
    """log(sum over draws of softmax(logits)), draws being added in any portions: differentiable, in the memory of one draw.

    logits: float [draws, images, K].
    """

    def __init__(self, logits: torch.Tensor):
        self._order, self._level = self._sum(*_parts(logits))

    def add(self, logits: torch.Tensor) -> None:
        """Adds more draws of the same images."""
        order, level = self._sum(*_parts(logits))
        self._order, self._level = self._sum(torch.stack([self._order, order]), torch.stack([self._level, level]))

    def value(self) -> torch.Tensor:
        """The sum's logarithm [images, K]; -inf where the class has probability 0 in every draw."""
        return torch.where(self._order < 0, self._level - math.inf, self._level)

    @staticmethod
    def _sum(order, level):
        most = order.amax(0)
        return most, level.masked_fill(order < most, -math.inf).logsumexp(0)
