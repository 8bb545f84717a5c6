"""Laws of the seed, bit for bit, on every backend: eps is a function of (seed, stream, draw, image, position) and of nothing else."""

import functools
import itertools

import pytest
import torch

from rse_fast import functional, reference
from rse_fast.address import NoiseAddress

SHAPES = ((3, 17, 19), (5, 1031), (8, 7, 9), (64, 5, 5), (128,), (1, 2, 3, 5))  # below and above a tile of 256 quads
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def noise(backend, rng):
    """``add_noise`` of the backend with one seed; the result as bits."""
    seed = int(rng.integers(0, 2**63))
    plain = functools.partial(functional.add_noise, backend=backend)
    return lambda x, sigma=0.7, **address: plain(x, sigma, **{"seed": seed, **address})


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def test_the_same_seed_gives_the_same_bits(noise):
    for shape in SHAPES:
        x = torch.randn(3, *shape)
        assert torch.equal(noise(x), noise(x)) and torch.equal(noise(x, seed=5), noise(x.clone(), seed=torch.tensor(5)))


def test_every_argument_gives_other_and_independent_noise(noise):
    shape = (8, 64, 64)
    base = dict(seed=77, stream=1, image_offset=10, draw_offset=20)
    others = [
        {**base, name: value}
        for name, values in (
            ("seed", (76, 78, 77 + 2**32, 77 + 2**63, ~77)),
            ("stream", (0, 2, 1 + 2**16)),
            ("image_offset", (9, 11, 20)),
            ("draw_offset", (19, 21, 10)),
        )
        for value in values
    ] + [{**base, "image_offset": 20, "draw_offset": 10}, {**base, "stream": 10, "image_offset": 1}]
    fields = [noise(torch.zeros(1, *shape), 1.0, **address).double().flatten() for address in (base, *others)]
    for (i, a), (j, b) in itertools.combinations(enumerate(fields), 2):
        assert (a == b).double().mean() < 1e-4, (i, j)
        for power in (1, 2):  # correlation of z, and of z^2: 5.5 standard deviations of it for independent fields
            u, v = (z**power - (power - 1) for z in (a, b))
            assert abs(u @ v) / power < 5.5 * len(a) ** 0.5, (i, j, power)


def test_any_split_of_the_batch_gives_the_same_bits(noise):
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        x = torch.randn(7, *shape).to(dtype)
        whole = noise(x, image_offset=100)
        for cuts in ((1, 6), (3, 3, 1), (2, 5), (1,) * 7):
            starts = [sum(cuts[:i]) for i in range(len(cuts))]
            parts = [noise(x[at : at + n], image_offset=100 + at) for at, n in zip(starts, cuts, strict=True)]
            assert torch.equal(torch.cat(parts), whole), (shape, cuts)


def test_the_order_of_rows_does_not_matter(noise):
    for shape in SHAPES:
        x, order = torch.randn(5, *shape), torch.randperm(5)
        sample_ids = torch.tensor([[i, 3] for i in range(5)])
        whole = noise(x, draw_offset=3)
        assert torch.equal(torch.cat([noise(x[i : i + 1], image_offset=int(i), draw_offset=3) for i in order]), whole[order])
        assert torch.equal(noise(x[order], images=5, sample_ids=sample_ids[order]), whole[order])
        assert torch.equal(noise(x, sample_ids=sample_ids, image_offset=50, draw_offset=60), whole)  # sample_ids take the offsets' place


def test_draws_are_rows_and_fewer_are_a_prefix_of_more(noise):
    for shape in SHAPES:
        x = torch.randn(3, *shape)
        five = noise(x, images=3, draws=5, draw_offset=4).view(5, 3, *shape)
        for draws in (1, 2, 4):
            assert torch.equal(noise(x, images=3, draws=draws, draw_offset=4), five[:draws].flatten(0, 1))
        for d in range(5):
            assert torch.equal(noise(x, draw_offset=4 + d), five[d])


