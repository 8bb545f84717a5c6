"""Certified L2 robustness by randomised smoothing (Cohen, Rosenfeld, Kolter, ICML 2019), from the votes of an ensemble's packed draws.

What a certificate covers is said in `COVERS`, for reports. Three points of the construction:

*Inner noise.* Let f(z, w) be the class that the network gives to the noisy image z with inner noise w. The smoothed score of class c at x,
G_c(x) = E[F_c(x + sigma * eps)] with F_c(z) = P_w(f(z, w) = c), is a Gaussian average of a function with values in [0, 1]. That is all that
the certificate needs: Phi^-1(G_c) is Lipschitz with constant 1 / sigma (Salman et al., NeurIPS 2019, Lemma 2). A vote is one draw of
(eps, w) together, a Bernoulli variable of mean G_c(x).

*Floating point.* x + sigma * eps in floating-point arithmetic rounds by a grid that depends on x, which a network could tell apart, and so
break certificates (Voracek & Hein, ICLR 2023). Their remedy is taken: image and noise are rounded to multiples of one fixed step, each by
itself, and added exactly. The sum is then the Gaussian around the rounded image, rounded; whatever follows, a cast to bfloat16 included, is
part of the network. Rounding moves two images apart by at most sqrt(d) steps of 2^-20 sigma or less, and the radius is that much shorter.
So the input's noise is added here, with the very eps of the layer, which adds no noise meanwhile.

*Early stop.* The bounds of a confidence sequence hold all together with probability 1 - alpha, so the best of them holds whenever one stops
(see `confidence`, which has all the statistics; adaptive sampling for certificates: Horvath et al., ICLR 2022; Voracek, NeurIPS 2024).
"""

import math
import numbers
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rse_fast import arguments, confidence, functional, inputs
from rse_fast.certifiable import check_rows, input_noise
from rse_fast.ensemble import Ensemble, plan, softmax
from rse_fast.nn import NoiseLayer

COVERS = """\
An image with label c and radius R is certified in this sense: the classifier that returns the class with the most votes of infinitely many
draws of this network, inner noise included, returns c for every image within L2 distance R (in the units of the pixels) of it. The inner
noise is covered because the smoothed score is a Gaussian average of a function with values in [0, 1] (Salman et al. 2019, Lemma 2). Each
image's statement is wrong with probability at most alpha over the draws, so of many images some may be wrong. It says nothing about other
norms, about larger radii, or about the mean softmax of a few draws, which may give another label than the vote. Input noise is added
exactly, on a grid (Voracek & Hein 2023), so rounding cannot break the certificate; what remains assumed is that the generator's normals,
made of 32-bit words, are independent and normal. It holds for the weights it was made with and the number format they compute in, and for
no others. In bfloat16 or float16 the network gets the sum of image and noise, rounded once; an `Ensemble` rounds the image before its
noise comes, which moves the image: there the certified label is this procedure's, not that of `Ensemble.predict`."""

BOUNDS = ("clopper-pearson", "randomised")
GRID = 20  # the step of the grid is the power of two below sigma, times 2^-GRID


@dataclass(frozen=True)
class Certificate:
    """What `certify` says of B images and K classes; tensors on the device of the images that were given.

    Attributes:
        labels: int64 [B], the class of the majority of draws, or -1: abstains.
        radius: float64 [B], L2 radius in the units of the image, 0 where it abstains.
        p_lower: float64 [B], lower bound of the class's share of votes, at confidence 1 - alpha.
        votes: int64 [B, K], of the estimation draws; a draw that is NaN votes for no class, and counts against every one.
        selected: int64 [B], the class that the first n0 draws chose, abstained or not; -1 where they all were NaN.
        draws: int64 [B], estimation draws taken, n or fewer; the n0 for the selection come on top.
        sigma: standard deviation of the noise at the input.
        alpha: probability that one image's statement is wrong.
        seed: the seed that reproduces this certificate, in [0, 2^64).
        bound: the lower bound that was used, "clopper-pearson" or "randomised".
    """

    labels: torch.Tensor
    radius: torch.Tensor
    p_lower: torch.Tensor
    votes: torch.Tensor
    selected: torch.Tensor
    draws: torch.Tensor
    sigma: float
    alpha: float
    seed: int
    bound: str


