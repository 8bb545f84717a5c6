"""A training step with noise: what it holds in memory, and gradients of whole networks under everything that training adds."""

import copy
import functools
import math
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_nets import Block, Head
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import rse_fast
from bench.measure import peak_memory
from bench.train import saved_bytes
from rse_fast import autograd, reference
from rse_fast.context import NoiseContext
from rse_fast.models import VGG16, ResNeXt29
from rse_fast.nn import NoisyConv2d, noise_layers

pytestmark = pytest.mark.usefixtures("one_thread", "gradients_of_small_inputs")


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 32), Block(32, 64), nn.Dropout(0.0), Head(64)
    )  # fmt: skip


def eager(model, sigma, eps):
    """A copy of a plain model with ``x + sigma * eps`` in front of every convolution, eps a function of the convolution's number and x."""
    model = copy.deepcopy(model)
    for index, conv in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv.register_forward_pre_hook(lambda _, args, i=index: (args[0] + sigma * eps(i, args[0]),))
    return model


# ------------------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("network", (VGG16, ResNeXt29, resnet))
def test_activations_held_for_backward_are_the_plain_networks(network, rng):
    plain = network()
    noisy = rse_fast.convert(copy.deepcopy(plain), 0.2, 0.1)
    naive = eager(plain, 0.1, lambda _, x: torch.randn_like(x))
    x = torch.rand(2, 3, 32, 32)

    def saved(model):
        return saved_bytes(lambda: (model, model(x)))

    assert saved(naive) > 1.1 * saved(plain)  # the measure sees what noise layers usually hold
    assert saved(noisy) <= 1.01 * saved(plain)


