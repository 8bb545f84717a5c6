"""torch.compile: full graphs as the first call of a fresh process, and how often it compiles again."""

import pytest

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
add = lambda x=x, sigma=0.1, **where: functional.add_noise(x, sigma, **{"seed": 1, "draws": 2, **where})
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
