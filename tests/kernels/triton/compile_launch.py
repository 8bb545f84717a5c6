"""A launch that is remembered hands the device what Triton's own look-up hands it: recorded behind a driver that runs nothing."""

from contextlib import contextmanager

import pytest
import torch
import triton
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


def apart(value, offset):
    """A tensor of one value that begins ``offset`` elements behind an aligned address."""
    return torch.tensor([value] * (offset + 1))[offset]


def noise(
    dtype, shape, images=None, *, flat=True, offset=0, small_offset=0, draws=1, affine=False, varies=False, at=0, pool=False, **options
):
    """A launch of add_noise on an input that begins ``offset`` elements behind an aligned address, sigma and seed ``small_offset``."""
    n = torch.Size(shape).numel()
    x = laid(torch.zeros(n + offset, dtype=dtype)[offset:], shape, flat)
    images = images or shape[0]
    out = packed_like(x, images * draws, pool)
    scale, shift = (torch.ones(shape[1]), torch.ones(shape[1])) if affine else (None, None)
    sigma = torch.ones(shape[1]) if varies else apart(0.1, small_offset)
    clean = packed_like(x, shape[0], pool) if options.pop("clean", False) else None
    sample_ids = torch.zeros(images, 2, dtype=torch.int64) if options.pop("sample_ids", False) else None
    address = NoiseAddress(apart(3, small_offset), 5 + at, images, draws, 2**31 + at, at, sample_ids)
    return lambda: add_noise.add_noise(x, out, flat, sigma, address, scale, shift, clean=clean, pool=pool, **options)


def gradient(dtype, shape, *, flat=True, per_channel=False, at=0):
    g = laid(torch.zeros(torch.Size(shape).numel(), dtype=dtype), shape, flat)
    address = NoiseAddress(torch.tensor(3), 5, shape[0], image_offset=at)
    return lambda: sigma_grad.sigma_grad(g, flat, address, per_channel)


def convolution(dtype, c_in, c_out, *, size=8, stride=1, at=0):
    x = torch.zeros(2, size, size, c_in, dtype=dtype).movedim(-1, 1)
    w = torch.zeros(c_out, 1, 1, c_in, dtype=dtype).movedim(-1, 1)
    address = NoiseAddress(torch.tensor(3), 5, 2, image_offset=at)
    return lambda: conv.noisy_conv(x, w, None, torch.tensor(0.1), address, (stride, stride), (0, 0), (1, 1))


def to_dtype(dtype):
    x = torch.zeros(2, 8, 8, 64, dtype=torch.int8).movedim(-1, 1)
    w, ones = torch.zeros(32, 1, 1, 64, dtype=torch.int8).movedim(-1, 1), torch.ones(32)
    address = NoiseAddress(torch.tensor(3), 5, 2)
    return lambda: conv.conv_activate_noise(x, w, torch.tensor(0.1), address, ones, ones, True, (1, 1), (0, 0), (1, 1), dtype)


CASES = {
    "bf16": noise(BF16, (4, 16, 8, 8)),
    "bf16, other words": noise(BF16, (4, 16, 8, 8), at=1),
    "bf16, not aligned": noise(BF16, (4, 16, 8, 8), offset=1),
    "bf16, sigma and seed not aligned": noise(BF16, (4, 16, 8, 8), small_offset=1),
    "bf16, nothing aligned": noise(BF16, (4, 16, 8, 8), offset=1, small_offset=1),
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
    "conv of bytes to bytes": to_dtype(torch.int8),
    "conv of bytes to bf16": to_dtype(BF16),
}


def addresses(records):
    return {a if isinstance(a, int) else a.data_ptr() for *_, arguments in records for a in arguments if isinstance(a, int | torch.Tensor)}


def run(launches, name):
    launches.clear()
    CASES[name]()
    return list(launches)


