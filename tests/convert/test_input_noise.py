"""Noise on the image alone, in front of a model and of its normalisation: against the same by hand, certified, and what is refused."""

import pytest
import torch
from torch import nn

import rse_fast
from rse_fast import models
from rse_fast.nn import noise_layers

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PretrainedNet(nn.Module):
    """Reads its image twice, as networks with a skip connection from the input do: noise in one convolution would miss the other."""

    def __init__(self):
        super().__init__()
        self.stem, self.skip = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head((self.stem(x).relu() + self.skip(x)).mean((2, 3)))


@pytest.fixture
def network(rng):
    return PretrainedNet().eval()


def test_what_the_model_reads_is_the_noisy_image_normalised(network, rng):
    x, sigma = torch.rand(7, 3, 9, 5), 0.3
    mean, std = torch.rand(3), torch.rand(3) + 0.1
    model = rse_fast.with_input_noise(network, sigma, mean=mean, std=std.tolist())
    seen = []
    network.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for _ in range(40):
        model(x)
    read = torch.stack(seen).double()
    noise = (read * std.double().view(3, 1, 1) + mean.double().view(3, 1, 1) - x) / sigma  # [40, 7, 3, 9, 5], in units of pixels
    count = noise.numel()
    assert noise.mean().abs() < 5 / count**0.5 and (noise.var() - 1).abs() < 5 * (2 / count) ** 0.5
    assert (noise[0] - noise[1]).abs().max() > 0.1
    with rse_fast.noise_off(model):
        assert torch.allclose(model(x), network((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)), atol=1e-6)


def test_without_normalisation_the_noise_is_all(network, rng):
    model = rse_fast.with_input_noise(network, 0.2)
    assert [name for name, _ in model.named_children()] == ["noise", "model"] and list(noise_layers(model)) == ["noise"]
    with rse_fast.noise_off(model):
        x = torch.rand(2, 3, 6, 6)
        assert torch.equal(model(x), network(x))


@pytest.mark.parametrize("inner", [False, True], ids=["noise on the image alone", "noise in every convolution"])
def test_the_recipe_for_a_normalising_network_is_certified_and_fused(rng, inner):
    """Sequential(noise, normalisation, network): fused equals unfused, and `certify` finds its sigma in units of pixels."""
    network = models.make("small", 5, 3).eval()
    if inner:
        rse_fast.convert(network, 0.1, 0.1, exclude="features.0")
    model = rse_fast.with_input_noise(network, 0.25, mean=MEAN, std=STD)
    x = torch.rand(3, 3, 8, 8)
    fused, plain = (rse_fast.Ensemble(model, 6, seed=3, dtype="float32", fuse=fuse).predict(x) for fuse in (True, False))
    assert (fused.probs - plain.probs).abs().max() < 1e-4
    certificate = rse_fast.certify(rse_fast.Ensemble(model, dtype="float32"), x, n0=10, n=200)
    assert certificate.sigma == 0.25 and (certificate.radius >= 0).all()
    refused = nn.Sequential(model.normalize, rse_fast.convert(models.make("small", 5, 3).eval()))
    with pytest.raises(ValueError, match="image"):
        rse_fast.certify(rse_fast.Ensemble(refused), x, n0=10, n=200)


def test_a_checkpoint_of_the_pretrained_network_is_that_of_the_part(network):
    model = rse_fast.with_input_noise(PretrainedNet(), 0.2, mean=MEAN, std=STD)
    model.model.load_state_dict(network.state_dict())
    other = rse_fast.with_input_noise(PretrainedNet(), 0.2, mean=(0, 0, 0), std=(1, 1, 1))
    other.load_state_dict(model.state_dict())  # a whole one holds the normalisation
    assert torch.equal(other.normalize.std.flatten(), torch.tensor(STD)) and torch.equal(other.model.head.weight, network.head.weight)
    assert not any("sigma" in name for name in model.state_dict())


def test_mode_and_device_are_the_models(network):
    assert not rse_fast.with_input_noise(network, 0.2).training and rse_fast.with_input_noise(network.train(), 0.2).noise.training
    model = rse_fast.with_input_noise(network.to("meta"), 0.2, mean=MEAN, std=STD)
    assert model.noise.sigma.is_meta and model.normalize.mean.is_meta


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": "resnet"}, TypeError, "model must be"),
        ({"sigma": -0.1}, ValueError, "sigma"),
        ({"mean": MEAN}, ValueError, "given together"),
        ({"mean": MEAN, "std": (1, 1)}, ValueError, "got 3 and 2"),
        ({"mean": MEAN, "std": (1, 0, 1)}, ValueError, "std must be positive"),
        ({"mean": (0, 0, float("nan")), "std": STD}, ValueError, "mean must hold one finite number"),
        ({"mean": 0.5, "std": 0.5}, ValueError, "mean must hold one finite number"),
        ({"mean": "0.5", "std": STD}, ValueError, "mean must hold one number"),
    ],
)
def test_what_is_refused(network, options, error, words):
    with pytest.raises(error, match=words):
        rse_fast.with_input_noise(**({"model": network} | options))
