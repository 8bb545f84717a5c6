"""What a training step does with the weights of Winograd's convolution: their transform by the C++ library, and their gradient."""

import pytest
import torch
from test_winograd import CHANNELS, SIDES, address, channels_last, noisy_input
from winograd_bound import filters_bound, weight_gradient, weight_gradient_bound

from rse_fast.kernels.cpu import winograd


def lying(weight, form):
    """The weight in another memory layout, its values the same."""
    if form == "channels last":
        return channels_last(weight)
    if form == "transposed":
        return weight.transpose(0, 1).contiguous().transpose(0, 1)
    if form == "a part":
        return torch.full((*weight.shape[:2], 5, 4), torch.nan)[:, :, 1:4, :3].copy_(weight)
    return weight


@pytest.mark.parametrize("form", ("contiguous", "channels last", "transposed", "a part"))
@pytest.mark.parametrize("tile", (2, 4))
def test_transform_of_a_weight(unit, tile, form, rng):
    for outputs, inputs in ((1, 1), (3, 5), (32, 7), (33, 64), (100, 129)):
        weight = torch.randn(outputs, inputs, 3, 3)
        for turn in (False, True):
            taps = winograd.turned(weight) if turn else weight
            got, want = winograd.transform_filters(lying(weight, form), tile, turn), winograd.transform_weight(taps, tile)
            limit = winograd.transform_weight(torch.zeros_like(taps), tile).double()
            error = filters_bound(taps, tile)  # [outputs, inputs, side, side]
            for block, part in enumerate(error.split(winograd.COLUMNS)):
                limit[block, ..., : len(part)] = part.permute(2, 3, 1, 0)
            assert got.shape == want.shape and ((got.double() - want).abs() <= limit + 2.0**-24 * want.abs()).all(), (outputs, inputs, turn)


@pytest.mark.parametrize("tile", (2, 4))
def test_gradient_against_float64(unit, tile, rng):
    for i, ((height, width), (inputs, outputs)) in enumerate(zip(SIDES, CHANNELS, strict=True)):
        images, draws, padding = (1, 5)[i % 2], 1 + i % 3, (1, 0, 1, 2)[i % 4] if min(height, width) > 2 else 1
        at, sigma = address(images, draws), torch.rand(inputs if i % 2 else 1)
        x = channels_last(torch.randn(images * (draws if i % 4 == 3 else 1), inputs, height, width))
        g = channels_last(torch.randn(images * draws, outputs, height + 2 * padding - 2, width + 2 * padding - 2))
        like = lying(torch.empty(outputs, inputs, 3, 3), ("contiguous", "channels last")[i % 2])
        got = winograd.weight_grad(x, g, like, tile, padding, at, sigma)
        z = noisy_input(x, at, sigma)
        weight = torch.zeros(outputs, inputs, 3, 3, dtype=torch.float64, requires_grad=True)
        y = torch.nn.functional.conv2d(z.double(), weight, padding=padding)
        (want,) = torch.autograd.grad(y, weight, g.double())
        assert (weight_gradient(z, g, tile, padding) - want).abs().max() <= 1e-11 * want.abs().max()  # the algorithm is that gradient
        assert got.stride() == like.stride() and ((got - want).abs() <= weight_gradient_bound(z, g, tile, padding)).all(), i


def test_the_bound_of_the_gradient_is_no_tautology(library, rng):
    x, g, at, sigma = channels_last(torch.randn(2, 64, 9, 9)), channels_last(torch.randn(2, 64, 9, 9)), address(2), torch.ones(1)
    got = winograd.weight_grad(x, g, torch.empty(64, 64, 3, 3), 4, 1, at, sigma).double()
    limit = weight_gradient_bound(noisy_input(x, at, sigma), g, 4, 1)
    want = weight_gradient(noisy_input(x, at, sigma), g, 4, 1)
    assert ((got - want).abs() <= limit).all() and limit.max() <= 0.05 * want.std()
    other = weight_gradient(noisy_input(x, address(2, stream=8), sigma), g, 4, 1)  # with other noise
    assert ((got - other).abs() > limit).double().mean() > 0.9


