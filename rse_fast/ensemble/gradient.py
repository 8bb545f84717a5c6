"""The gradient of an ensemble in bounded memory: which packed batches keep their activations for backward.

The gradient of a mean over draws is the sum of what the packed batches give, so backward runs one batch after the other, the last one
first. The first `KEEP` batches hold their activations until then; a later one holds its images alone, and is run again, with the same
noise, when its turn comes. So memory does not grow with draws or images, and a batch that is run again costs about 3/2 of one that is
kept (two forward passes and one backward, each about the price of the others: no gradient of the weights is needed).
"""

import itertools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from rse_fast.ensemble.watch import Watch

# Packed batches of `plan.SWEET_SPOT` rows. In float32, 4 x 80 rows of VGG16 at 32x32 are 0.8 GB.
KEEP = 4


def run(batch: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, number: int, watch: Watch | None = None) -> torch.Tensor:
    """``batch(x)``, for packed batch ``number`` (from 0) of a call; it must give the same result whenever it is called again.

    watch: of the model, where it may have changed by then: backward raises instead.
    """
    if number < KEEP or not torch.is_grad_enabled():
        return batch(x)
    calls = itertools.count()

    def again(x):
        if next(calls) and watch is not None:
            watch.require()
        return batch(x)

    return checkpoint(again, x, use_reentrant=False)


class FirstDerivative(torch.autograd.Function):
    """x, whose gradient may be differentiated again, but not by ``weights``, of which a fused snapshot holds copies: that is an error."""

    @staticmethod
    def forward(ctx, x, weights):
        ctx.weights = weights
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g + _Refused.apply(*ctx.weights).to(g.dtype) if torch.is_grad_enabled() else g, None


class _Refused(torch.autograd.Function):
    """A zero that has no gradient."""

    @staticmethod
    def forward(ctx, *weights):
        return torch.zeros((), device=weights[0].device)

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError(
            "a fused ensemble has no second derivative by its images and its weights, as a gradient penalty asks for; "
            "Ensemble(..., fuse=False) has one"
        )


class OfWeights(torch.autograd.Function):
    """Adds nothing to a result, and the gradient of the model's weights to backward, where a fused snapshot holds copies of them.

    Backward runs it only if such a gradient is asked for, which the gradient of the images alone does not do.
    """

    @staticmethod
    def forward(ctx, live, watch, result, x, seed, *weights):
        """live: (x, seed) -> the same result as ``result``, by the model that holds ``weights``. watch: of that model, as it was for it."""
        ctx.live, ctx.watch = live, watch
        ctx.save_for_backward(x, seed, *weights)
        return torch.zeros_like(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, seed, *weights = ctx.saved_tensors
        ctx.watch.require()
        with torch.enable_grad():
            result = ctx.live(x, seed)
        if not result.requires_grad:  # of no images
            return None, None, None, None, None, *map(torch.zeros_like, weights)
        return None, None, None, None, None, *torch.autograd.grad(result, weights, g, allow_unused=True)