def test_a_remembered_launch_is_tritons_own(launches, rng):
    config._launches.clear()
    names = list(CASES)
    for name in rng.permutation(names):
        run(launches, name)
    # Sums of sigma's gradient are launches of their own, two of the three alike; one case differs from another in words only.
    assert len(config._launches) == len(CASES) + 2 - 1
    kept, kernels = dict(config._launches), set()
    for name in rng.permutation(names):
        config._launches.clear()
        searched = run(launches, name)  # its tensors live on, so what the other allocates anew lies elsewhere
        config._launches.clear()
        config._launches.update(kept)
        remembered = run(launches, name)
        assert config._launches == kept, name
        assert len(remembered) == len(searched)
        anew = addresses(remembered) ^ addresses(searched)
        for (*launch, arguments), (*launch_searched, arguments_searched) in zip(remembered, searched, strict=True):
            assert launch == launch_searched, name
            for a, b in zip(arguments, arguments_searched, strict=True):
                if isinstance(b, torch.Tensor):
                    assert type(a) is int and (a == b.data_ptr() or {a, b.data_ptr()} <= anew), name
                else:
                    assert type(a) is type(b) and a == b, name
            kernels.add(launch[2])
    assert len(kernels) >= 18  # the cases do ask for different code


def test_while_a_hook_watches_triton_launches(launches, monkeypatch):
    seen, names = [], ("bf16", "sigma_grad")
    plain = {name: run(launches, name) for name in names}

    def entered(metadata):
        seen.append(metadata.get()["name"])

    chains = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    for chain in chains:
        chain.add(entered)
        for name in names:
            seen.clear()
            watched = run(launches, name)
            assert seen == [function[0] for _, _, function, *_ in watched]
            assert [launch[:4] for launch in watched] == [launch[:4] for launch in plain[name]]
            assert any(isinstance(a, torch.Tensor) for a in watched[0][-1])  # what a hook is told of may be read
        chain.remove(entered)
    with monkeypatch.context() as patch:  # a function in place of the chain
        patch.setattr(triton.knobs.runtime, "launch_enter_hook", entered)
        seen.clear()
        assert len(run(launches, "bf16")) == len(seen) == 1
    kernel = add_noise._add_noise_flat_kernel
    kernel.add_pre_run_hook(lambda *args, **options: seen.append(len(args)))
    seen.clear()
    run(launches, "bf16")
    kernel.pre_run_hooks.clear()
    assert len(seen) == 1
    seen.clear()
    ((*_, arguments),) = run(launches, "bf16")
    assert not seen and not any(isinstance(a, torch.Tensor) for a in arguments)  # remembered again


def test_it_goes_to_the_current_stream_of_the_tensors_device(launches, monkeypatch):
    """Two devices and their streams, which the driver that runs nothing only names."""
    current, streams = [0], {-1: 5, 0: 10, 1: 11}

    class OnFirst(torch.Tensor):
        def get_device(self):
            return 0

    class OnSecond(torch.Tensor):
        def get_device(self):
            return 1

    @contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(driver.active, "get_current_device", lambda: current[0])
    monkeypatch.setattr(driver.active, "get_current_stream", lambda device: streams[device])
    monkeypatch.setattr(torch.cuda, "device", device)
    config._launches.clear()

    def launch(kind):
        launches.clear()
        x = torch.zeros(4, 16, 8, 8).as_subclass(kind)
        add_noise.add_noise(x, x, False, torch.tensor(0.1), NoiseAddress(torch.tensor(3), 0, 4))
        ((_, stream, (_, _, address), *_),) = launches
        return stream, address

    for _ in range(2):  # searched, then remembered
        assert launch(OnSecond) == (11, 1) and current == [0]
        assert launch(OnFirst) == (10, 0)
    streams[1] = 12
    assert launch(OnSecond) == (12, 1)
    current[0] = 1
    assert launch(OnSecond) == (12, 1) and launch(OnFirst) == (10, 0) and current == [1]


def test_shapes_without_end_do_not_fill_the_memory(launches, monkeypatch):
    config._launches.clear()
    monkeypatch.setattr(config, "_launches", dict.fromkeys(range(4096)))
    CASES["bf16"]()
    assert len(config._launches) == 1
