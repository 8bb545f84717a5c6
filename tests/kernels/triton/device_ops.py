"""On a device: the ops as torch runs them. Streams, graphs, compilation, synchronisation, other devices' noise."""

import pytest
import torch

from rse_fast import functional, noise, ops, reference
from rse_fast.address import NoiseAddress
from rse_fast.kernels.triton import config


def test_the_kernels_are_what_auto_takes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert noise.active_backend(torch.zeros(1, dtype=dtype)) == "triton"
    assert noise.active_backend(torch.zeros(1, dtype=torch.float64)) == "torch"
    assert noise.active_backend(torch.zeros(1, device="cpu")) != "triton"


def test_noise_is_that_of_the_cpu():
    for shape in ((2, 3, 32, 32), (2, 64, 7, 7)):
        x = torch.zeros(shape, device="cpu")
        here = functional.add_noise(x.cuda(), 1.0, seed=5, stream=2, draws=3, images=2)
        there = functional.add_noise(x, 1.0, seed=5, stream=2, draws=3, images=2)
        assert (here.cpu() - there).abs().max() <= 1e-3
        assert ((here.cpu() - there).abs() > 2.1e-5).float().mean() < 2e-3


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_more_rows_and_positions_than_any_tile(layout):
    x = torch.randn(40, 64, 112, 113).bfloat16().to(memory_format=layout)
    seed, sigma = torch.tensor(3), torch.rand(64)
    scale, shift = torch.randn(64), torch.randn(64)
    y = functional.add_noise(x, sigma, seed=seed, images=40, draws=2, scale=scale, shift=shift, act="relu")
    for rows in (slice(0, 2), slice(38, 40)):
        want = reference.add_noise(x[rows].double(), sigma, *NoiseAddress(seed, 0, 2, 1, rows.start), scale, shift, True)
        assert ((y[rows].double() - want).abs() <= 0.02 + want.abs() * 2.0**-7).all()
    assert y.isfinite().all()


def test_no_call_waits_for_the_device(rng):
    x, sigma, seed = torch.randn(8, 16, 9, 9, requires_grad=True), torch.tensor(0.1, requires_grad=True), torch.tensor(3)
    functional.add_noise(x, sigma, seed=seed).sum().backward()  # compiled before it counts
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional.add_noise(x, sigma, seed=seed).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_taken():
    x, seed = torch.zeros(64, 64, 64, 64), torch.tensor(3)
    want = functional.add_noise(x + 1, 0.1, seed=seed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        y = functional.add_noise(x + 1, 0.1, seed=seed)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, want)


def test_a_captured_graph_takes_the_seed_of_each_replay():
    x, seed = torch.zeros(2, 8, 16, 16), torch.tensor(1)
    functional.add_noise(x, 1.0, seed=seed)
    sigma, graph = torch.tensor(1.0), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = functional.add_noise(x, sigma, seed=seed)
    for value in (7, -5):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y, functional.add_noise(x, 1.0, seed=value))


def test_under_compile_the_values_are_the_same():
    def f(x, sigma, seed):
        return functional.add_noise(x.relu(), sigma, seed=seed, images=4, draws=2) * 2

    x, sigma, seed = torch.randn(4, 8, 9, 9), torch.tensor(0.3), torch.tensor(11)
    assert torch.equal(torch.compile(f, fullgraph=True)(x, sigma, seed), f(x, sigma, seed))


def test_opcheck(seed):
    x, sigma = torch.randn(2, 5, 4, requires_grad=True), torch.rand(5, requires_grad=True)
    at, affine = NoiseAddress(seed, 1, 2, 3), (torch.rand(5), torch.rand(5), True)
    torch.library.opcheck(torch.ops.rse_fast.add_noise, (x, sigma, *at, *affine, "triton"))
    torch.library.opcheck(torch.ops.rse_fast.sigma_grad, (torch.randn(6, 5, 4, requires_grad=True), *at, True, "triton"))
    weight = torch.randn(6, 5, 3, requires_grad=True)
    conv = ([1], [1], [1], 1, "triton")
    torch.library.opcheck(torch.ops.rse_fast.noisy_conv, (x, weight, None, sigma, *at, *conv), rtol=1e-2, atol=1e-2)
    linear = (torch.randn(2, 4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True), None, sigma)
    torch.library.opcheck(torch.ops.rse_fast.noisy_linear, (*linear, *at, "triton"))
    options = (torch.rand(5), *at, *affine)
    for layout in (torch.contiguous_format, torch.channels_last):
        image = torch.randn(2, 5, 6, 7).to(memory_format=layout)
        torch.library.opcheck(torch.ops.rse_fast.activate_noise, (image, *options, True, "triton", True))
    one, x32 = ([1, 1], [0, 0], [1, 1], 1, None, "triton"), torch.randint(-9, 9, (2, 32, 6, 7), dtype=torch.int8)
    half = torch.randn(2, 5, 6, 7).half()
    for image, weight in (
        (half, torch.randn(5, 5, 1, 1).half()),  # the kernel
        (half, torch.randn(5, 5, 3, 3).half()),  # the vendor's convolution, then one pass
        (x32, torch.randint(-9, 9, (5, 32, 3, 3), dtype=torch.int8)),
    ):
        torch.library.opcheck(torch.ops.rse_fast.conv_activate_noise, (image, weight, *options, *one))


