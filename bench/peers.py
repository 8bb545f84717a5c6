"""What a user would run instead, installed and run: each builder takes a plain network and gives a callable for one batch.

Every callable returns the mean softmax [B, K] of ``draws`` noisy passes, on fresh noise at each call.
"""

import copy

import torch
from torch import nn

from rse_fast.ensemble import fuse


def eager_noise(x, sigma):
    return x + sigma * torch.randn_like(x)


class EagerNoisyConv2d(nn.Conv2d):
    """A type of its own: torch.compile does not look at hooks when it decides whether a graph of another model will do."""

    sigma: float

    def forward(self, x):
        return super().forward(eager_noise(x, self.sigma))


def eager_rse(model: nn.Module, init_sigma: float, inner_sigma: float) -> nn.Module:
    """A copy of a plain model with eager noise in front of every convolution."""
    model = copy.deepcopy(model).eval()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for i, conv in enumerate(convolutions):
        if sigma := init_sigma if i == 0 else inner_sigma:
            conv.__class__, conv.sigma = EagerNoisyConv2d, sigma
    return model


@torch.no_grad()
def loop(model, x, draws):
    """Mean softmax of ``draws`` passes, one after the other."""
    return sum(model(x).float().softmax(-1) for _ in range(draws)) / draws


@torch.no_grad()
def packed(model, x, draws):
    """Mean softmax of ``draws`` passes packed into the batch."""
    return model(x.repeat(draws, 1, 1, 1)).float().softmax(-1).view(draws, len(x), -1).mean(0)


@torch.no_grad()
def chunked(model, x, draws, rows):
    """`packed`, at most ``rows`` rows at a time: on a CPU the activations of one large batch leave the cache."""
    parts = [packed(model, part, draws) for part in x.split(max(1, rows // draws))]
    return torch.cat(parts)


def vmap(model, x, draws):
    """``torch.vmap`` over the draws, each with noise of its own."""
    with torch.no_grad():
        one = lambda _: model(x).float().softmax(-1)  # noqa: E731
        return torch.vmap(one, randomness="different")(torch.arange(draws, device=x.device)).mean(0)


def compiled(model: nn.Module, packs: bool, **options):
    """The eager network under torch.compile, in a loop or packed; ``options`` are torch.compile's."""
    torch._dynamo.reset()
    run = torch.compile(model, **options)
    return lambda x, draws: (packed if packs else loop)(run, x, draws)


def pytorch_rse(model: nn.Module, init_sigma: float, inner_sigma: float):
    """The package pytorch-rse in a loop: it wraps the layers and has no ensemble."""
    from pytorch_rse import RSE

    wrapped = RSE(copy.deepcopy(model), std_devs=(init_sigma, inner_sigma)).eval()
    return lambda x, draws: loop(wrapped, x, draws)


def pytorch_rse_layer(sigma: float, inputs):
    from pytorch_rse.rse import AddGaussianNoise

    layer = AddGaussianNoise(sigma)
    return lambda: layer(next(inputs))


def baal(model: nn.Module):
    """baal's Monte-Carlo wrapper around the eager network: it packs the draws into the batch by itself."""
    from baal.modelwrapper import ModelWrapper, TrainingArgs

    wrapper = ModelWrapper(model, TrainingArgs(use_cuda=next(model.parameters()).is_cuda))
    return lambda x, draws: wrapper.predict_on_batch(x, draws).float().softmax(1).mean(-1)


def smoothing_loop(model: nn.Module, sigma: float, classes: int, batch: int = 400):
    """The certificate as the authors of randomized smoothing sample it (Cohen et al. 2019), written from its description.

    One image at a time, its copies in batches of ``batch`` with fresh noise, votes counted in Python. Returns
    ``certify(x, n0, n, alpha) -> (label or -1, radius)`` for one image x [C, H, W].
    """
    from scipy.stats import norm
    from statsmodels.stats.proportion import proportion_confint

    @torch.no_grad()
    def votes(x, n):
        counts = [0] * classes
        while n > 0:
            rows = x.repeat((min(batch, n), 1, 1, 1))
            n -= len(rows)
            for label in model(rows + torch.randn_like(rows) * sigma).argmax(1).cpu().numpy():
                counts[label] += 1
        return counts

    def certify(x, n0, n, alpha):
        first = votes(x, n0)
        label = first.index(max(first))
        lower = proportion_confint(votes(x, n)[label], n, alpha=2 * alpha, method="beta")[0]
        return (label, float(sigma * norm.ppf(lower))) if lower > 0.5 else (-1, 0.0)

    return certify


def art_smoothing(model: nn.Module, sigma: float, classes: int, shape: tuple[int, ...], n0: int, alpha: float):
    """adversarial-robustness-toolbox's smoothing class: ``certify(x float32 array [B, C, H, W], n, batch_size) -> (labels, radii)``."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    kind = "gpu" if next(model.parameters()).is_cuda else "cpu"
    return PyTorchRandomizedSmoothing(
        model, nn.CrossEntropyLoss(), shape, classes, sample_size=n0, scale=sigma, alpha=alpha, device_type=kind
    )


def deterministic(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The plain network at its best: eval mode, BatchNorm folded, channels last, the vendor's weight order."""
    return fuse.snapshot(model, dtype)[0]