def certify(
    ensemble: Ensemble,
    x: torch.Tensor,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 1e-3,
    seed: int | None = None,
    radii: float | Sequence[float] | None = None,
    tolerance: float | None = None,
    bound: str = "clopper-pearson",
    image_offset: int = 0,
) -> Certificate:
    """Certifies images x [B, ...]: a label and an L2 radius for each, which hold with probability 1 - alpha.

    `COVERS`, and the page on certification, say what that means. The class is selected by the votes of draws 0 .. n0 - 1. Its share is
    estimated from draws n0 .. n0 + n - 1, so the two sets are disjoint. The radius is ``sigma * Phi^-1(p_lower)``, less the width of the
    grid (5e-5 sigma for 32x32 photos at most); p_lower is a lower bound of the share, and sigma that of the noise at the input. An image
    with p_lower < 1/2 gets no label: `certify` abstains.

    Args:
        ensemble: of a model whose first noise stands at the input: the image reaches one noisy layer unchanged (reshaped at most) and is
            read by nothing else. Its number format and backend are used, its ``draws`` and ``early_exit`` are not.
        x: images, float [B, ...], finite, in the units that the model was trained with; or NumPy arrays or PIL images, see
            `rse_fast.inputs.batch`.
        n0: draws that select the class, >= 1.
        n: draws that estimate its share, >= 1.
        alpha: probability that the statement about an image is wrong, in (0, 1).
        seed: None takes the ensemble's, or fresh entropy if it has none.
        radii: one or several radii >= 0: an image stops as soon as "radius >= r" is proven for each of them, or given up: all n draws
            are very unlikely to prove it. The guarantee is the same; radius and p_lower are what was proven by then.
        tolerance: L2 distance >= 0: an image stops as soon as all n draws, if the rest are like those so far, would enlarge its radius by
            no more than this. The guarantee is the same. With neither radii nor tolerance all n draws are taken.
        bound: "clopper-pearson", or "randomised": never smaller and mostly a little larger, at the same guarantee, with the help of one
            random number for each image, made from the seed. The seed must be chosen before any vote is seen, as for any bound.
        image_offset: index of the first image, which addresses its noise: a data set certified in parts gets the noise of one call.

    Returns:
        A `Certificate` on the device of x, which for arrays and pictures is the CPU.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of range; the noise is not at the input, switched off, zero, per channel, or learnable
            (``requires_grad_(False)`` on ``sigma_raw`` freezes it); the logits of an image depend on the other images in the batch.

    Warns:
        RuntimeWarning: n and alpha can never decide, or never reach one of the radii.

    Examples:
        >>> certificate = rse_fast.certify(rse_fast.Ensemble(model), images, n=1000)
        >>> certificate.labels, certificate.radius  # int64 [B], -1 abstains; float64 [B]

    Reference: Cohen, Rosenfeld, Kolter, ICML 2019; Salman et al., NeurIPS 2019; Voracek & Hein, ICLR 2023.
    """
    if not isinstance(ensemble, Ensemble):
        raise TypeError(f"ensemble must be an rse_fast.Ensemble, got {type(ensemble).__name__}")
    n0, n = arguments.integer("n0", n0), arguments.integer("n", n)
    for name, value in (("n0", n0), ("n", n)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if n0 + n > 2**32:
        raise ValueError(f"n0 + n must be at most 2^32, got {n0 + n}")
    if not isinstance(alpha, numbers.Real) or not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha!r}")
    radii = [] if radii is None else np.atleast_1d(np.asarray(radii, dtype=None if isinstance(radii, torch.Tensor) else object)).tolist()
    if wrong := [r for r in radii if isinstance(r, bool) or not isinstance(r, numbers.Real)]:
        raise TypeError(f"radii must be None, a number or several, got {wrong[0]!r}")
    radii = [float(r) for r in radii]
    if not all(0 <= r < math.inf for r in radii):
        raise ValueError(f"radii must be finite and not negative, got {radii}")
    if tolerance is not None:
        if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real):
            raise TypeError(f"tolerance must be None or a number, got {tolerance!r}")
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be finite and not negative, got {tolerance!r}")
        if radii:
            raise ValueError("tolerance and radii are two rules of stopping: give one of them")
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {', '.join(map(repr, BOUNDS))}, got {bound!r}")
    device, x, seed = inputs.device(x), ensemble.images(x), ensemble.draw_seed(seed)
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite, got infinite or NaN values")
    image_offset = arguments.first_image(image_offset, len(x))

    from scipy.special import ndtr, ndtri

    if len(x) and ensemble.prepared(x).runner.pixels:
        raise ValueError("model must give an image one label to be certified, got logits [N, K, H, W] of pixels")
    layer = input_noise(ensemble.model, x, ensemble.logits)
    sigma = float(layer.current_sigma())
    width = math.sqrt(x[0].numel() if len(x) else 0) * grid_step(sigma)
    check_rows(ensemble, x)
    early_stop, randomised = bool(radii) or tolerance is not None, bound == "randomised"
    reach = sigma * float(ndtri(confidence.largest_bound(n, alpha, early_stop, randomised))) - width
    if reach <= 0:
        warnings.warn(f"n={n} draws can never decide at alpha={alpha}: no radius above 0 can be certified", RuntimeWarning, stacklevel=2)
    elif beyond := [r for r in radii if r > reach]:
        text = f"radii {beyond} can never be certified with n={n} draws at alpha={alpha}: the largest radius is {reach:.4g}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    index = torch.arange(image_offset, image_offset + len(x), device=x.device)
    selected = _votes(ensemble, layer, x, index, 0, n0, seed)
    voted = selected.any(-1)  # where every draw is NaN, none has
    top, votes = selected.argmax(-1) if len(x) else index, torch.zeros_like(selected)

    def successes(active: np.ndarray, start: int, stop: int) -> np.ndarray:
        active = torch.as_tensor(active, device=x.device)
        counted = _votes(ensemble, layer, x[active], index[active], n0 + start, n0 + stop, seed)
        votes[active] += counted
        return counted.gather(1, top[active, None])[:, 0].cpu().numpy()

    enough = None
    if radii:
        enough = confidence.reaching([float(ndtr((r + width) / sigma)) for r in radii])
    elif tolerance is not None:
        enough = confidence.within(tolerance / sigma)
    uniform = confidence.image_uniforms(seed, index.cpu()) if randomised else None
    p_lower, draws = confidence.estimate(successes, len(x), n, alpha, enough, uniform)
    abstains = torch.from_numpy(p_lower < 0.5)
    radius = torch.from_numpy(sigma * ndtri(np.maximum(p_lower, 0.5)) - width).clamp_min(0)
    return Certificate(
        labels=top.cpu().masked_fill(abstains, -1).to(device),
        radius=radius.masked_fill(abstains, 0).to(device),
        p_lower=torch.from_numpy(p_lower).to(device),
        votes=votes.to(device),
        selected=top.masked_fill(~voted, -1).to(device),
        draws=torch.from_numpy(draws).to(device),
        sigma=sigma,
        alpha=float(alpha),
        seed=seed,
        bound=bound,
    )


