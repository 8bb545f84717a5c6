"""Converted models under what training adds: activation checkpointing and torch.compile."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rse_fast


class PaddedConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input):
        return super().forward(nn.functional.pad(input, (1, 1, 1, 1)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, rng):
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), PaddedConv(4, 4, 3)), 0.3, 0.2, learnable=True)
    x = torch.rand(2, 3, 8, 8)

    def gradients(run):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(11)
        run(leaf).square().sum().backward()
        return [leaf.grad, *(p.grad.clone() for p in model.parameters())]

    plain = gradients(model)
    replayed = gradients(lambda leaf: checkpoint(model, leaf, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))
    torch.manual_seed(12)
    assert not torch.equal(model(x), model(x))


COMPILE = """
import copy, torch
from torch import nn
import rse_fast

def gradients(run, model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]

torch.manual_seed({seed})
model = nn.Sequential(
    nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Flatten(), nn.LazyLinear(5)
)
x = torch.rand(4, 3, 8, 8)
model(x)
expected = gradients(model, model, x)
rse_fast.convert(model, 0.0, 0.0)
compiled = torch.compile(model, fullgraph=True)
got = gradients(compiled, model, x)
for a, b in zip(got, expected, strict=True):  # sums over at most 4 * 64 positions, in five layers, with a gain of a few
    assert (a - b).abs().max() <= 5 * 256 * torch.finfo(torch.float32).eps * b.abs().max().clamp_min(1), (a - b).abs().max()
model[0].sigma.fill_(0.3)
a, b = gradients(compiled, model, x), gradients(compiled, model, x)
assert all(torch.isfinite(t).all() for t in a)
assert not any(torch.equal(s, t) for s, t in zip(a[:3], b[:3], strict=True)), "the same noise twice"
print("compiled")
"""


@pytest.mark.slow
def test_compile_as_the_first_call_in_a_fresh_process(run_python, rng, tmp_path):
    result = run_python("-c", COMPILE.format(seed=int(rng.integers(2**31))), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert result.stdout.strip() == "compiled", result.stderr
