"""What each defence changes in a network, its loss for a batch and its attack, against the same written out by hand."""

import math
import os
import signal

import numpy as np
import pytest
import torch
from tiny_training import config, net, net_without_batch_statistics, same, without_times
from torch import nn
from torch.nn.functional import cross_entropy

pytest.importorskip("tqdm")
safetensors = pytest.importorskip("safetensors.torch")

from rse_fast.nn import NoisyConv2d, noise_layers  # noqa: E402
from rse_fast.train import Config, Trainer, load_data, load_model, train  # noqa: E402
from rse_fast.train.command import main  # noqa: E402
from rse_fast.train.config import DEFENCES  # noqa: E402
from rse_fast.train.defences import attack, batch_loss, protect, use_test_sigma  # noqa: E402
from rse_fast.train.log import read  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

B = 12


@pytest.fixture
def batch(rng):
    """Images with pixels at both ends of their range, and labels."""
    x = torch.rand(B, 3, 8, 8)
    x[:, :, :2], x[:, :, 2:4] = 0.0, 1.0
    return x, torch.arange(B) % 3


def made(build=net_without_batch_statistics, **fields) -> tuple[nn.Module, Config]:
    settings = Config(**fields)
    return protect(build(3, 3), settings).train(), settings


def calls_of(model) -> list:
    """What the model is called with from now on: (training, rows, output)."""
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append((m.training, args[0].detach().clone(), out.detach().clone())))
    return seen


def gradient_of(model, images, labels) -> torch.Tensor:
    """Of the summed loss, the one that the attack sums as well: both round alike, so the sign of a gradient that cancels to nearly 0 is the
    same. A mean rounds otherwise, and one such sign of the 11,520 of an attack in five steps differs once in 2000 runs."""
    (found,) = torch.autograd.grad(cross_entropy(model(images), labels, reduction="sum"), images)
    return found


# ---------------------------------------------------------------------------------------------------------------------- the network
@pytest.mark.parametrize("defence", DEFENCES)
def test_what_is_built_into_the_network(defence):
    model, settings = made(net, defence=defence, init_sigma=0.3, inner_sigma=0.05)
    sigmas = [layer.sigma.item() for layer in noise_layers(model).values()]
    noisy = {"rse": [0.3, 0.05], "rse+adversarial": [0.3, 0.05], "gaussian": [0.3]}.get(defence, [])
    assert settings.noisy == bool(noisy) and sigmas == pytest.approx(noisy)
    assert sum(isinstance(m, NoisyConv2d) for m in model.modules()) == (2 if len(noisy) == 2 else 0)
    inner = model.model if defence == "gaussian" else model  # whose weights have the plain model's names
    assert inner.state_dict().keys() == net(3, 3).state_dict().keys()
    kinds = {type(m) for m in model.modules()}
    assert (nn.ReLU in kinds) != (defence == "brelu")


