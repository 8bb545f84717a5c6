"""A launch that is remembered hands the device what Triton's own look-up hands it: recorded behind a driver that runs nothing."""

import pytest
import torch
from triton.runtime import driver

from rse_fast.address import NoiseAddress
from rse_fast.bench.host import still_driver
from rse_fast.kernels.triton import add_noise, config, conv, sigma_grad
from rse_fast.layout import packed_like

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def launches():
    """What was handed to the device, launch by launch (see `still_driver`)."""
    found = []
    driver.set_active(still_driver(found.append))
    return found


def laid(values, shape, flat):
    """``values`` as a tensor of this shape [N, C, *spatial], channels last where ``flat``."""
    return values.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if flat else values.view(shape)


def noise(dtype, shape, images=None, *, flat=True, offset=0, draws=1, affine=False, varies=False, at=0, pool=False, **more):
    """A launch of add_noise on an input that begins ``offset`` elements behind an aligned address."""
    n = torch.Size(shape).numel()
    x = laid(torch.zeros(n + offset, dtype=dtype)[offset:], shape, flat)
    images = images or shape[0]
    out = packed_like(x, images * draws, pool)
    scale, shift = (torch.ones(shape[1]), torch.ones(shape[1])) if affine else (None, None)
    sigma = torch.ones(shape[1]) if varies else torch.tensor(0.1)
    clean = packed_like(x, shape[0], pool) if more.pop("clean", False) else None
    sample_ids = torch.zeros(images, 2, dtype=torch.int64) if more.pop("sample_ids", False) else None
    where = NoiseAddress(torch.tensor(3), 5 + at, images, draws, 2**31 + at, at, sample_ids)
    return lambda: add_noise.add_noise(x, out, flat, sigma, where, scale, shift, clean=clean, pool=pool, **more)


def gradient(dtype, shape, *, flat=True, per_channel=False, at=0):
    g = laid(torch.zeros(torch.Size(shape).numel(), dtype=dtype), shape, flat)
    where = NoiseAddress(torch.tensor(3), 5, shape[0], image_offset=at)
    return lambda: sigma_grad.sigma_grad(g, flat, where, per_channel)


def convolution(dtype, c_in, c_out, *, size=8, stride=1, at=0):
    x = torch.zeros(2, size, size, c_in, dtype=dtype).movedim(-1, 1)
    w = torch.zeros(c_out, 1, 1, c_in, dtype=dtype).movedim(-1, 1)
    where = NoiseAddress(torch.tensor(3), 5, 2, image_offset=at)
    return lambda: conv.noisy_conv(x, w, None, torch.tensor(0.1), where, (stride, stride), (0, 0), (1, 1))


CASES = {
    "bf16": noise(BF16, (4, 16, 8, 8)),
    "bf16, other words": noise(BF16, (4, 16, 8, 8), at=1),
    "bf16, not aligned": noise(BF16, (4, 16, 8, 8), offset=1),
    "f16": noise(F16, (4, 16, 8, 8)),
    "contiguous": noise(F32, (4, 16, 8, 8), flat=False),
    "one position": noise(F32, (4, 16, 1, 1), flat=False),
    "more rows": noise(BF16, (48, 16, 8, 8)),
    "packed lazily": noise(BF16, (4, 16, 8, 8), draws=3),
    "packed already": noise(BF16, (12, 16, 8, 8), images=4, draws=3),
    "affine": noise(BF16, (4, 16, 8, 8), affine=True),
    "affine, relu": noise(BF16, (4, 16, 8, 8), affine=True, relu=True),
    "sigma a channel": noise(BF16, (4, 16, 8, 8), varies=True),
    "clean, sample_ids": noise(BF16, (4, 16, 8, 8), clean=True, sample_ids=True),
    "pool": noise(BF16, (4, 16, 8, 8), pool=True),
    "pool, odd": noise(BF16, (4, 16, 9, 8), pool=True),
    "sigma_grad": gradient(F32, (4, 16, 8, 8)),
    "sigma_grad, more rows": gradient(F32, (48, 16, 8, 8), at=7),
    "sigma_grad, contiguous, a channel": gradient(BF16, (4, 6, 8, 8), flat=False, per_channel=True),
    "conv": convolution(BF16, 64, 32),
    "conv, stride": convolution(BF16, 64, 32, stride=2),
    "conv, other sizes": convolution(BF16, 64, 32, size=16, at=1),
}


def pointers(records):
    return {a.data_ptr() for *_, arguments in records for a in arguments if isinstance(a, torch.Tensor)}


def test_a_remembered_launch_is_tritons_own(launches, rng):
    config._launches.clear()

    def run(name):
        launches.clear()
        CASES[name]()
        return list(launches)

    names = list(CASES)
    for name in rng.permutation(names):
        run(name)
    # Sums of sigma's gradient are launches of their own, two of the three alike; one case differs from another in words only.
    assert len(config._launches) == len(CASES) + 2 - 1
    kept, kernels = dict(config._launches), set()
    for name in rng.permutation(names):
        remembered = run(name)
        assert config._launches == kept, name
        config._launches.clear()
        searched = run(name)
        config._launches.clear()
        config._launches.update(kept)
        shared = pointers(remembered) & pointers(searched)  # the others are allocated anew at each call
        assert len(remembered) == len(searched)
        for (*launch, arguments), (*launch_searched, arguments_searched) in zip(remembered, searched, strict=True):
            assert launch == launch_searched, name
            for a, b in zip(arguments, arguments_searched, strict=True):
                if isinstance(a, torch.Tensor):
                    assert (a.dtype, a.shape) == (b.dtype, b.shape), name
                    assert a.data_ptr() == b.data_ptr() or shared.isdisjoint((a.data_ptr(), b.data_ptr())), name
                else:
                    assert type(a) is type(b) and a == b, name
            kernels.add(launch[2])
    assert len(kernels) >= 15  # the cases do ask for different code


def test_shapes_without_end_do_not_fill_the_memory(launches, monkeypatch):
    config._launches.clear()
    monkeypatch.setattr(config, "_launches", dict.fromkeys(range(4096)))
    CASES["bf16"]()
    assert len(config._launches) == 1