def test_lazy_packing_equals_packing(noise):
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16, torch.float16)):
        x = torch.randn(3, *shape).to(dtype)
        for layout, affine in itertools.product((torch.clone, channels_last), (False, True)):
            options = {"scale": torch.randn(shape[0]), "shift": torch.randn(shape[0]), "act": "relu"} if affine else {}
            lazy = noise(layout(x), images=3, draws=4, **options)
            assert torch.equal(noise(layout(torch.cat([x] * 4)), images=3, draws=4, **options), lazy), (shape, dtype, layout)


def test_memory_layout_does_not_matter(noise, backend):
    # Beside whole vectors and tiles, sizes where one layout has a remainder and the other has none.
    shapes = ((4, 255), (4, 256), (4, 257), (12, 513), (16, 16), (16, 15), (2, 1025), (3, 17, 19), (5, 40), (8, 17), (7, 3, 5), (64, 4, 4))
    for shape, dtype in itertools.product(shapes if backend == "cpu" else shapes[-5:], (torch.float32, torch.bfloat16, torch.float16)):
        x = torch.randn(2, *shape).to(dtype)
        affine = {"scale": torch.randn(shape[0]), "shift": torch.randn(shape[0])}
        for sigma, options in itertools.product((0.3, torch.rand(shape[0])), ({}, affine)):
            for act in (None, "relu"):
                planar, flat = (noise(a, sigma, images=2, draws=2, act=act, **options) for a in (x, channels_last(x)))
                assert torch.equal(planar, flat), (shape, dtype, sigma, options, act)
        strange = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(noise(strange), noise(x)), (shape, dtype)


def test_the_number_of_threads_does_not_matter(noise):
    before = torch.get_num_threads()
    try:
        for shape, layout in itertools.product(((3, 65, 67), (16, 30, 31)), (torch.clone, channels_last)):
            x = layout(torch.randn(3, *shape))
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(noise(x, images=3, draws=2, scale=torch.ones(shape[0])))
            assert all(torch.equal(results[0], other) for other in results[1:]), (shape, layout)
    finally:
        torch.set_num_threads(before)


def test_a_position_has_its_noise_in_samples_of_every_size(noise, backend):
    # quad = s * ceil(C / 4) + c // 4: cutting off positions, or channels of the last group, leaves the others' noise alone.
    # Sizes on both sides of a vector (16 quads), a tile (256 quads) and several tiles.
    sizes = (1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 700, 1024, 1025) if backend == "cpu" else (1, 17, 65)
    for channels, layout in itertools.product((1, 4, 12, 64), (torch.clone, channels_last)):
        x = torch.randn(2, channels, sizes[-1] + 75)
        whole = noise(layout(x))
        for size in sizes:
            assert torch.equal(noise(layout(x[..., :size])), whole[..., :size]), (channels, layout, size)
        for fewer in range(max(1, channels - 3), channels):
            assert torch.equal(noise(layout(x[:, :fewer])), whole[:, :fewer]), (channels, layout, fewer)


def test_dtypes_share_the_noise(noise):
    for shape in SHAPES:
        x = torch.zeros(2, *shape)
        expected = noise(x)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(noise(x.to(dtype)), expected.to(dtype)), (shape, dtype)


def test_global_generators_are_neither_read_nor_moved(noise):
    x = torch.randn(2, 3, 5)
    state = torch.get_rng_state()
    first = noise(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(noise(x), first)


def test_backends_agree_with_each_other(noise, rng):
    x = torch.randn(2, 6, 50)
    at = NoiseAddress(torch.tensor(3), 2, 2, 2, 5, 6)
    other = reference.add_noise(x, torch.tensor(0.7), *at)
    # Both are within 1e-6 sigma and a few roundings of float64.
    assert (noise(x, **at._asdict()) - other).abs().max() <= 2 * 0.7e-6 + 8 * 2.0**-24 * 10