# ------------------------------------------------------------------------------------------------------------------------ votes
def grid_step(sigma: float) -> float:
    """The step of the grid on which image and noise are added; a power of two, so that multiples of it are exact."""
    return 2.0 ** (math.floor(math.log2(sigma)) - GRID)


def on_grid(t: torch.Tensor, step: float) -> torch.Tensor:
    """Which multiple of ``step`` the values of a float32 tensor are nearest to, float64; halves are rounded up.

    Halves are frequent among float32 numbers. Rounded to even, they would make even multiples of the step more likely than odd ones, and
    a network could tell an image from one that is a step away by the parity of the sum.
    """
    return t.double().div_(step).add_(0.5).floor_()


@torch.inference_mode()
def _votes(ensemble: Ensemble, layer: NoiseLayer, x: Tensor, index: Tensor, start: int, stop: int, seed: int) -> Tensor:
    """Votes int64 [A, K] of draws start .. stop - 1 of images x [A, ...], whose indices are ``index`` int64 [A]."""
    votes = torch.zeros(len(x), ensemble.prepared(x).classes, dtype=torch.int64, device=x.device)
    key, sigma = arguments.seed_tensor(seed, x.device), layer.current_sigma()
    step = grid_step(float(sigma))
    for image, draw in plan.chunks(len(x), stop - start, ensemble.rows(x)):
        first = torch.tensor(start + draw.start, device=x.device)
        images, draws = image.stop - image.start, draw.stop - draw.start
        sample_ids = torch.stack([index[image], first.expand(images)], 1)
        noise = functional.add_noise(
            torch.zeros(x[image].shape, dtype=torch.float32, device=x.device),
            sigma, seed=key, stream=layer.stream, draws=draws, sample_ids=sample_ids,
            channel_dim=getattr(layer, "channel_dim", 1), backend=ensemble.backend,
        )  # fmt: skip
        noisy = on_grid(noise, step).unflatten(0, (draws, images)).add_(on_grid(x[image], step)).mul_(step).float().flatten(0, 1)
        # Every row is an image of its own here, with one draw: that of the inner noise.
        sample_ids = sample_ids.repeat(draws, 1)
        sample_ids[:, 1] += torch.arange(draws, device=x.device).repeat_interleave(images)
        logits = ensemble.logits_at(noisy, sample_ids, 1, key, noiseless_stream=layer.stream)
        votes[image] += softmax.votes(logits).view(draws, images, -1).sum(0)
    return votes
