"""What convert, revert, describe and noise_off refuse: by name, and before anything is changed."""

import numpy as np
import pytest
import torch
from module_state import assert_unchanged, fingerprint
from torch import nn

import rse_fast
from rse_fast.nn import NoisyConv2d


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.conv(self.stem(x)).mean((2, 3)))


class OwnSigma(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("sigma", torch.ones(2))


ERRORS = {
    "no module": (lambda m: rse_fast.convert(3), TypeError, "model.*int"),
    "negative": (lambda m: rse_fast.convert(m, -0.1), ValueError, "init_sigma.*-0.1"),
    "negative inner": (lambda m: rse_fast.convert(m, 0.1, -1), ValueError, "inner_sigma.*-1"),
    "nan": (lambda m: rse_fast.convert(m, float("nan")), ValueError, "init_sigma.*nan"),
    "infinite": (lambda m: rse_fast.convert(m, 0.1, float("inf")), ValueError, "inner_sigma.*inf"),
    "text": (lambda m: rse_fast.convert(m, "0.1"), TypeError, "init_sigma.*str"),
    "none": (lambda m: rse_fast.convert(m, None), TypeError, "init_sigma.*NoneType"),
    "bool": (lambda m: rse_fast.convert(m, True), TypeError, "init_sigma.*bool"),
    "vector": (lambda m: rse_fast.convert(m, torch.tensor([0.1, 0.2])), ValueError, "init_sigma.*shape"),
    "integer tensor": (lambda m: rse_fast.convert(m, torch.tensor(1)), TypeError, "init_sigma.*int64"),
    "not learnable": (lambda m: rse_fast.convert(m, 0.1, 0, learnable=True), ValueError, "inner_sigma.*positive"),
    "nothing included": (lambda m: rse_fast.convert(m, include="nowhere.*"), ValueError, "nowhere"),
    "nothing left": (lambda m: rse_fast.convert(m, exclude="*"), ValueError, r"exclude='\*'"),
    "no linear": (lambda m: rse_fast.convert(m.stem, include=nn.Linear), ValueError, "Linear"),
    "include a wrong type": (lambda m: rse_fast.convert(m, include=nn.ReLU), ValueError, "include.*ReLU"),
    "include no type": (lambda m: rse_fast.convert(m, include=int), TypeError, "include.*int"),
    "include a number": (lambda m: rse_fast.convert(m, include=3), TypeError, "include.*int"),
    "include a layer": (lambda m: rse_fast.convert(m, include=[m.stem[0]]), TypeError, "include.*Conv2d"),
    "exclude a number": (lambda m: rse_fast.convert(m, exclude=[3]), TypeError, "exclude.*3"),
    "revert plain": (lambda m: rse_fast.revert(m), ValueError, "model.*none"),
    "revert no module": (lambda m: rse_fast.revert(3), TypeError, "model.*int"),
    "describe no module": (lambda m: rse_fast.describe(3), TypeError, "model.*int"),
    "noise_off plain": (lambda m: rse_fast.noise_off(m).__enter__(), ValueError, "model.*none"),
    "noise_off no module": (lambda m: rse_fast.noise_off("m").__enter__(), TypeError, "model.*str"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named_and_changes_nothing(name):
    call, error, message = ERRORS[name]
    model = Net()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        call(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Fold(3, 1)), "convolution"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3)), "lazy.*'1'"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), OwnSigma(4, 4, 3)), "sigma in '1'"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), rse_fast.nn.GaussianNoise(0.1)), "noise.*'1'"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), NoisyConv2d(4, 4, 3)), "noise.*'1'"),
    ],
    ids=["no convolution", "lazy", "name taken", "has noise", "has a noisy layer"],
)
def test_models_that_cannot_be_converted(model, message):
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"model.*{message}"):
        rse_fast.convert(model)
    assert_unchanged(model, before)


def test_converting_twice_is_an_error():
    model = rse_fast.convert(Net(), 0.3)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="model must not have noise yet.*'stem.0'.*revert"):
        rse_fast.convert(model, 0.1)
    assert_unchanged(model, before)
    assert rse_fast.convert(rse_fast.revert(model), 0.25).stem[0].sigma == 0.25


def test_lazy_layers_that_are_not_selected_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    rse_fast.convert(model)
    assert model(torch.rand(2, 3, 5, 5)).shape == (2, 5)


def test_sigma_may_be_any_real_number():
    for sigma in (1, 0.25, np.float32(0.25), np.float64(0.25), np.int64(1), torch.tensor(0.25), nn.Parameter(torch.tensor([0.25]))):
        layer = rse_fast.convert(nn.Conv2d(3, 4, 3), sigma)
        assert layer.sigma.item() == sigma and not layer.sigma.requires_grad


def test_a_layer_with_a_forward_of_its_own_is_refused():
    model = Net()
    model.conv.forward = lambda x: x
    with pytest.raises(ValueError, match="forward of its classes.*conv"):
        rse_fast.convert(model)
    assert type(model.conv) is nn.Conv2d


def test_a_patched_convolution_is_called_and_gets_noise():
    """As pictures that tile are made: the padding of one layer is replaced."""
    plain, x = nn.Conv2d(3, 4, 3, padding=1), torch.rand(2, 3, 8, 8)
    called = []

    def patched(input, weight, bias):
        called.append(input)
        return nn.functional.conv2d(nn.functional.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias)

    plain._conv_forward = patched
    want = plain(x)
    noisy = rse_fast.convert(plain, 1e-6)
    assert torch.allclose(noisy(x), want, atol=1e-3) and not torch.equal(noisy(x), noisy(x)) and len(called) > 1
    assert type(rse_fast.revert(noisy)) is nn.Conv2d


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: NoisyConv2d(3, 4, 3, sigma=torch.ones(5)), ValueError, r"sigma must be a number or have shape \[3\], got shape \(5,\)"),
        (lambda: rse_fast.nn.NoisyLinear(3, 4, sigma=torch.ones(2)), ValueError, r"sigma must be a number or have shape \[3\]"),
        (lambda: rse_fast.nn.GaussianNoise(torch.ones(2, 2)), ValueError, "sigma must be a number or have one value a channel"),
        (lambda: rse_fast.nn.GaussianNoise(0.1, 0), ValueError, "channel_dim must not be 0"),
        (lambda: rse_fast.nn.GaussianNoise(0.1, "a"), TypeError, "channel_dim must be an integer, got str"),
    ],
)
def test_layers_are_checked_when_they_are_made(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_model_without_values_is_refused():
    """sigma is no part of the state dict: what `to_empty` and `load_state_dict` make of a meta model would have none."""
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match="got meta tensors in"):
        rse_fast.convert(model)