def test_each_key_has_its_own_meaning_of_auto():
    """One schema: CUDA tensors get the kernels, CPU tensors the library or the plain form; values agree within the contract."""
    x, sigma = torch.randn(2, 5, 6, 7), torch.rand(5)
    for function in (functional.add_noise, lambda *args, **options: functional.activate_noise(*args, **options)[1]):
        here, there = function(x, sigma, seed=3), function(x.cpu(), sigma.cpu(), seed=3)
        assert here.is_cuda and not there.is_cuda and (here.cpu() - there).abs().max() <= 1e-3


def test_under_autocast():
    """The policy, as on the CPU: convolutions and linear layers cast as the plain ones; noise alone, int8 and fp8 keep their dtype."""
    x, w, low = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.bfloat16
    byte = torch.randint(-128, 128, (2, 64, 5, 5), dtype=torch.int8), torch.randint(-128, 128, (6, 64, 3, 3), dtype=torch.int8)
    at = dict(sigma=0.1, seed=1)
    for function, inputs, dtype in (
        (lambda x, w: functional.noisy_conv2d(x, w, None, **at), (x, w), low),
        (lambda x, w: functional.noisy_linear(x, w, None, **at), (x[..., 0, :], torch.randn(7, 5)), low),
        (lambda x, w: functional.conv_activate_noise(x, w, act="relu", **at), (x, w), low),
        (lambda x, w: functional.conv_activate_noise(x, w, **at), byte, torch.int8),
        (lambda x: functional.add_noise(x, **at), (x,), torch.float32),
        (lambda x: functional.activate_noise(x, **at)[1], (x,), torch.float32),
    ):
        with torch.autocast("cuda", low):
            y = function(*inputs)
        want = function(*(t.to(low) if dtype == low else t for t in inputs))
        assert y.dtype == dtype and torch.allclose(y.float(), want.float(), rtol=2.0**-7, atol=1e-2)


def test_autotuning_changes_no_bit_of_the_noise(monkeypatch, tmp_path):
    x, seed = torch.randn(8, 64, 32, 32).bfloat16(), torch.tensor(3)
    at = NoiseAddress(seed, 0, 8)
    images, sigma = x.contiguous(memory_format=torch.channels_last), torch.tensor(5.0)
    byte, weight = torch.randint(-9, 9, (8, 64, 32, 32), dtype=torch.int8), torch.randint(-9, 9, (64, 64, 1, 1), dtype=torch.int8)
    one = ([1, 1], [0, 0], [1, 1], 1, None, "triton")
    exact = (
        lambda: functional.add_noise(x, 0.3, seed=seed),
        lambda: functional.add_noise_(x.clone(), 0.3, seed=seed),
        lambda: functional.activate_noise(images, 0.3, seed=seed, act="relu", pool=True)[0],
        lambda: ops.conv_activate_noise(byte, weight, sigma, *at, None, None, True, *one),
    )
    within = (  # sums in another order
        (lambda: ops.sigma_grad(images, *at, True, "triton"), 1e-2),
        (lambda: functional.noisy_conv2d(images, weight.bfloat16(), None, 0.3, seed=seed).float(), 4.0),
    )
    plain = [call() for call in exact], [call() for call, _ in within]
    monkeypatch.setenv(config.AUTOTUNE_VARIABLE, "1")
    monkeypatch.setenv(config.CACHE_VARIABLE, str(tmp_path))
    for _ in range(2):
        assert all(torch.equal(call(), want) for call, want in zip(exact, plain[0], strict=True))
        assert all((call() - want).abs().max() <= allowed for (call, allowed), want in zip(within, plain[1], strict=True))
    written = config.cache_file().read_text()
    assert all(kernel in written for kernel in ("add_noise", "sigma_grad", "conv noise_in1", "conv noise_in0"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_tensor_runs_on_its_own_device():
    x = torch.zeros(2, 3, 8, 8)
    assert torch.equal(functional.add_noise(x.to("cuda:1"), 1.0, seed=3).cpu(), functional.add_noise(x, 1.0, seed=3).cpu())