@pytest.mark.parametrize("tile", (2, 4))
def test_bits_of_the_gradient_do_not_depend_on_threads(unit, tile, rng):
    x, g = channels_last(torch.randn(7, 37, 10, 9)), channels_last(torch.randn(14, 70, 10, 9))
    arguments = x, g, torch.empty(70, 37, 3, 3), tile, 1, address(7, 2), torch.rand(1)
    threads = torch.get_num_threads()
    want = winograd.weight_grad(*arguments)
    try:
        for count in (1, 2, 3, 5, 64):
            torch.set_num_threads(count)
            assert torch.equal(winograd.weight_grad(*arguments), want), count
    finally:
        torch.set_num_threads(threads)
    exact = weight_gradient(noisy_input(x, address(7, 2), arguments[-1]), g, tile, 1)
    for block in (1, 20, 10**6):  # sums in other orders
        got = winograd.weight_grad(*arguments, block)
        assert ((got - exact).abs() <= weight_gradient_bound(noisy_input(x, address(7, 2), arguments[-1]), g, tile, 1)).all()


@pytest.mark.parametrize("tile", (2, 4))
def test_blocks_are_summed_apart(unit, tile, rng):
    """One long sum would round each tile of a large batch to the precision of all tiles together."""
    x, g, at = channels_last(torch.full((64, 4, 64, 64), 0.7)), channels_last(torch.full((64, 3, 64, 64), 0.3)), address(64)
    want = 64 * 64 * 64 * x[0, 0, 0, 0].double() * g[0, 0, 0, 0].double()  # of the tap in the middle, which meets every pixel
    short, long = (winograd.weight_grad(x, g, torch.empty(3, 4, 3, 3), tile, 1, at, torch.zeros(1), block) for block in (0, 10**6))
    errors = [(got[:, :, 1, 1] - want).abs().max() for got in (short, long)]
    assert errors[0] <= 0.25 * errors[1]


def test_the_gradient_of_rows_known_by_sample_ids(unit, rng):
    """The noise of a row is that of its image and draw, however the call names them."""
    x, g, like = channels_last(torch.randn(3, 5, 6, 7)), channels_last(torch.randn(6, 4, 6, 7)), torch.empty(4, 5, 3, 3)
    sigma, ids = torch.rand(5), torch.tensor([[3, 2], [4, 2], [5, 2]])
    want = winograd.weight_grad(x, g, like, 4, 1, address(3, 2), sigma)
    assert torch.equal(winograd.weight_grad(x, g, like, 4, 1, address(3, 2, 0, 0, sample_ids=ids), sigma), want)
    ids[1, 0] = 2**32 - 1
    assert not torch.equal(winograd.weight_grad(x, g, like, 4, 1, address(3, 2, 0, 0, sample_ids=ids), sigma), want)


def test_which_layers_are_worth_it(library):
    """What is computed depends on shapes alone: never narrow layers, tiny maps, lines without end, or weights that would be
    mapped anew at each call."""
    best, convolution, gradient = winograd.best_tile, winograd.CONVOLUTION, winograd.WEIGHT_GRAD
    if library.unit == "baseline":
        assert best(convolution, 128, 64, 64, 32, 32, 1) is None
        return
    assert best(convolution, 128, 64, 64, 32, 32, 1) == best(gradient, 128, 64, 64, 32, 32, 1) == 4
    assert best(convolution, 128, 512, 512, 4, 4, 1) == 2 and best(gradient, 128, 512, 512, 4, 4, 1) is None
    for shape in ((128, 3, 64, 32, 32, 1), (128, 64, 10, 32, 32, 1), (2, 512, 512, 2, 2, 1), (0, 64, 64, 32, 32, 1), (1, 64, 64, 1, 1, 0)):
        assert best(convolution, *shape) is None and best(gradient, *shape) is None
    # long lines: the gradient of the weight would hold transforms of several times the maps' size
    for width, tiles in ((1000, (4, 4)), (16000, (4, None)), (10**6, (None, None))):
        assert (best(convolution, 1, 64, 64, 4, width, 1), best(gradient, 1, 64, 64, 4, width, 1)) == tiles
    for shape in ((2**31, 10**6, 10**6, 10**6, 10**6, 1), (2**62, 64, 64, 10**9, 10**9, 2)):
        assert best(convolution, *shape) is None and best(gradient, *shape) is None