def test_brelu_bounds_every_relu_by_0_and_1(rng):
    shared = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Sequential(nn.Conv2d(4, 4, 3), shared, nn.ReLU(inplace=True)), nn.LeakyReLU())
    bounded = protect(model, Config(defence="brelu"))
    bounded[2][0].weight.data *= 100  # so that each gets values beyond both bounds
    seen = []
    for m in (bounded[1], bounded[2][1], bounded[2][2]):
        m.register_forward_hook(lambda m, args, out: seen.append((args[0].min(), args[0].max(), out.min(), out.max())))
    bounded(100 * torch.randn(5, 3, 9, 9))
    assert len(seen) == 3 and all(low < 0 and high > 1 for low, high, *_ in seen[:2])
    assert all((low, high) == (0, 1) for _, _, low, high in seen)
    assert bounded[2][2].inplace and not bounded[1].inplace and type(bounded[3]) is nn.LeakyReLU
    x = torch.tensor([-1.0, 0.0, 0.3, 1.0, 2.0])
    assert torch.equal(bounded[1](x), torch.tensor([0.0, 0.0, 0.3, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"^model: expected nn\.ReLU modules"):
        protect(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), Config(defence="brelu"))


# ------------------------------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("defence", ["plain", "rse"])
def test_plain_and_noisy_loss(batch, defence, smoothing):
    (x, labels), (model, settings) = batch, made(defence=defence, draws=4, label_smoothing=smoothing)
    seen = calls_of(model)
    loss, accuracy = batch_loss(settings, model, model, x, labels)
    ((training, rows, logits),) = seen
    assert training and torch.equal(rows, x.repeat(4 if defence == "rse" else 1, 1, 1, 1))
    log_p = logits.double().log_softmax(-1)
    repeated = labels.repeat(len(rows) // B)
    right = log_p[torch.arange(len(rows)), repeated]
    assert loss.item() == pytest.approx(-((1 - smoothing) * right + smoothing * log_p.mean(-1)).mean().item(), rel=1e-6)
    assert accuracy.item() == pytest.approx((logits.argmax(-1) == repeated).double().mean().item())


def test_gaussian_trains_on_the_image_plus_fresh_noise_and_is_used_with_the_sigma_for_use(batch):
    """Cohen et al.: cross-entropy of the network at x + sigma * eps, noise that is there in use as well."""
    x, labels = batch
    model, settings = made(defence="gaussian", init_sigma=0.3, draws=5, test_init_sigma=0.5)
    seen = calls_of(model.model)
    loss, _ = batch_loss(settings, model, model, x, labels)
    ((training, rows, logits),) = seen
    eps = (rows - x.repeat(5, 1, 1, 1)) / 0.3
    count = eps.numel()
    assert training and eps.mean().abs() < 5 / math.sqrt(count) and (eps.std() - 1).abs() < 5 / math.sqrt(2 * count)
    assert (eps[:B] - eps[B : 2 * B]).abs().max() > 0.1  # of each draw its own
    assert loss.item() == pytest.approx(cross_entropy(logits.double(), labels.repeat(5)).item(), rel=1e-6)
    use_test_sigma(model, settings)
    assert model.noise.sigma.item() == 0.5
    use_test_sigma(model, Config(defence="gaussian", init_sigma=0.3))
    assert model.noise.sigma.item() == pytest.approx(0.3)
    with pytest.raises(ValueError, match="^learnable_sigma: gaussian"):
        Config(defence="gaussian", learnable_sigma="layer")


@pytest.mark.parametrize("temperature", [None, 5.0])
def test_distillation_loss(batch, temperature):
    """Papernot et al.: softmax of both at T = 100; times T, so that the gradient keeps its size."""
    x, labels = batch
    model, settings = made(defence="distillation", temperature=temperature)
    t = 100.0 if temperature is None else temperature
    assert settings.temperature == t
    torch.manual_seed(1)
    teacher = net(3, 3).eval()
    loss, accuracy = batch_loss(settings, model, model, x, labels, teacher)
    soft = (teacher(x).detach().double() / t).softmax(-1)
    logits = model(x)
    expected = -t * (soft * (logits.double() / t).log_softmax(-1)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert accuracy.item() == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and all(p.grad is not None for p in model.parameters())
    # d loss / d logits is the difference of the soft labels: no factor of 1 / T is left
    (at_logits,) = torch.autograd.grad(-t * (soft * (logits.double() / t).log_softmax(-1)).sum(-1).mean(), logits)
    assert torch.allclose(at_logits.double(), ((logits.double() / t).softmax(-1) - soft) / B, atol=1e-7)


def test_brelu_trains_on_images_with_gaussian_noise_and_is_used_without(batch):
    x, labels = batch
    model, settings = made(defence="brelu", augment_sigma=0.3)
    seen = calls_of(model)
    for _ in range(40):
        batch_loss(settings, model, model, x, labels)
    noise = torch.stack([rows - x for _, rows, _ in seen])  # 40 * 12 * 192 values
    count = noise.numel()
    assert noise.mean().abs() < 5 * 0.3 / math.sqrt(count)
    assert (noise.std() - 0.3).abs() < 5 * 0.3 / math.sqrt(2 * count)
    assert (noise[0] - noise[1]).abs().max() > 0.1  # of each step its own
    model.eval()
    assert torch.equal(model(x), model(x))


def test_fgsm_retraining_is_one_step_on_clean_and_attacked_images_alike(batch):
    """Goodfellow et al.: 0.5 * loss(x) + 0.5 * loss(x + eps * sign(grad))."""
    (x, labels), (model, settings) = batch, made(defence="adversarial", attack="fgsm", eps=0.1)
    leaf = x.clone().requires_grad_()
    gradient = gradient_of(model, leaf, labels)
    attacked = (x + 0.1 * gradient.sign()).clamp(0, 1)
    assert torch.allclose(attack(model, x, labels, settings), attacked, atol=1e-7)
    loss, accuracy = batch_loss(settings, model, model, x, labels)
    both = [cross_entropy(model(rows), labels).item() for rows in (x, attacked)]
    assert both[1] > both[0]
    assert loss.item() == pytest.approx(np.mean(both), rel=1e-5)
    right = [(model(rows).argmax(-1) == labels).double().mean().item() for rows in (x, attacked)]
    assert accuracy.item() == pytest.approx(np.mean(right), abs=1e-6)


def test_pgd_training_is_on_attacked_images_alone(batch):
    """Madry et al.: a random start within the ball, steps of the sign of the gradient, each followed by a projection."""
    eps, steps = 0.08, 5
    (x, labels), (model, settings) = batch, made(defence="adversarial", eps=eps, attack_steps=steps)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    torch.manual_seed(5)
    moved = low + (high - low) * torch.rand_like(x)
    for _ in range(steps):
        leaf = moved.clone().requires_grad_()
        gradient = gradient_of(model, leaf, labels)
        moved = torch.maximum(torch.minimum(moved + 2.5 * eps / steps * gradient.sign(), high), low)
    torch.manual_seed(5)
    assert torch.allclose(attack(model, x, labels, settings), moved, atol=1e-6)
    torch.manual_seed(5)
    seen = calls_of(model)
    loss, _ = batch_loss(settings, model, model, x, labels)
    assert len(seen) == steps + 1 and torch.allclose(seen[-1][1], moved, atol=1e-6)
    assert loss.item() == pytest.approx(cross_entropy(model(moved), labels).item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------- the attack
@pytest.mark.parametrize("defence", ["adversarial", "rse+adversarial"])
@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
@pytest.mark.parametrize("eps", [8 / 255, 0.6])
def test_attacked_images_stay_in_the_ball_and_in_the_range_of_pixels(batch, defence, kind, eps):
    (x, labels), (model, settings) = batch, made(defence=defence, attack=kind, eps=eps, attack_draws=2, attack_steps=4)
    before, kept = x.clone(), {name: p.detach().clone() for name, p in model.named_parameters()}
    model[0].bias.requires_grad_(False)
    attacked = attack(model, x, labels, settings)
    assert attacked.min() >= 0 and attacked.max() <= 1 and not attacked.requires_grad
    distance = (attacked - x).abs()
    assert distance.max() <= eps * (1 + 1e-6) and distance.max() > 0.9 * eps
    assert torch.equal(x, before) and model.training
    assert all(p.grad is None and torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]


def test_the_start_of_pgd_is_random_in_the_whole_ball(batch):
    (x, labels), (model, settings) = batch, made(defence="adversarial", eps=0.2, attack_steps=1)
    seen = calls_of(model)
    for _ in range(20):
        attack(model, x, labels, settings)
    starts = torch.stack([rows for _, rows, _ in seen])
    low, high = (x - 0.2).clamp(min=0), (x + 0.2).clamp(max=1)
    share = (starts - low) / (high - low)
    assert share.min() >= -1e-5 and share.max() <= 1 + 1e-5
    assert (share.mean() - 0.5).abs() < 5 / math.sqrt(12 * share.numel())  # uniform: variance 1 / 12
    assert (share.var() - 1 / 12).abs() < 5 / math.sqrt(180 * share.numel())  # the variance of (u - 1/2)^2 is 1 / 180


def test_the_attack_leaves_batch_statistics_and_modes_alone_also_when_it_fails(batch):
    (x, labels), (model, settings) = batch, made(net, defence="rse+adversarial", attack_steps=2)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    attack(model, x, labels, settings)
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
    with pytest.raises(IndexError):
        attack(model, x, labels + 3, settings)
    assert model.training and all(p.requires_grad for p in model.parameters())
    model.eval()
    attack(model, x, labels, settings)
    assert not model.training
    model.train()
    batch_loss(settings, model, model, x, labels)
    assert model[1].num_batches_tracked == 1  # by the update alone


def test_noise_is_in_the_attack_and_in_the_update(batch):
    (x, labels), (model, settings) = batch, made(defence="rse+adversarial", attack_steps=3, attack_draws=5, draws=2)
    seen = calls_of(model)
    loss, _ = batch_loss(settings, model, model, x, labels)
    assert [(training, len(rows)) for training, rows, _ in seen] == [(False, 5 * B)] * 3 + [(True, 2 * B)]
    for _, rows, logits in seen:
        draws = len(rows) // B
        assert torch.equal(rows, rows[:B].repeat(draws, 1, 1, 1))
        apart = logits.unflatten(0, (draws, B))
        assert all((apart[a] - apart[b]).abs().amax(-1).min() > 0 for a in range(draws) for b in range(a))
    assert loss.item() == pytest.approx(cross_entropy(seen[-1][2], labels.repeat(2)).item(), rel=1e-6)


def test_the_gradient_of_the_attack_is_the_expectation_over_packed_draws(batch):
    """d/dx of -log(mean over draws of the softmax): each draw's gradient, weighted by its share in the ensemble's probability."""
    draws, eps = 6, 0.05
    x, labels = batch
    model, settings = made(defence="rse+adversarial", attack="fgsm", attack_draws=draws, eps=eps, init_sigma=0.5, inner_sigma=0.3)
    torch.manual_seed(9)
    leaf = x.repeat(draws, 1, 1, 1).requires_grad_()  # the draws apart: each has a gradient of its own
    right = model.eval()(leaf).softmax(-1).gather(1, labels.repeat(draws)[:, None])[:, 0].unflatten(0, (draws, B))
    gradients = torch.autograd.grad(right.log().sum(), leaf)[0].unflatten(0, (draws, B))  # of each draw's log probability
    weights = (right / right.sum(0)).detach()
    expected = -(weights[:, :, None, None, None] * gradients).sum(0)
    torch.manual_seed(9)
    attacked = attack(model, x, labels, settings)
    clear = expected.abs() > 1e-5 * expected.abs().max()  # elsewhere rounding decides the sign
    assert clear.double().mean() > 0.9
    assert torch.allclose(attacked[clear], (x + eps * expected.sign()).clamp(0, 1)[clear], atol=1e-7)
    one = (x - eps * gradients[0].sign()).clamp(0, 1)
    assert (attacked - one).abs().max() > eps / 2  # one draw's gradient is another


def test_more_draws_give_a_better_gradient(batch):
    """Gradients of fresh draws agree the more, the more draws are behind them."""
    x, labels = batch
    model, _ = made(defence="rse", init_sigma=0.8, inner_sigma=0.8)

    def agreement(draws):
        settings = Config(defence="rse+adversarial", attack="fgsm", attack_draws=draws, eps=0.01)
        inside = torch.full_like(x, 0.5)
        signs = [(attack(model, inside, labels, settings) - inside).sign() for _ in range(2)]
        return (signs[0] == signs[1]).double().mean().item()

    assert agreement(64) > agreement(1) + 0.05


# ------------------------------------------------------------------------------------------------------------------------ whole runs
@pytest.mark.parametrize("defence", DEFENCES)
@pytest.mark.parametrize("attacked_by", ["fgsm", "pgd"])
def test_each_defence_learns(images, defence, attacked_by):
    if attacked_by == "fgsm" and "adversarial" not in defence:
        pytest.skip("it knows no attack")
    settings = config(images, defence=defence, epochs=8, lr=0.2, attack=attacked_by, eps=4 / 255, attack_steps=2, attack_draws=2)
    splits = load_data(settings)
    torch.manual_seed(0)
    teacher = Trainer(config(images, defence="plain", epochs=8, lr=0.2), splits)
    while defence == "distillation" and not teacher.complete:
        teacher.advance()
    trainer = Trainer(settings, splits, teacher=teacher.evaluated if defence == "distillation" else None)
    rows = []
    while not trainer.complete:
        rows.append(trainer.advance())
    epochs = [row for row in rows if row and row["event"] == "epoch"]
    assert epochs[-1]["loss"] < epochs[0]["loss"] and max(row["val_accuracy"] for row in epochs) > 0.6
    assert all(("val_attacked_accuracy" in row) == settings.adversarial for row in epochs)


def test_distillation_trains_its_teacher_as_a_run_of_its_own(images, tmp_path):
    settings = config(images, defence="distillation", epochs=2)
    assert train(settings, tmp_path / "run")["event"] == "end"
    teacher = Config.load(tmp_path / "run" / "teacher" / "config.json")
    assert (teacher.defence, teacher.temperature) == ("plain", 100.0)
    assert Config.load(tmp_path / "run" / "config.json") == settings
    # Soft labels and learning rate come from the run's own teacher: the student is that of a trainer that is given it.
    trainer = Trainer(settings, load_data(settings), teacher=load_model(tmp_path / "run" / "teacher", trust=True))
    rows = []
    while not trainer.complete:
        rows.append(trainer.advance())
    assert [row for row in rows if row] == without_times(read(tmp_path / "run" / "log.jsonl"))[:-1]
    assert not load_model(tmp_path / "run", trust=True).training


def test_a_gaussian_run_is_trained_evaluated_and_certified(images, tmp_path, capsys):
    """By the commands, as any other; ``--defense`` is the same option as ``--defence``."""
    run = tmp_path / "run"
    tiny = ["--model", "tiny_training:net", "--epochs", "3", "--batch-size", "18", "--lr", "0.1", "--device", "cpu"]
    assert main(["--data", str(images), *tiny, "--defense", "gaussian", "--init-sigma", "0.1", "--out", str(run)]) == 0
    assert Config.load(run / "config.json").defence == "gaussian" and "with 10 draws" in capsys.readouterr().out
    model = load_model(run, trust=True)
    (layer,) = noise_layers(model).values()
    assert layer is model.noise and layer.sigma.item() == pytest.approx(0.1)
    options = ["--trust", "--images", "3", "--seed", "1", "--device", "cpu"]
    pytest.importorskip("scipy"), pytest.importorskip("matplotlib")
    from rse_fast import certify_cli

    summary = certify_cli.run([str(run), *options, "--n", "200", "--out", str(tmp_path / "certified")])
    assert summary["settings"]["sigma"] == pytest.approx(0.1) and summary["images"] == 3
    pytest.importorskip("foolbox")
    from rse_fast.evaluate import command

    only = ["--only", "clean", "--repeats", "2", "--draws", "3"]
    results = command.run([str(run), *options, *only, "--out", str(tmp_path / "evaluation")])
    assert results["settings"]["sigmas"] == [0.1] and results["cases"]["clean"]["images"] == 3


@pytest.mark.parametrize("step", [0, 4, 12, 16], ids=["teacher begins", "in the teacher", "student begins", "in the student"])
def test_a_distillation_that_was_stopped_anywhere_continues(images, tmp_path, monkeypatch, capsys, step):
    settings = config(images, defence="distillation", epochs=2, keep=5)
    train(settings, tmp_path / "whole")
    _stop_after(monkeypatch, step)
    assert train(settings, tmp_path / "run")["event"] == "stop"
    monkeypatch.undo()
    assert (tmp_path / "run" / "config.json").exists()  # it is a run already: not to be overwritten
    with pytest.raises(ValueError, match="^out: .*holds a run already"):
        train(settings, tmp_path / "run")
    assert main(["--trust", "--resume", str(tmp_path / "run")]) == 0
    for part in (".", "teacher"):
        logs = [without_times(read(folder / part / "log.jsonl")) for folder in (tmp_path / "whole", tmp_path / "run")]
        assert logs[0] == logs[1] and logs[0][-1]["event"] == "end"
        assert same(*(safetensors.load_file(folder / part / "best.safetensors") for folder in (tmp_path / "whole", tmp_path / "run")))


def _stop_after(monkeypatch, steps):
    """SIGTERM comes when the run has made so many steps, those of the teacher and of the student counted together."""
    advance, made = Trainer.advance, []

    def interrupted(self):
        if len(made) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        before = self.step
        row = advance(self)
        made.extend([0] * (self.step - before))
        return row

    monkeypatch.setattr(Trainer, "advance", interrupted)
