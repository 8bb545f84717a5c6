"""Torch's generators: what a model draws from them by itself in probes and refused calls is taken back."""

import pytest
import torch
from torch import nn

import rse_fast
import rse_fast.certifiable
from rse_fast import Ensemble

pytestmark = pytest.mark.usefixtures("one_thread")


class Shaken(nn.Module):
    """Draws numbers of torch's generator of the CPU, and of that of its images, by itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        y = self.conv(x) * torch.rand(()).item() + torch.randn((), device=x.device)
        return self.fc(nn.functional.dropout(y.mean((2, 3)), 0.5, training=True))


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
