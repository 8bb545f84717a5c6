"""The libraries that people put an Ensemble into: attacks, attributions and metrics act on it as on any classifier."""

import contextlib
import importlib.util

import numpy as np
import pytest
import torch
from nearest_mean import nearest_mean

import rse_fast

pytest.importorskip("sklearn")

from rse_fast import data  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 0.15


def library(name):
    """The module; the test is skipped where it is not installed, or where what it imports fails, as torchvision of another build."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported: {error}")


@pytest.fixture(scope="module")
def digits():
    part = data.digits().test
    return part.images[:240].float() / 255, part.labels[:240]


@pytest.fixture
def ensemble():
    return rse_fast.Ensemble(nearest_mean(True), draws=6).eval()


def foolbox_pgd(ensemble, x, y):
    foolbox = library("foolbox")
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(rel_stepsize=0.25, steps=10)
    return attack(foolbox.PyTorchModel(ensemble, bounds=(0, 1), device="cpu"), x, y, epsilons=EPS)[1]


def pyautoattack_rand(ensemble, x, y):
    attack = library("pyautoattack").AutoAttack(ensemble, norm="Linf", eps=EPS, version="rand", device="cpu")
    attack.apgd.n_iter, attack.apgd.eot_iter, attack.attacks_to_run = 10, 1, ["apgd-ce"]
    with contextlib.redirect_stdout(None):
        return attack.apgd.perturb(x, y, best_loss=True)


def art_pgd(ensemble, x, y):
    estimators, evasion = library("art.estimators.classification"), library("art.attacks.evasion")
    classifier = estimators.PyTorchClassifier(
        ensemble, torch.nn.NLLLoss(), input_shape=(1, 8, 8), nb_classes=10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = evasion.ProjectedGradientDescent(classifier, eps=EPS, eps_step=EPS / 4, max_iter=10, batch_size=24, verbose=False)
    return torch.from_numpy(attack.generate(x.numpy(), np.eye(10, dtype=np.float32)[y.numpy()]))


def torchattacks_pgd(ensemble, x, y):
    attack = library("torchattacks").PGD(ensemble, eps=EPS, alpha=EPS / 4, steps=10)
    return attack(x, y).detach()


@pytest.mark.parametrize("attack", [foolbox_pgd, pyautoattack_rand, art_pgd, torchattacks_pgd])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_attack_finds_images_within_its_ball_that_other_noise_gets_wrong(attack, ensemble, digits, rng):
    x, y = digits
    attacked = attack(ensemble, x.clone(), y)
    assert attacked.shape == x.shape and (attacked - x).abs().max() <= EPS + 1e-5 and attacked.min() >= 0 and attacked.max() <= 1
    clean, left = ((ensemble.predict(images).labels == y).double().mean() for images in (x, attacked))
    by_chance = (ensemble.predict((x + EPS * (torch.rand_like(x) - 0.5).sign()).clamp(0, 1)).labels == y).double().mean()
    assert clean > 0.7 and left < by_chance - 0.2


def test_captum_attributes_to_the_pixels_that_the_gradient_names(digits, rng):
    attributions = library("captum.attr")
    (x, y), ensemble = digits, rse_fast.Ensemble(nearest_mean(True), draws=6, seed=3, dtype="float32")
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ensemble(leaf).gather(1, y[:, None]).sum(), leaf)
    found = attributions.Saliency(ensemble).attribute(x.clone().requires_grad_(), target=y, abs=False)
    assert torch.allclose(found, gradient, atol=1e-6 * float(gradient.abs().max()))
    # Along the path from black, gradients add up to the difference: without noise exactly, with it up to what the draws differ by.
    many = rse_fast.Ensemble(nearest_mean(True), draws=100, seed=3, dtype="float32")
    whole = attributions.IntegratedGradients(many).attribute(x[:4], target=y[:4], n_steps=32, internal_batch_size=4).sum((1, 2, 3))
    with torch.no_grad():
        difference = (many(x[:4]) - many(torch.zeros_like(x[:4]))).gather(1, y[:4, None])[:, 0]
    assert (whole - difference).abs().max() < 0.15 * difference.abs().max()


def test_torchmetrics_takes_what_predict_gives(ensemble, digits, rng):
    torchmetrics = library("torchmetrics.classification")
    x, y = digits
    accuracy = torchmetrics.MulticlassAccuracy(num_classes=10, average="micro")
    calibration = torchmetrics.MulticlassCalibrationError(num_classes=10, n_bins=5)
    labels = []
    for images, wanted in zip(x.split(7), y.split(7), strict=True):
        out = ensemble.predict(images)
        accuracy.update(out.probs, wanted)
        calibration.update(out.probs, wanted)
        labels.append(out.labels)
    assert accuracy.compute().item() == pytest.approx((torch.cat(labels) == y).double().mean().item())
    assert 0 <= calibration.compute().item() <= 1
