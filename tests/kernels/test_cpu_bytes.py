"""Noise in bytes: activation, noise and requantisation in one pass, against float64; and the clean second output of the float form.

`limits` bounds what float32 may make of the value before its one rounding: a byte may differ from the float64 result, by one step,
only where that lies within the bound of a tie.
"""

import itertools
import math

import pytest
import torch

from rse_fast import functional, ops, reference
from rse_fast.address import NoiseAddress
from rse_fast.kernels import cpu
from rse_fast.layout import layout, packed_like

ADDRESS = {"seed": -77, "stream": 3, "image_offset": 5, "draw_offset": 7}
pytestmark = pytest.mark.usefixtures("one_thread")


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture
def poisoned(monkeypatch):
    """Fills every output before the kernel runs, differently from call to call: a value that is not written shows."""
    fill = itertools.count(1, 101)
    for module in ("noise", "reference"):
        monkeypatch.setattr(f"rse_fast.{module}.packed_like", lambda *args: packed_like(*args).fill_(next(fill) % 256))


def limits(x, sigma, step, zero_point, images, draws, scale, shift, relu, pool):
    """(low, high): the bytes of the float64 value, in steps, less and plus the float32 error.

    Divided by the step, scale, shift and sigma are rounded once each; so are an int32 input, the affine part's product and sum, two
    products with sigma, and the last sum. eps is within 1e-6.
    """
    column = lambda p: torch.as_tensor(p).double().reshape(-1, *[1] * (x.dim() - 2))  # noqa: E731
    product = x.double() if scale is None else x.double() * column(scale)
    shift = column(0.0 if shift is None else shift)
    value = product + shift
    value = value.relu() if relu else value
    error = 3 * product.abs() + 2 * shift.abs() + value.abs()
    if pool:  # the error of the largest is at most the largest error
        value, error = (torch.nn.functional.max_pool2d(t, 2) for t in (value, error))
    repeats = [images * draws // x.shape[0], *[1] * (x.dim() - 1)]
    value, error = value.repeat(repeats), error.repeat(repeats)
    eps = reference.gaussian(-77, 3, images, draws, x.shape[1], math.prod(value.shape[2:]), 5, 7)
    noise = column(sigma) * torch.from_numpy(eps).movedim(-1, 1).reshape(value.shape)
    result = value + noise
    error = error + 3 * noise.abs() + result.abs()
    error = (2.0**-24 * 1.001 * error + 1e-6 * column(sigma)) / step
    return tuple((zero_point + (result / step + sign * error).round()).clamp(0, 255) for sign in (-1, 1))


def inputs(dtype, shape):
    """Values and the scale that brings them to a spread of about 1."""
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype), 0.02
    if dtype == torch.int32:
        return torch.randint(-(2**27), 2**27, shape, dtype=dtype), 2.0**-26
    return torch.randn(shape).to(dtype), 1.0


@pytest.mark.parametrize("lay", (torch.clone, channels_last), ids=("planar", "flat"))
@pytest.mark.parametrize("dtype", cpu.BYTE_DTYPES, ids=lambda d: str(d)[6:])
def test_bytes_match_float64(backend, lay, dtype, poisoned, rng):
    ties = 0
    for shape, images, draws in (
        ((2, 64, 5, 7), 2, 3), ((4, 12, 3, 2), 2, 2), ((1, 3, 9, 31), 1, 2), ((6, 5), 3, 2), ((1, 132, 7, 13), 1, 1),
    ):  # fmt: skip
        for affine, relu, per_channel, pool in itertools.product((False, True), repeat=4):
            if pool and len(shape) != 4:
                continue
            x, unit = inputs(dtype, shape)
            x, channels = lay(x), shape[1]
            scale = unit * (torch.randn(channels) if affine else torch.ones(channels))
            shift = torch.randn(channels) if affine else None
            sigma = torch.rand(channels) if per_channel else torch.rand(())
            step, zero_point = float(rng.uniform(0.005, 0.05)), int(rng.integers(0, 256))
            got = functional.add_noise_u8(
                x, sigma, step, zero_point, images=images, draws=draws, scale=scale, shift=shift, act="relu" if relu else None,
                pool=pool, backend=backend, **ADDRESS,
            )  # fmt: skip
            low, high = limits(x, sigma, step, zero_point, images, draws, scale, shift, relu, pool)
            what = (shape, affine, relu, per_channel, pool, step, zero_point)
            memory_layout = "planar" if got[0, 0].numel() == 1 else layout(x)  # one position lies in both layouts alike
            assert got.dtype == torch.uint8 and got.shape == low.shape and layout(got) == memory_layout, what
            assert ((low <= got) & (got <= high)).all(), what
            ties += int((low != high).sum())
    assert ties < 100  # the bound decides nearly every byte: of about 20,000, few lie that near to a tie


def test_saturation_ties_and_nan(backend, poisoned):
    # Without noise the values are exact. 2.5 and 3.5 are ties, to even; the zero point comes after the rounding, so it does not move them.
    extremes = [1e4, -1e4, 3e9, -3e9, 3e38, -3e38, math.inf, -math.inf, math.nan, 1e-30]
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, 254.5, *extremes])
    for lay, zero_point, positions in itertools.product((torch.clone, channels_last), (0, 1, 127, 254, 255), (1, 7, 41)):
        got = functional.add_noise_u8(lay(x.repeat(1, positions, 1).movedim(1, 2)), 0.0, 1.0, zero_point, seed=1, backend=backend)
        want = (x.double().round() + zero_point).clamp(0, 255).nan_to_num(0).to(torch.uint8)
        assert torch.equal(got, want[None, :, None].expand_as(got)), (zero_point, positions)