PEAK = """
import sys, torch
from torch import nn
import rse_fast

def high_water():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

torch.set_num_threads(1)
layers = [nn.Conv2d(3, 16, 3, padding=1)]
for _ in range(20):  # a ReLU in place: what is saved for it is what the next convolution saves
    layers += [nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1, bias=False)]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
if sys.argv[1] == "noisy":
    rse_fast.convert(model, 0.2, 0.1)
elif sys.argv[1] == "eager":
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv.register_forward_pre_hook(lambda _, args: (args[0] + 0.1 * torch.randn_like(args[0]),))
optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

def step(images):
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(torch.rand(images, 3, 64, 64)), torch.arange(images)).backward()
    optimiser.step()

step(1)  # what a first step leaves behind: momentum, code, thread pools
before = high_water()
step(8)
print(before, high_water())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_of_resident_memory_is_the_plain_networks(run_python):
    def peak(kind):
        done = run_python("-c", PEAK, kind, MALLOC_MMAP_THRESHOLD_="65536", OMP_WAIT_POLICY="passive")  # freed memory goes back at once
        before, after = map(int, done.stdout.split() or pytest.fail(done.stderr))
        return after, after - before

    with ThreadPoolExecutor() as pool:
        plain, noisy, naive = pool.map(peak, ("plain", "noisy", "eager"))
    assert noisy[0] <= 1.03 * plain[0]
    assert noisy[1] <= 1.03 * plain[1], (plain, noisy)  # the step's own part, without Python, torch and the weights
    assert naive[1] > 1.1 * plain[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_holds_one_more_buffer_at_a_time(dtype):
    """The noisy input that the weight's gradient reads and the gradient of the input have the same size: never both."""
    plain, noisy = nn.Conv2d(16, 16, 3, padding=1, dtype=dtype), NoisyConv2d(16, 16, 3, padding=1, dtype=dtype)
    x = torch.rand(8, 16, 160, 160, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert x.nbytes > autograd.ONE_CALL  # smaller ones are worth one call

    def peak(layer):
        y = layer(x)
        g = torch.ones_like(y)
        return peak_memory(lambda: torch.autograd.grad(y, [x, *layer.parameters()], g, retain_graph=True)) * 1e6 / x.nbytes

    assert 1 <= peak(plain) and peak(noisy) < peak(plain) + 0.1


# ------------------------------------------------------------------------------------------------------------------------ gradients
def gradients(model, x, labels, run=None):
    """Loss and the gradients of the image and of every parameter."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    loss = cross_entropy((run or model)(leaf).to(x.dtype), labels)
    loss.backward()
    return [loss.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_network_has_the_gradients_of_eager_noise_layers_with_the_same_eps(rng):
    plain, sigma, seed = resnet().double(), 0.3, int(rng.integers(2**62))
    x, labels = torch.rand(4, 3, 12, 12, dtype=torch.float64), torch.arange(4)

    def eps(stream, x):
        rows, channels, *spatial = x.shape
        noise = torch.from_numpy(reference.gaussian(seed, stream, rows, 1, channels, math.prod(spatial)))  # [rows, positions, channels]
        return noise.movedim(-1, 1).reshape(x.shape)

    noisy = rse_fast.convert(copy.deepcopy(plain), sigma, sigma)
    for layer in noise_layers(noisy).values():
        layer.sigma = layer.sigma.double().fill_(sigma)  # 0.3 in float64 on both sides
    with NoiseContext(torch.tensor(seed), 4):
        found = gradients(noisy, x, labels)
    expected = gradients(eager(plain, sigma, eps), x, labels)
    # float64 in another order: sums of at most 4 * 144 terms, in 8 layers there and back. A bias before a BatchNorm has gradient 0.
    error = 16 * 576 * torch.finfo(torch.float64).eps * max(g.abs().max() for g in expected)
    assert all((a - b).abs().max() <= error for a, b in zip(found, expected, strict=True)) and error < 1e-9
    without_noise = gradients(plain, x, labels)
    assert (found[0] - without_noise[0]).abs() > 1e-3


@pytest.fixture
def network():
    return rse_fast.convert(resnet(), 0.3, 0.2, learnable=True)


@pytest.fixture
def batches():
    return [(torch.rand(4, 3, 12, 12), torch.arange(4) + i) for i in range(2)]


def fixed_statistics(model):
    """BatchNorm by its running statistics, so that one batch does not enter another's gradient."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def test_gradients_accumulate_and_forwards_may_come_before_backwards(network, batches, rng):
    fixed_statistics(network)
    torch.manual_seed(3)
    apart = [gradients(network, *batch)[2:] for batch in batches]  # backward draws nothing: the second forward goes on where the first was
    expected = [a + b for a, b in zip(*apart, strict=True)]
    torch.manual_seed(3)
    network.zero_grad()
    losses = [cross_entropy(network(x), labels) for x, labels in batches]
    for loss in losses:
        loss.backward()
    assert same([p.grad for p in network.parameters()], expected)
    torch.manual_seed(3)
    network.zero_grad()
    sum(cross_entropy(network(x), labels) for x, labels in batches).backward()  # one backward for two forwards
    assert same([p.grad for p in network.parameters()], expected)
    torch.manual_seed(4)
    assert not same(gradients(network, *batches[0])[2:], apart[0])


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
def test_checkpointed_blocks_under_autocast(network, batches, dtype, reentrant, rng):
    fixed_statistics(network)
    x, labels = batches[0]

    def autocast(x, block):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return block(x)

    def in_pieces(x):
        for block in network:
            x = checkpoint(autocast, x, block, use_reentrant=reentrant)
        return x

    torch.manual_seed(6)
    expected = gradients(network, x, labels, functools.partial(autocast, block=network))
    torch.manual_seed(6)
    assert same(gradients(network, x, labels, in_pieces), expected)


def test_a_gradient_can_be_differentiated(rng):
    """As a gradient penalty does it: the second derivatives of a network, learnable sigmas included, against finite differences."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    model = rse_fast.convert(model, 0.3, 0.2, learnable=True).double()
    names, values = zip(*model.named_parameters(), strict=True)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)

    def run(x, *parameters):
        with NoiseContext(torch.tensor(5), 3):
            return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [t.detach().double().requires_grad_() for t in (x, *values)]
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


RANK = """
import json, sys, torch
from torch import nn
import rse_fast

rank, ranks, port = map(int, sys.argv[1:])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
torch.manual_seed(7)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
rse_fast.convert(model, 0.3, 0.2, learnable=True)
x = torch.rand(2, 3, 8, 8)

def gradients(model):
    torch.manual_seed(11)  # the same on all ranks
    model.zero_grad()
    model(x).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

own = gradients(model)
everyone = [torch.empty_like(own) for _ in range(ranks)]
torch.distributed.all_gather(everyone, own)
reduced = gradients(nn.parallel.DistributedDataParallel(model))
assert not torch.equal(everyone[0], everyone[1]), "the same noise on both ranks"
mean = sum(everyone) / ranks
assert (reduced - mean).abs().max() <= 4 * torch.finfo(torch.float32).eps * mean.abs().max(), (reduced - mean).abs().max()
print("equal", flush=True)  # before torch takes its threads down, which now and then aborts the process
torch.distributed.barrier()  # and neither does so while the other needs it
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_their_own_noise(run_python):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda rank: run_python("-c", RANK, rank, 2, port, OMP_WAIT_POLICY="passive"), range(2)))
    assert [r.stdout.strip() for r in results] == ["equal", "equal"], results[0].stderr + results[1].stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_gets_fresh_noise_and_right_gradients(rng):
    """1x1 identity: the output is the noisy input, of which the weight's gradient must be made, at each replay anew."""
    layer = NoisyConv2d(4, 4, 1, sigma=0.3, bias=False).cuda()
    layer.weight.data = torch.eye(4, device="cuda")[:, :, None, None]
    x, g = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 4, 8, 8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer.zero_grad(set_to_none=True)
            layer(x).backward(g)
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(g)
    seen = []
    for _ in range(3):
        layer.weight.grad.zero_()
        graph.replay()
        seen.append(y.detach().clone())
        expected = torch.einsum("nohw,nihw->oi", g.double(), seen[-1].double())
        error = 128 * 2.0**-11 * torch.einsum("nohw,nihw->oi", g.abs(), seen[-1].abs())  # TF32 products
        assert ((layer.weight.grad[:, :, 0, 0] - expected).abs() <= error).all()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
