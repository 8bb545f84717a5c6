"""The law of eps: 16.8M normals of the CPU library (1M of the torch backend) against N(0, 1) and against independence.

Everything here is deterministic (fixed noise seeds), so each test either always passes or always fails. A statistic whose standard
deviation under the law is known may lie 5 of them away; tail counts and the Kolmogorov-Smirnov distance have that same probability, 6e-7.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from rse_fast import functional

special = pytest.importorskip("scipy.special")
stats = pytest.importorskip("scipy.stats")

SIGMAS = 5
RARE = 2 * stats.norm.sf(SIGMAS)  # a two-sided probability of 5.7e-7
SHAPE = (16, 64, 64)  # C, H, W: 65536 normals a row


def field(backend, seed=1234567890123, stream=3, image_offset=0, draw_offset=0, images=16, draws=16):
    """eps as a float32 array [draws, images, S, C]: channels last, so that neighbouring quads and lanes are neighbours in memory."""
    zeros = torch.zeros(images, *SHAPE).to(memory_format=torch.channels_last)
    address = dict(seed=seed, stream=stream, images=images, draws=draws, image_offset=image_offset, draw_offset=draw_offset)
    y = functional.add_noise(zeros, 1.0, **address, backend=backend)
    return y.permute(0, 2, 3, 1).reshape(draws, images, -1, SHAPE[0]).numpy()


def blocks(a):
    """``a`` as float64 vectors that stay in the cache."""
    flat = a.reshape(-1)
    for start in range(0, len(flat), 2**14):
        yield flat[start : start + 2**14].astype(np.float64)


def dot(u, v):
    return np.einsum("i,i", u, v)  # in this thread: BLAS would wake its own for so little


@pytest.fixture(scope="module", params=("cpu", "torch"))
def eps(request):
    if request.param == "torch":
        return field("torch", images=4, draws=4)
    request.getfixturevalue("library")
    return field("cpu")


def test_there_are_enough(eps):
    assert eps.size == (2**24 if eps.shape[1] == 16 else 2**20)


def test_moments_to_order_six(eps):
    total = np.zeros(7)
    for z in blocks(eps):
        z2 = z * z
        z3 = z2 * z
        total += len(z), z.sum(), z2.sum(), z3.sum(), dot(z2, z2), dot(z2, z3), dot(z3, z3)
    assert total[0] == eps.size
    for k in range(1, 7):
        moment = lambda n: math.prod(range(n - 1, 0, -2)) if n % 2 == 0 else 0  # noqa: E731 - E z^n = (n - 1)!!
        deviation = math.sqrt((moment(2 * k) - moment(k) ** 2) / eps.size)
        assert abs(total[k] / eps.size - moment(k)) < SIGMAS * deviation, k


def test_kolmogorov_smirnov(eps):
    n = eps.size
    uniform = special.ndtr(np.sort(eps.ravel()).astype(np.float64))
    steps = np.arange(n, dtype=np.float64)
    distance = max((uniform - steps / n).max(), ((steps + 1) / n - uniform).max())
    # Equal values come from the float32 uniforms (2^-24 wide near u = 1): a step of the empirical distribution, far below the bound.
    assert special.kolmogorov(math.sqrt(n) * distance) > RARE


@pytest.mark.parametrize("limit", (3, 4, 5))
def test_tails(eps, limit):
    for count in ((eps > limit).sum(), (eps < -limit).sum()):
        expected = eps.size * stats.norm.sf(limit)
        assert RARE / 2 < stats.poisson.cdf(count, expected) and RARE / 2 < stats.poisson.sf(count - 1, expected), (count, expected)
    assert np.abs(eps).max() <= 6.77


def test_every_lane_and_position_has_mean_zero_and_variance_one(eps):
    for over in ((0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3)):  # for each channel, position, draw, image
        count = math.prod(eps.shape[d] for d in over)
        sums, squares = (a.sum(over, dtype=np.float64) for a in (eps, eps * eps))
        rare = RARE / 2 / sums.size  # the extreme one of so many, at either end
        assert np.abs(sums).max() < stats.norm.isf(rare) * math.sqrt(count), over
        assert stats.chi2.ppf(rare, count) < squares.min() and squares.max() < stats.chi2.isf(rare, count), over


def correlations(a, b):
    """The largest z-score among the correlations of a with b, of their squares, and of one with the other's square."""
    assert a.shape == b.shape
    products = np.zeros(4)
    for u, v in zip(blocks(a), blocks(b), strict=True):
        uu, vv = u * u - 1, v * v - 1
        products += dot(u, v), dot(uu, vv) / 2, dot(u, vv) / math.sqrt(2), dot(uu, v) / math.sqrt(2)
    return np.abs(products).max() / math.sqrt(a.size)


def test_no_correlation_within_a_field(eps):
    quads = eps.reshape(*eps.shape[:2], -1, 4)  # [draws, images, quads, lanes]
    pairs = {f"lanes {i} {j}": (quads[..., i], quads[..., j]) for i, j in itertools.combinations(range(4), 2)}
    for lag in (1, 2, 4, 64, 256):  # neighbours in a vector, in memory (the next position is 4 quads away), the next row, the next tile
        pairs[f"quads {lag}"] = (quads[:, :, lag:], quads[:, :, :-lag])
    pairs["last lane, next quad"] = (quads[:, :, :-1, 3], quads[:, :, 1:, 0])
    pairs["images"] = (eps[:, 1:], eps[:, :-1])
    pairs["draws"] = (eps[1:], eps[:-1])
    upper = np.triu_indices(len(eps), 1)
    pairs["draw and image swapped"] = (eps[upper], eps.swapaxes(0, 1)[upper])
    for name, (a, b) in pairs.items():
        assert correlations(a, b) < SIGMAS, name


@pytest.mark.parametrize(
    "other",
    ({"stream": 4}, {"stream": 3 + 2**16}, {"seed": 1234567890124}, {"seed": 1234567890123 + 2**32}, {"seed": 1234567890123 ^ 2**63},
     {"image_offset": 16}, {"draw_offset": 16}, {"draw_offset": 2**31}),
    ids=str,
)  # fmt: skip
def test_no_correlation_between_fields(eps, other):
    backend, sizes = ("cpu", {}) if eps.shape[1] == 16 else ("torch", {"images": 4, "draws": 4})
    assert correlations(eps, field(backend, **sizes, **other)) < SIGMAS


def test_one_quad_for_each_of_many_seeds_streams_images_and_draws():
    # The other arguments must mix as well as the position does.
    def independent(z):
        assert stats.kstest(z.ravel(), "norm").pvalue > RARE
        assert correlations(z[1:], z[:-1]) < SIGMAS

    zeros = torch.zeros(1, 4)
    for name in ("seed", "stream"):
        independent(torch.cat([functional.add_noise(zeros, 1.0, **{"seed": 9, name: i}) for i in range(5000)]).numpy())
    for images, draws in ((100_000, 1), (1, 100_000)):
        independent(functional.add_noise(torch.zeros(images, 4), 1.0, seed=9, images=images, draws=draws).numpy())