def test_the_noise_is_that_of_add_noise(backend, rng):
    """One step is far below the noise, so the bytes show eps itself: same sample_ids, same draws, in every layout and packing."""
    clean, sample_ids = torch.randn(2, 20, 6, 3).clamp(-1, 1), torch.tensor([[9, 2], [4, 0]])
    for lay, options in itertools.product((torch.clone, channels_last), (ADDRESS, {**ADDRESS, "sample_ids": sample_ids})):
        want = functional.add_noise(clean, 0.05, images=2, draws=3, backend="torch", **options)
        for x in (clean, torch.cat([clean] * 3)):
            got = functional.add_noise_u8(lay(x), 0.05, 0.01, 128, images=2, draws=3, backend=backend, **options)
            assert (0.01 * (got.double() - 128) - want).abs().max() <= 0.005 + 1e-6


def test_layouts_and_threads_give_the_same_bytes(unit, rng):
    x = torch.randint(0, 256, (6, 68, 19, 33), dtype=torch.uint8)
    options = dict(seed=4, images=3, draws=2, scale=0.02, shift=-0.5, backend="cpu")
    want = functional.add_noise_u8(x, 0.1, 0.017, 30, **options)
    assert torch.equal(functional.add_noise_u8(channels_last(x), 0.1, 0.017, 30, **options), want)
    assert torch.equal(functional.add_noise_u8(x.transpose(2, 3).contiguous().transpose(2, 3), 0.1, 0.017, 30, **options), want)
    torch.set_num_threads(3)  # one_thread puts it back
    assert torch.equal(functional.add_noise_u8(channels_last(x), 0.1, 0.017, 30, **options), want)


def test_clean_is_written_once_a_row_and_keeps_subnormals(unit, library, poisoned):
    tiny = torch.tensor([2.0**-130, -(2.0**-133), 1.0, 0.0]).bfloat16()
    for spatial in ((), (16,), (33,)):  # buffered, planar, and with an end that is no whole vector
        x = tiny.reshape(4, *[1] * len(spatial)).expand(1, 4, *spatial).contiguous()
        noisy, clean = functional.activate_noise(x, 0.1, seed=1, images=1, draws=3, backend="cpu")
        assert torch.equal(clean.view(torch.int16), x.view(torch.int16)) and noisy.shape[0] == 3
    # In a lazily packed batch only the first draw writes clean rows: nothing behind them is touched.
    x, behind = channels_last(torch.randn(2, 8, 5)), torch.full((6, 5, 8), math.nan)
    noisy, clean = packed_like(x, 6), behind[:2].movedim(-1, 1)
    cpu.add_noise(x, noisy, True, torch.tensor(0.1), NoiseAddress(torch.tensor(5), 0, 2, 3), None, None, True, clean)
    assert torch.equal(clean, x.relu()) and behind[2:].isnan().all()


def test_what_the_kernel_does_not_make_is_refused(library):
    arguments = (True, torch.tensor(0.1), NoiseAddress(torch.tensor(5), 0, 2), None, None, False)
    floats, bytes_ = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.uint8)
    for x, out, clean, zero_point in (
        (bytes_, floats.clone(), None, 0), (floats, floats.bfloat16(), None, 0), (bytes_, bytes_.clone(), bytes_.clone(), 0),
        (floats, bytes_.clone(), None, 256), (floats, bytes_.clone(), None, -1),
    ):  # fmt: skip
        before = out.clone()
        with pytest.raises(TypeError, match="does not make"):
            cpu.add_noise(x, out, *arguments, clean=clean, zero_point=zero_point)
        assert torch.equal(out, before)


BYTES = torch.zeros(2, 4, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": BYTES.double()}, TypeError, "x must be float32, bfloat16, float16, uint8 or int32, got torch.float64"),
        ({"step": 0.0}, ValueError, "step must be a positive finite number, got 0.0"),
        ({"step": math.nan}, ValueError, "step must be a positive finite number, got nan"),
        ({"step": torch.tensor(1.0)}, ValueError, "step must be a positive finite number"),
        ({"zero_point": 256}, ValueError, r"zero_point must be in \[0, 255\], got 256"),
        ({"zero_point": 1.5}, TypeError, "zero_point must be an integer, got float"),
        ({"sigma": -0.1}, ValueError, "sigma must be finite and not negative"),
        ({"act": "gelu"}, ValueError, "act must be None or 'relu'"),
        ({"backend": "triton"}, ValueError, "backend must be 'auto', 'cpu' or 'torch' for bytes, got 'triton'"),
        ({"images": 3}, ValueError, "images must equal the rows"),
        ({"pool": True}, ValueError, "x must have 4 dimensions"),
        ({"pool": True, "x": BYTES[..., None]}, ValueError, "x must be at least 2 pixels high and wide to be pooled"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": BYTES, "sigma": 0.1, "step": 0.02, "zero_point": 30, "seed": 1, **change}
    with pytest.raises(error, match=message):
        functional.add_noise_u8(**arguments)


def test_opcheck_and_empty(library):
    sample_ids = torch.tensor([[4, 0], [2**32 - 1, 7]])
    maps = torch.zeros(2, 4, 3, 5, dtype=torch.uint8)
    for x, backend in (
        (BYTES, "auto"), (maps, "auto"), (channels_last(BYTES), "auto"), (channels_last(maps), "auto"), (maps.bfloat16(), "torch"),
        (BYTES[:0].int(), "cpu"),
    ):  # fmt: skip
        pool = x.dim() == 4
        at = NoiseAddress(torch.tensor(3), 3, len(x), 2, 1, 5, sample_ids if len(x) else None)
        args = (x, 0.02, 30, torch.tensor(0.1), *at, torch.rand(4), torch.rand(4), True, pool, backend)
        torch.library.opcheck(ops.add_noise_u8.default, args)
