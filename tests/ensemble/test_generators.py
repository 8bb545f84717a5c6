"""Torch's generators: what a model draws from them by itself in probes and refused calls is taken back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rse_fast
import rse_fast.certifiable
from rse_fast import Ensemble
from rse_fast.trace import RandomOpDetector

pytestmark = pytest.mark.usefixtures("one_thread")


class Shaken(nn.Module):
    """Draws numbers of torch's generator of the CPU, and of that of its images, by itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        y = self.conv(x) * torch.rand(()).item() + torch.randn((), device=x.device)
        return self.fc(F.dropout(y.mean((2, 3)), 0.5, training=True))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
)
def test_probes_and_refusals_leave_torchs_generators_as_they_were(device, fuse, rng):
    """For a model that draws numbers of its own: what makes an ensemble ready, and what refuses, runs it and takes the numbers back."""
    model, x = rse_fast.convert(Shaken().to(device)), torch.rand(3, 3, 10, 10).to(device)

    def states():
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device == "cuda" else [])]

    before = states()
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\] with C = 3 channels"):
        Ensemble(model, 3, fuse=fuse).predict(x[:, :2])
    with pytest.raises(ValueError, match="to be certified; it draws random numbers of its own"):
        rse_fast.certify(Ensemble(model, 3, fuse=fuse), x, n=20)
    Ensemble(model, 3, fuse=fuse).prepared(x)
    assert all(map(torch.equal, states(), before))


def test_a_refused_certificate_takes_its_numbers_back_whatever_it_was_refused_for(rng):
    class Fails(Shaken):
        def forward(self, x):
            torch.rand(())
            raise RuntimeError("out of order")

    model, x = rse_fast.convert(Fails()), torch.rand(1, 3, 10, 10)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of order"):
        rse_fast.certifiable.input_noise(model, x)
    assert torch.equal(torch.get_rng_state(), before)


LSTM = nn.LSTM(8, 8, num_layers=2, dropout=0.5)
OPS = {
    "attention": F.scaled_dot_product_attention,
    "attention without dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=True),
    "attention with dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
    "dropout": lambda q, k, v: F.dropout(q, 0.5),
    "dropout in eval": lambda q, k, v: torch.native_dropout(q, 0.5, False),
    "dropout by default": lambda q, k, v: torch.native_dropout(q, 0.5, None),
    "alpha dropout": lambda q, k, v: F.alpha_dropout(q, 0.5, training=True),
    "rrelu": lambda q, k, v: F.rrelu(q, training=True),
    "rrelu in eval": lambda q, k, v: F.rrelu(q),
    "lstm": lambda q, k, v: LSTM.train()(q[0]),
    "lstm in eval": lambda q, k, v: LSTM.eval()(q[0]),
    "numbers": lambda q, k, v: torch.rand_like(q),
    "bernoulli": lambda q, k, v: torch.bernoulli(k.sigmoid()),
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_an_op_that_may_draw_is_told_from_one_that_does(op, gradient, rng):
    """Attention holds a dropout, so torch says of every call that it may draw."""
    values = torch.from_numpy(rng.standard_normal((3, 2, 2, 5, 8))).float().requires_grad_(gradient)
    before = torch.get_rng_state()
    with RandomOpDetector() as detector:
        OPS[op](*values)
    assert detector.any != torch.equal(torch.get_rng_state(), before)
