"""The temperature of an ensemble: what it changes and what not, a known one is recovered, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn

import rse_fast

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(rng):
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    net[4].weight.data *= 20
    return rse_fast.convert(net, 0.4, 0.3).eval()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("early_exit", [None, "exact"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_probs_are_those_of_one_to_the_power_of_the_inverse(model, rng, temperature, early_exit, fuse):
    x = torch.rand(9, 1, 7, 5)
    options = {"seed": 4, "fuse": fuse, "early_exit": early_exit, "dtype": "float32"}
    plain = rse_fast.Ensemble(model, 8, **options).predict(x)
    ensemble = rse_fast.Ensemble(model, 8, temperature=temperature, **options)
    out = ensemble.predict(x)
    powered = plain.probs.double() ** (1 / temperature)
    powered /= powered.sum(-1, keepdim=True)
    assert (out.probs - powered).abs().max() < 4e-6
    assert torch.allclose(out.entropy.double(), -torch.special.xlogy(powered, powered).sum(-1), atol=3e-5)
    for same in ("labels", "votes", "mutual_information", "draws_used"):
        assert torch.equal(getattr(out, same), getattr(plain, same)), same
    if early_exit is None:
        assert (ensemble(x).exp() - out.probs).abs().max() < 4e-6
    assert (f"temperature={temperature:g}" in repr(ensemble)) == (temperature != 1)


def test_the_gradient_is_that_of_what_forward_returns(model, rng):
    x, labels = torch.rand(3, 1, 7, 7), torch.tensor([0, 3, 1])
    found = {}
    for temperature in (1.0, 2.0):
        leaf = x.clone().requires_grad_()
        log_p = rse_fast.Ensemble(model, 6, seed=1, temperature=temperature, dtype="float32")(leaf)
        if temperature == 1:
            log_p = (log_p / 2).log_softmax(-1)
        found[temperature] = torch.autograd.grad(log_p.gather(1, labels[:, None]).sum(), [leaf, *model.parameters()])
    for by_hand, ours in zip(found[1.0], found[2.0], strict=True):
        assert torch.allclose(by_hand, ours, rtol=1e-3, atol=1e-5 * float(by_hand.abs().max()))


def test_nan_and_probabilities_of_0_stay_what_they_are(model, rng):
    x = torch.rand(3, 1, 7, 7)
    x[1] = math.nan
    with pytest.warns(RuntimeWarning, match="NaN for 1 of 3"):
        out = rse_fast.Ensemble(model, 4, temperature=2.0).predict(x)
    assert out.labels[1] == -1 and out.probs[1].isnan().all() and out.entropy[1].isnan() and out.probs[[0, 2]].isfinite().all()
    model[4].bias.data[:] = torch.tensor([0.0, 500.0, 0.0, -math.inf])
    out = rse_fast.Ensemble(model, 4, temperature=10.0).predict(x[:1])
    assert out.probs[0, 1] > 1 - 1e-4 and out.probs.isfinite().all() and out.entropy.isfinite().all()


# ------------------------------------------------------------------------------------------------------------------------ the fit
@pytest.mark.parametrize("known", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_recovered(rng, known):
    """Labels drawn from probabilities; the classifier gives those of 1 / known times the logits."""
    logits = 2 * torch.randn(40_000, 5, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()
    claimed = (logits * known).log_softmax(-1)  # so it must be divided by `known`
    batches = zip(claimed.split(7000), labels.split(7000), strict=True)
    found = rse_fast.fit_temperature(lambda x: x, batches)
    # The slope's variance is that of log p over the classes at the truth (Fisher), so sd(1/T) = 1 / sqrt(N * variance).
    p = logits.softmax(-1)
    variance = ((p * claimed**2).sum(-1) - (p * claimed).sum(-1) ** 2).mean()
    assert abs(1 / found - 1 / known) < 5 / math.sqrt(len(labels) * variance)


def test_the_fit_is_the_minimum_of_the_loss_whatever_temperature_the_ensemble_had(rng):
    # A class is the brightness of a quarter of the image: whatever the images, logits spread, and the best temperature is 2.0 with a
    # standard deviation of 0.15. Random weights can give four classes of equal probability, for which none is best.
    net = nn.Sequential(nn.AvgPool2d(3), nn.Conv2d(1, 4, 2), nn.Flatten())
    net[1].weight.data.copy_(30 * torch.eye(4).view(4, 1, 2, 2))
    net[1].bias.data.zero_()
    x = torch.rand(400, 1, 6, 6)
    ensemble = rse_fast.Ensemble(rse_fast.convert(net, 0.02, 0.02).eval(), 5, seed=2, dtype="float32")
    log_p = ensemble(x).detach().double()
    labels = torch.distributions.Categorical(logits=log_p / 2).sample()
    found = rse_fast.fit_temperature(ensemble, [(x, labels)])
    loss = lambda t: float(nn.functional.cross_entropy(log_p / t, labels))  # noqa: E731 - on logits it is the same
    assert loss(found) <= min(loss(found * 1.01), loss(found / 1.01)) and loss(found) < loss(1.0)
    assert 0.1 < found < 10
    ensemble.temperature = 3.0
    assert rse_fast.fit_temperature(ensemble, [(x, labels)]) == pytest.approx(found, rel=1e-3)


def test_images_without_a_number_are_told_and_left_out(rng):
    log_p = torch.randn(500, 3).log_softmax(-1)
    labels = torch.distributions.Categorical(logits=log_p).sample()
    bad = log_p.clone()
    bad[::5] = math.nan
    with pytest.warns(RuntimeWarning, match="100 of 500 images gave NaN"):
        found = rse_fast.fit_temperature(lambda x: x, [(bad, labels)])
    keep = torch.arange(500) % 5 > 0
    assert found == pytest.approx(rse_fast.fit_temperature(lambda x: x, [(log_p[keep], labels[keep])]))


def test_what_has_no_best_temperature_is_told(rng):
    log_p = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    with pytest.warns(RuntimeWarning, match=r"not within \[0.1, 10\]; 0.1"):
        assert rse_fast.fit_temperature(lambda x: x, [(log_p, torch.tensor([0, 1]))]) == 0.1
    with pytest.warns(RuntimeWarning, match=r"not within \[0.1, 10\]; 10"):
        assert rse_fast.fit_temperature(lambda x: x, [(log_p, torch.tensor([1, 0]))]) == 10
    with pytest.raises(ValueError, match="got none"):
        rse_fast.fit_temperature(lambda x: x, [])
    with pytest.raises(ValueError, match="NaN for all of 2"):
        rse_fast.fit_temperature(lambda x: x * math.nan, [(log_p, torch.tensor([0, 1]))])


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (11.0, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_a_temperature_out_of_range_is_refused(model, value, error):
    with pytest.raises(error, match="^temperature must be"):
        rse_fast.Ensemble(model, temperature=value)


LOG_P = torch.full((6, 5), 0.2).log()
PAIRS = {
    "text": (lambda x: "sure", torch.zeros(6, dtype=torch.int64), r"classifier must return log-probabilities \[B, K\], got str"),
    "pixels": (lambda x: LOG_P[..., None, None], torch.zeros(6, 1, 1, dtype=torch.int64), r"classifier .*shape \(6, 5, 1, 1\)"),
    "too few labels": (lambda x: LOG_P, torch.zeros(5, dtype=torch.int64), r"labels int64 \[6\] beside 6 images, got .*shape \(5,\)"),
    "one hot": (lambda x: LOG_P, torch.eye(6, 5), r"labels int64 \[6\].*float32 of shape \(6, 5\)"),
    "array": (lambda x: LOG_P, [0] * 6, r"labels int64 \[6\].*got list"),
    "beyond": (lambda x: LOG_P, torch.tensor([0, 1, 2, 3, 4, 5]), r"labels in \[0, 5\), got 0 to 5"),
    "below": (lambda x: LOG_P, torch.tensor([0, 1, -1, 3, 4, 2]), r"labels in \[0, 5\), got -1 to 4"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_cannot_be_fitted_on_is_named(name):
    classifier, labels, message = PAIRS[name]
    with pytest.raises(ValueError, match=message):
        rse_fast.fit_temperature(classifier, [(torch.rand(6, 1, 7, 7), labels)])


def test_a_temperature_that_is_set_later_is_checked(model, rng):
    ensemble = rse_fast.Ensemble(model, 4, temperature=2.0)
    for wrong, error in ((0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("hot", TypeError), (True, TypeError)):
        with pytest.raises(error, match="^temperature must be"):
            ensemble.temperature = wrong
    assert ensemble.temperature == 2.0 and copy.deepcopy(ensemble).temperature == 2.0


def test_a_module_with_a_learned_temperature_gives_a_number(model, rng):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return (x / self.temperature).log_softmax(-1)

    logits = torch.randn(300, 5)
    labels = torch.distributions.Categorical(logits=logits / 2).sample()
    found = rse_fast.fit_temperature(Scaled(), [(logits, labels)])
    assert type(found) is float
    assert found == pytest.approx(rse_fast.fit_temperature(lambda x: x.log_softmax(-1), [(logits, labels)]), rel=1e-5)
