"""torch.compile: full graphs as the first call of a fresh process, and how often it compiles again."""

import copy

import pytest
import torch
from torch import nn
from traced_graphs import calls, joint_graphs, saved_bytes

import rse_fast

# 1x1 identity: the output is the noisy input, so the weight's gradient must be made of it. A backward that drew new noise would not fit.
NOISY_CONV2D = """
import torch
from rse_fast.nn import NoisyConv2d

layer = NoisyConv2d(4, 4, 1, sigma=torch.tensor([0.1, 0.2, 0.3, 0.4]), bias=False)
layer.weight.data = torch.eye(4)[:, :, None, None]
compiled = torch.compile(layer, fullgraph=True)
x = torch.randn(2, 4, 8, 8, requires_grad=True)
outputs = []
for _ in range(3):
    y = compiled(x)
    g = torch.randn_like(y)
    layer.zero_grad()
    x.grad = None
    y.backward(g)
    expected = torch.einsum("nohw,nihw->oi", g, y.detach())
    assert (layer.weight.grad[:, :, 0, 0] - expected).abs().max() < 128 * 2.0**-23 * 16 * 4  # sums of 128 products, below 16 x 4
    assert torch.allclose(x.grad, g)
    outputs.append(y.detach())
assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2]), "the same noise twice"
spread = (outputs[0] - x.detach()).std((0, 2, 3)) / layer.sigma
assert ((0.7 < spread) & (spread < 1.3)).all(), spread
print("compiled")
"""

ADD_NOISE = """
import torch
from rse_fast import functional

def run(x, sigma, scale, shift, seed):
    return functional.add_noise(x * 2, sigma, seed=seed, images=2, draws=3, scale=scale, shift=shift, act="relu") + 1

compiled = torch.compile(run, fullgraph=True)
leaves = [torch.randn(2, 3, 5, 7), torch.rand(3), torch.rand(3) + 0.5, torch.randn(3)]
for seed in (torch.tensor(4), torch.tensor(-9)):
    found = []
    for function in (compiled, run):
        inputs = [t.clone().requires_grad_() for t in leaves]
        y = function(*inputs, seed)
        g = torch.linspace(-1, 1, y.numel()).view(y.shape)
        found.append([y, *torch.autograd.grad(y, inputs, g)])
    # The op is the same one; around it, sums over 210 positions of values below 16 may be taken in another order.
    assert all((a - b).abs().max() <= 210 * 16 * 2.0**-24 * 3 for a, b in zip(*found))
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", (ADD_NOISE, NOISY_CONV2D), ids=("add_noise", "NoisyConv2d"))
def test_compile_is_the_first_call_of_a_fresh_process(program, run_python, tmp_path):
    done = run_python("-c", program, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.stdout.strip() == "compiled", done.stderr


RECOMPILES = """
import torch
from rse_fast import functional
from rse_fast.nn import NoisyConv2d

def counted(function, calls, prepare=lambda call: None):
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for call in calls:
        prepare(call)
        y = compiled(call)
        prepare(call)
        assert torch.equal(y, function(call)), call
    return len(graphs)

x = torch.randn(6, 3, 8, 8)
add = lambda x=x, sigma=0.1, **address: functional.add_noise(x, sigma, **{"seed": 1, "draws": 2, **address})
for name, values in {
    "seed": (3, 2, -3, 2**40, 2**63 - 1, -(2**63)),
    "sigma": (0.1, 0.2, 0.3, 0.4),
    "draws": (2, 3, 4, 5),
    "image_offset": (0, 6, 12, 2**32 - 6),
    "draw_offset": (0, 2, 4),
    "x": [x[:rows] for rows in (2, 3, 4, 5, 6)],
}.items():
    print(name, counted(lambda value: add(**{name: value}), values))
    if name in ("seed", "sigma"):
        print(name + ", a tensor", counted(lambda value: add(**{name: value}), [torch.tensor(value) for value in values]))
layer = NoisyConv2d(3, 4, 3)

def prepare(x):
    torch.manual_seed(len(x))
    layer.sigma.fill_(len(x) / 10)

print("layer", counted(layer, [x[:rows] for rows in (2, 3, 4, 5)], prepare))
"""


def test_changed_seeds_sigmas_and_batches_compile_at_most_once_more(run_python):
    done = run_python("-c", RECOMPILES)
    counts = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    varied = {"seed", "seed, a tensor", "sigma", "sigma, a tensor", "draws", "image_offset", "draw_offset", "x", "layer"}
    assert set(counts) == varied, done.stderr
    assert all(1 <= int(count) <= 2 for count in counts.values()), counts
    assert counts["seed, a tensor"] == counts["sigma, a tensor"] == "1", counts


TRAINING = """
import copy, torch
from torch import nn
import rse_fast
from rse_fast import Ensemble, functional

torch.set_num_threads(1)
plain = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
)
noisy = rse_fast.convert(copy.deepcopy(plain), include=(nn.Conv2d, nn.Linear))
x = torch.rand(4, 3, 12, 12)

# A step of training: fresh noise, the same from torch.manual_seed, gradients that are those of the eager model with the same noise.
def step(run, model, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = run(x).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

compiled = torch.compile(noisy, fullgraph=True)
first, again, other = (step(compiled, noisy, seed) for seed in (1, 1, 2))
assert all(torch.equal(a, b) for a, b in zip(first, again))
assert not torch.equal(first[0], other[0])

# An ensemble with fresh noise: other noise at every call, no new compilation.
torch._dynamo.reset()
model = rse_fast.convert(copy.deepcopy(plain)).eval()
ensemble = torch.compile(Ensemble(model, 3, dtype="float32"))
torch._dynamo.config.error_on_recompile = True
with torch.no_grad():
    results = [ensemble(x) for _ in range(5)]
torch._dynamo.reset()
assert not any(torch.equal(a, b) for a, b in zip(results, results[1:]))
assert torch.equal(torch.compile(Ensemble(model, 3, seed=4, dtype="float32"))(x), Ensemble(model, 3, seed=4, dtype="float32")(x))
torch._dynamo.config.error_on_recompile = False

# Seeds beyond 63 bits.
add = torch.compile(lambda x, seed: functional.add_noise(x, 0.1, seed=seed), fullgraph=True)
for seed in (3, 4, 2**63, 2**64 - 1, -5, 7):
    assert torch.equal(add(x, seed), functional.add_noise(x, 0.1, seed=seed)), seed
print("compiled")
"""


@pytest.mark.slow
def test_training_ensembles_and_large_seeds_by_the_real_compiler(run_python, tmp_path):
    done = run_python("-c", TRAINING, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.stdout.strip() == "compiled", done.stderr


@pytest.mark.parametrize("learnable", [False, True])
def test_a_compiler_sees_noise_and_a_plain_convolution_and_stores_no_noise(learnable, rng):
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    noisy = rse_fast.convert(copy.deepcopy(plain), include=(nn.Conv2d, nn.Linear), learnable=learnable)
    x = torch.rand(4, 3, 16, 16)
    forward, backward = joint_graphs(noisy, x)
    assert calls(forward)["rse_fast.add_noise.default"] == 3 and calls(forward)["aten.convolution.default"] == 2
    assert calls(backward)["rse_fast.add_noise.default"] == 3 and calls(backward)["aten.convolution_backward.default"] == 2
    assert calls(backward)["rse_fast.sigma_grad.default"] == 3 * learnable
    assert saved_bytes(forward) <= 1.01 * saved_bytes(joint_graphs(plain, x)[0])
