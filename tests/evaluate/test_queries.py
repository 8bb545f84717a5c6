"""What `Queries` does with the gradients that attacks get: it counts those that lead nowhere, and keeps others from vanishing."""

import pytest
import torch
from nearest_mean import nearest_mean

for package in ("safetensors", "sklearn", "tqdm"):
    pytest.importorskip(package)

from rse_fast import data  # noqa: E402
from rse_fast.evaluate import Case  # noqa: E402
from rse_fast.evaluate.target import Queries, Target  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_gradients_are_watched(rng):
    """Of 4 images one has a gradient that is NaN and two have none at all."""

    class Strange(torch.nn.Module):
        def forward(self, x):
            flat = x.flatten(1).sum(1)
            factor = torch.tensor([1.0, 0.0, 0.0, 1.0])
            broken = torch.where(torch.tensor([False, False, False, True]), flat * 0, torch.ones_like(flat)).sqrt()
            return torch.stack([flat * factor + broken, flat * 0], 1)

    queries = Queries(Strange(), 1)
    assert queries.gradients is None
    x = torch.rand(4, 1, 2, 2)
    queries(x)
    assert queries.gradients is None
    x.requires_grad_()
    torch.autograd.grad(queries(x).sum(), x)
    assert queries.gradients == {"nan": 0.25, "right": 1.0, "zero": 0.5}


@pytest.mark.parametrize("draws", (1, 4))
def test_gradients_of_confident_images_do_not_vanish_in_float16(draws):
    net = nearest_mean(True)
    with torch.no_grad():
        net[2].weight.mul_(8)
    x = data.digits().test.images[:32].float() / 255
    found = {}
    for dtype in ("float32", "float16"):
        queries = Target(net, draws, dtype=dtype).queries(Case("a", "pgd", eot=draws), 3)
        y = queries(x).argmax(-1)
        queries.calls, images = 0, x.clone().requires_grad_()
        logits = queries(images)
        (found[dtype],) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y, reduction="sum"), images)
        assert queries.gradients["zero"] == 0 and (logits.detach().exp().amax(-1) > 1 - 1e-6).any()
    cosines = torch.nn.functional.cosine_similarity(*(g.double().flatten(1) for g in found.values()))
    assert (cosines > 0.99).all()


def test_a_gradient_may_vanish_once_the_attack_has_its_aim(rng):
    """DLR has no slope where the true class is third, C&W none beyond its margin. Where an image is still right, a zero counts."""

    class First(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1).mean(1, keepdim=True) * torch.tensor([3.0, 2.0, 1.0])

    def zeros(labels, chosen, loss):
        queries = Queries(First(), 1)
        queries.about(x, torch.tensor(labels))
        some = x[chosen].clone().requires_grad_()
        torch.autograd.grad(loss(queries(some)), some)
        assert queries.gradients["right"] == sum(labels[i] == 0 for i in chosen) / len(chosen)
        return queries.gradients["zero"]

    def flat(logits):
        return (logits * 0).sum()

    x = torch.rand(4, 1, 2, 2) + torch.arange(4).view(4, 1, 1, 1)
    assert zeros([2, 2, 2, 2], [0, 1, 2, 3], flat) == 0.0
    assert zeros([0, 2, 2, 0], [0, 1, 2, 3], flat) == 0.5
    assert zeros([0, 2, 2, 0], [3, 1], flat) == 0.5 and zeros([0, 2, 2, 0], [3], flat) == 1.0  # an attack may ask about some alone
    assert zeros([0, 2, 2, 0], [0, 1, 2, 3], torch.sum) == 0.0
