"""The training loop in memory, each of its parts against the same written out by hand."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import config, same, without_times
from torch.nn.functional import cross_entropy

pytest.importorskip("tqdm")
safetensors = pytest.importorskip("safetensors.torch")

from rse_fast.data import Splits, batches, shuffled  # noqa: E402
from rse_fast.nn import noise_layers  # noqa: E402
from rse_fast.train import Config, Trainer, checkpoint, load_data, load_model, train  # noqa: E402
from rse_fast.train.log import read  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6  # of an epoch, see `config`
BARE = "tiny_training:net_without_batch_statistics"


@pytest.fixture
def start(images):
    """``start(**fields)``: a `Trainer` for a configuration that differs from `tiny_training.config` in these fields."""

    def make(**fields) -> Trainer:
        settings = config(images, **fields)
        return Trainer(settings, load_data(settings))

    return make


def finish(trainer: Trainer) -> list[dict]:
    rows = []
    while not trainer.complete:
        rows.append(trainer.advance())
    return [row for row in rows if row]


def images_of(trainer: Trainer, epoch: int = 0) -> list:
    """The batches that it trains on in an epoch."""
    c, splits = trainer.config, trainer.splits
    return list(shuffled(splits.train, c.batch_size, seed=c.seed, epoch=epoch, pad=splits.pad, flip=splits.flip))


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# -------------------------------------------------------------------------------------------------------------------- optimisation
def one_cycle(step, total, peak):
    """Cosines from peak / 25 up to the peak in the first 30 %, then down to peak / 250000 (Smith & Topin 2019, as torch has it)."""
    top, last = 0.3 * total - 1, total - 1
    low, high, share = (peak / 25, peak, step / top) if step <= top else (peak, peak / 25e4, (step - top) / (last - top))
    return high + (low - high) * (1 + math.cos(math.pi * share)) / 2


def tenths(step, total, peak):
    return peak * 0.1 ** sum(step >= round(share * total) for share in (0.4, 0.7, 0.9))


@pytest.mark.parametrize(("schedule", "expected"), [("one-cycle", one_cycle), ("step", tenths)])
@pytest.mark.parametrize("epochs", [1, 5])
def test_schedules(start, schedule, expected, epochs):
    rows = finish(start(schedule=schedule, epochs=epochs, lr=0.03, log_steps=1, defence="plain"))
    rates = [row["lr"] for row in rows if row["event"] == "step"]
    total = STEPS * epochs
    assert rates == pytest.approx([expected(step, total, 0.03) for step in range(total)], rel=1e-9)
    assert min(rates) < 0.01 * max(rates)


def by_hand(trainer: Trainer) -> tuple[dict, list[float]]:
    """Weights and losses of the first epoch of a plain network under SGD, each formula written out."""
    c, model = trainer.config, trainer.model
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    losses = []
    for step, (x, labels) in enumerate(images_of(trainer)):
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        log_p = torch.func.functional_call(model, leaves, (x,)).log_softmax(-1)
        right, spread = log_p[torch.arange(len(x)), labels], log_p.mean(-1)
        loss = -((1 - c.label_smoothing) * right + c.label_smoothing * spread).mean()
        losses.append(loss.item())
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        scale = min(1.0, c.clip / norm) if c.clip else 1.0
        for name, w in weights.items():
            g = gradients[name] * scale + c.weight_decay * w
            velocity[name] = c.momentum * velocity[name] + g
            ahead = g + c.momentum * velocity[name] if c.nesterov else velocity[name]
            weights[name] = w - tenths(step, trainer.total_steps, c.lr) * ahead
    return weights, losses


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"nesterov": False}, {"momentum": 0.0}, {"weight_decay": 0.1}, {"label_smoothing": 0.3}, {"clip": 0.02},
        {"clip": 0.1, "label_smoothing": 0.1, "weight_decay": 0.01},
    ],
    ids=str,
)  # fmt: skip
def test_a_step_is_that_of_the_formulas(start, fields):
    trainer = start(defence="plain", model=BARE, schedule="step", lr=0.5, log_steps=1, **fields)
    weights, losses = by_hand(trainer)
    before = snapshot(trainer.model)
    rows = [trainer.advance() for _ in range(STEPS)]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    after = snapshot(trainer.model)
    moved = max((after[name] - before[name]).abs().max() for name in weights)
    error = max((after[name] - weights[name]).abs().max() for name in weights)
    assert error < 1e-5 < 1e-3 < moved
    if fields:  # the option enters the result
        ordinary = start(defence="plain", model=BARE, schedule="step", lr=0.5)
        for _ in range(STEPS):
            ordinary.advance()
        assert max((after[name] - value).abs().max() for name, value in snapshot(ordinary.model).items()) > 1e-4


def test_moving_average_of_weights_and_statistics_is_what_is_validated(start):
    decay = 0.7
    trainer = start(defence="plain", ema=decay)
    expected = None
    for _ in range(STEPS):
        trainer.advance()
        now = {name: value for name, value in snapshot(trainer.model).items() if value.is_floating_point()}
        expected = now if expected is None else {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    found = snapshot(trainer.evaluated)
    assert {"1.running_mean", "1.weight"} <= expected.keys() <= found.keys()
    assert all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-6) for name, value in expected.items())
    assert (found["0.weight"] - now["0.weight"]).abs().max() > 1e-3
    row = next(filter(None, iter(trainer.advance, 0)))
    val = trainer.splits.val
    with torch.no_grad():
        logits = trainer.evaluated.eval()(val.images.float() / 255)
    assert row["val_loss"] == pytest.approx(cross_entropy(logits, val.labels).item(), rel=1e-5)
    assert row["val_accuracy"] == (logits.argmax(-1) == val.labels).double().mean().item()
    assert start(defence="plain").evaluated is not None and start(defence="plain").average is None


def test_rows_hold_means_over_the_epoch(start):
    """Loss and accuracy of the epoch are those of its steps, in training mode and before each update."""
    trainer = start(defence="plain", model=BARE, log_steps=1)
    losses, accuracies = [], []
    for x, labels in images_of(trainer):
        with torch.no_grad():
            logits = trainer.model(x)
        losses.append(cross_entropy(logits, labels).item())
        accuracies.append((logits.argmax(-1) == labels).double().mean().item())
        row = trainer.advance()
        assert row["event"] == "step" and row["loss"] == pytest.approx(losses[-1], rel=1e-5)
    row = next(filter(None, iter(trainer.advance, 0)))
    assert (row["event"], row["step"], row["epoch"]) == ("epoch", STEPS, 1)
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5) and row["accuracy"] == pytest.approx(np.mean(accuracies), rel=1e-6)


def test_a_seed_repeats_a_run_and_another_does_not(start):
    rows = [finish(start(seed=seed, epochs=2)) for seed in (3, 3, 4)]
    assert rows[0] == rows[1] != rows[2]


def test_bf16_autocast_and_memory_layout(start):
    """Convolutions see bfloat16 in the wanted layout; weights, gradients and logged losses stay float32."""
    for bf16 in (True, False):
        for channels_last in (True, False):
            trainer = start(bf16=bf16, channels_last=channels_last, draws=2, log_steps=1)
            seen = []
            trainer.model[3].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))  # noqa: B023 - called before it changes
            row = trainer.advance()
            assert math.isfinite(row["loss"])
            ((x, y),) = seen
            assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
            assert x.is_contiguous(memory_format=torch.channels_last) == channels_last
            assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainer.model.parameters())


def test_divergence_is_an_error_that_says_so(start):
    trainer = start(lr=1e30, defence="plain", schedule="step")
    with pytest.raises(FloatingPointError, match="diverged.* smaller lr"):
        finish(trainer)


def test_what_does_not_fit_is_named(start, images):
    with pytest.raises(ValueError, match="^batch_size: expected at most the 108 images"):
        start(batch_size=109)
    with pytest.raises(ValueError, match="^teacher: "):
        start(defence="distillation")
    with pytest.raises(ValueError, match="^model: expected one of small, small-vgg, small-resnet, vgg16, resnext29, model-a"):
        start(model="vgg")
    with pytest.raises(ValueError, match="^init_sigma must be positive"):
        start(learnable_sigma="layer", init_sigma=0.0)


@pytest.mark.parametrize(
    ("model", "size"), [("small", 8), ("small-vgg", 16), ("small-resnet", 16), ("vgg16", 32), ("resnext29", 16), ("model-a", 96)]
)
def test_the_networks_train(tmp_path, rng, model, size):
    np.savez(
        tmp_path / "images.npz", train_images=rng.integers(0, 256, (12, 3, size, size), dtype=np.uint8), train_labels=np.arange(12) % 2,
        test_images=np.zeros((2, 3, size, size), np.uint8), test_labels=np.arange(2),
    )  # fmt: skip
    settings = config(tmp_path / "images.npz", model=model, batch_size=2, epochs=1, log_steps=1)
    trainer = Trainer(settings, load_data(settings))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    row = trainer.advance()
    assert math.isfinite(row["loss"]) and row["sigma"] < 0.2
    assert sum(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)) == len(before)


# --------------------------------------------------------------------------------------------------------------------------- noise
def test_draws_are_packed_into_the_batch_each_with_noise_of_its_own(start):
    trainer = start(draws=3, model=BARE, log_steps=1)
    (x, labels), *_ = images_of(trainer)
    seen = []
    trainer.model.register_forward_hook(lambda _, args, out: seen.append((args[0].detach(), out.detach())))
    row = trainer.advance()
    ((rows, logits),) = seen
    assert torch.equal(rows, x.repeat(3, 1, 1, 1))
    draws = logits.unflatten(0, (3, -1))
    assert all((draws[a] - draws[b]).abs().amax(-1).min() > 0 for a, b in ((0, 1), (0, 2), (1, 2)))
    assert row["loss"] == pytest.approx(np.mean([cross_entropy(draw, labels).item() for draw in draws]), rel=1e-5)


@pytest.mark.parametrize(("pad", "dark"), [(0, 0), (None, 1), (3, 3)])
def test_crops_are_padded_as_asked(start, pad, dark):
    """An eighth of the 8 pixels where nothing is said. The widest black border that a batch shows is the padding."""
    trainer = start(defence="plain", pad=pad)
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for _ in range(5):
        trainer.advance()
    empty = (torch.cat(seen) == 0).all(1)  # [N, 8, 8]
    rows = empty.all(2)
    assert max(rows.cumprod(1).sum(1).max(), rows.flip(1).cumprod(1).sum(1).max()) == dark


@pytest.mark.parametrize(
    ("fields", "sides"),
    [
        ({}, [8] * 5), ({"start_scale": 0.5}, [4, 4, 4, 8, 8]), ({"start_scale": 0.5, "full_scale": 0.1}, [4, 4, 4, 4, 8]),
        ({"start_scale": 0.1, "full_scale": 1.0}, [8] * 5), ({"start_scale": 1.0}, [8] * 5),
    ],
    ids=str,
)  # fmt: skip
def test_images_grow_to_their_full_size(start, fields, sides):
    """Sides are multiples of 4 pixels, at least 4; what is validated is of full size."""
    trainer = start(defence="plain", epochs=5, **fields)
    seen = {True: [], False: []}
    trainer.model.register_forward_pre_hook(lambda m, args: seen[m.training].append(args[0]))
    finish(trainer)
    assert [tuple(x.shape[2:]) for x in seen[True]] == [(side, side) for side in sides for _ in range(STEPS)]
    assert {tuple(x.shape[2:]) for x in seen[False]} == {(8, 8)}
    whole, _ = images_of(trainer)[0]
    if sides[0] == 8:
        assert torch.equal(seen[True][0], whole)
    else:  # each pixel is an average around it: a black image stays black, and the mean stays about the mean
        assert seen[True][0].mean((2, 3)) == pytest.approx(whole.mean((2, 3)), abs=0.1)
        assert not torch.equal(seen[True][0], whole[:, :, ::2, ::2])


def test_sizes_of_images_that_do_not_fit_are_named(start):
    with pytest.raises(ValueError, match="^full_scale: needs start_scale, got 0.5"):
        start(full_scale=0.5)
    with pytest.raises(ValueError, match="^cuda_graphs: .*one size"):
        start(start_scale=0.5, cuda_graphs=True)
    with pytest.raises(ValueError, match="^start_scale: expected a number above 0.* got 0.0"):
        start(start_scale=0.0)
    with pytest.raises(ValueError, match=r"^model: 'tiny_training:net_for_8_pixels' cannot sort images \[3, 4, 4\]"):
        start(start_scale=0.5, model="tiny_training:net_for_8_pixels")


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0, 1.4, 2.0])
def test_sigma_grows_to_its_full_strength_and_is_another_in_validation(start, warmup, ema):
    trainer = start(sigma_warmup=warmup, ema=ema, epochs=3, init_sigma=0.3, inner_sigma=0.2, test_init_sigma=0.25, log_steps=1)
    seen = {True: [], False: []}
    for model in {trainer.model, trainer.evaluated}:
        first, second = noise_layers(model).values()
        first.register_forward_pre_hook(lambda m, _, other=second: seen[m.training].append((m.sigma.item(), other.sigma.item())))
    rows = finish(trainer)
    factors = [min(1.0, (step + 1) / (warmup * STEPS + 1)) for step in range(3 * STEPS)]
    assert np.allclose(seen[True], [(0.3 * f, 0.2 * f) for f in factors], rtol=1e-6)
    assert np.allclose(seen[True][math.ceil(warmup * STEPS) :], (0.3, 0.2), rtol=1e-6)  # full once the warm-up is over
    assert np.allclose(seen[False], (0.25, 0.2), rtol=1e-6) and len(seen[False]) == 3
    assert [row["sigma"] for row in rows if row["event"] == "step"] == pytest.approx([0.25 * f for f in factors], rel=1e-6)


def test_the_sigma_of_use_is_that_of_the_kept_model(images, tmp_path):
    train(config(images, epochs=1, init_sigma=0.3, test_init_sigma=0.15, test_inner_sigma=0.05), tmp_path / "run")
    for which in ("best", "last"):
        sigmas = [layer.sigma.item() for layer in noise_layers(load_model(tmp_path / "run", which, trust=True)).values()]
        assert sigmas == pytest.approx([0.15, 0.05])


@pytest.mark.parametrize(("kind", "shapes"), [("layer", [(), ()]), ("channel", [(3,), (6,)])])
def test_learned_sigmas(images, tmp_path, kind, shapes):
    settings = config(images, learnable_sigma=kind, momentum=0.0, weight_decay=1.0, schedule="step", log_steps=1, ema=0.5)
    trainer = Trainer(settings, load_data(settings))
    raws = [layer.sigma_raw for layer in noise_layers(trainer.model).values()]
    assert [tuple(raw.shape) for raw in raws] == shapes
    before = [raw.detach().clone() for raw in raws]
    trainer.advance()
    for raw, old in zip(raws, before, strict=True):  # a plain step: no weight decay, which would pull sigma up to log 2
        assert raw.grad.abs().min() > 0
        assert torch.allclose(raw, old - settings.lr * raw.grad, rtol=1e-6, atol=1e-7)

    train(dataclasses.replace(settings, lr=1.0, weight_decay=0.0, epochs=1), tmp_path / "run")
    for which in ("best", "last"):  # what was learned is kept
        kept = [layer.current_sigma() for layer in noise_layers(load_model(tmp_path / "run", which, trust=True)).values()]
        assert [tuple(sigma.shape) for sigma in kept] == shapes
        assert all((sigma - start).abs().max() > 1e-6 for sigma, start in zip(kept, (0.2, 0.1), strict=True))


def test_learned_sigmas_stay_positive(start):
    """Noise harms this loss, so sigma falls; steps so large would take a sigma that is a plain parameter below 0 at once."""
    trainer = start(learnable_sigma="channel", lr=30.0, clip=1.0, epochs=2, schedule="step", weight_decay=0.0)
    finish(trainer)
    sigmas = torch.cat([layer.current_sigma().detach() for layer in noise_layers(trainer.model).values()])
    raws = torch.cat([layer.sigma_raw.detach() for layer in noise_layers(trainer.model).values()])
    assert (sigmas > 0).all() and raws.min() < -0.1


@pytest.mark.parametrize("kind", ["layer", "channel"])
def test_regulariser_pulls_sigma_up_by_its_own_gradient(start, kind):
    """weight * -mean over layers of the mean over channels of sqrt(sigma)."""
    weight, gradients = 0.7, []
    for regulariser in (weight, 0.0):
        trainer = start(learnable_sigma=kind, sigma_regulariser=regulariser, log_steps=1)
        layers = list(noise_layers(trainer.model).values())
        expected = [weight / 2 / layer.sigma_raw.numel() * slope(layer.sigma_raw.detach()) for layer in layers]
        sigmas = [layer.current_sigma().detach() for layer in layers]
        loss = trainer.advance()["loss"]
        gradients.append([layer.sigma_raw.grad for layer in layers])
        if regulariser:
            reward, loss_with = weight * np.mean([sigma.sqrt().mean().item() for sigma in sigmas]), loss
    assert loss - loss_with == pytest.approx(reward, rel=1e-4)  # the noise is the same in both
    for with_it, without, minus in zip(*gradients, expected, strict=True):
        assert torch.allclose(without - with_it, minus, rtol=1e-4, atol=1e-6) and (minus > 1e-3).all()


def slope(raw):
    """The derivative of sqrt(softplus(raw))."""
    return torch.sigmoid(raw) / (2 * torch.log1p(raw.exp()).sqrt())


@pytest.mark.parametrize("defence", ["plain", "brelu", "adversarial"])
def test_fields_of_a_noise_that_a_defence_does_not_have_do_nothing(start, defence):
    """So that another defence can be trained from the configuration of a noisy one."""
    with_them = finish(start(defence=defence, learnable_sigma="layer", sigma_regulariser=0.5, draws=3, epochs=1))
    assert with_them == finish(start(defence=defence, epochs=1)) and "sigma" not in with_them[0]


# ------------------------------------------------------------------------------------------------------------ what the best epoch is
class Untouched:
    """A part of a data set that nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError(f"test part: {name} was read")

    __len__ = __iter__ = __getitem__ = lambda self, *_: self.__getattr__("its content")


@pytest.mark.parametrize("defence", ["rse", "adversarial"])
def test_the_loop_does_not_look_at_the_test_images(images, defence):
    settings = config(images, defence=defence, attack_steps=2, epochs=2)
    splits = dataclasses.replace(load_data(settings), test=Untouched())
    with pytest.raises(AssertionError, match="was read"):
        list(batches(splits.test, 2))
    assert finish(Trainer(settings, splits))[-1]["event"] == "epoch"


@pytest.mark.parametrize("defence", ["plain", "rse+adversarial"])
def test_the_best_epoch_is_chosen_on_validation_images_alone(images, tmp_path, defence):
    """Other test images change the figures at the end, and nothing else."""
    stored = dict(np.load(images))
    stored |= {"test_labels": (stored["test_labels"][:20] + 1) % 3, "test_images": stored["test_images"][:20]}
    np.savez(tmp_path / "other.npz", **stored)
    # A run whose accuracy goes up and down: little training, many epochs.
    runs = {}
    for name, path in (("one", images), ("other", tmp_path / "other.npz")):
        settings = config(path, defence=defence, attack_steps=2, eps=0.1, epochs=6, lr=0.3, schedule="step", keep=6)
        end = train(settings, tmp_path / name)
        runs[name] = end, [row for row in read(tmp_path / name / "log.jsonl") if row["event"] == "epoch"]
    (end, epochs), (other_end, other_epochs) = runs["one"], runs["other"]
    assert without_times(epochs) == without_times(other_epochs)
    assert (end["test_images"], other_end["test_images"]) == (30, 20)
    best = [safetensors.load_file(tmp_path / name / "best.safetensors") for name in runs]
    assert same(*best)

    scores = [row["val_attacked_accuracy" if defence == "rse+adversarial" else "val_accuracy"] for row in epochs]
    assert end["best_score"] == other_end["best_score"] == max(scores)
    assert end["best_epoch"] == other_end["best_epoch"] == scores.index(max(scores)) + 1
    fingerprint = Config.load(tmp_path / "one" / "config.json").fingerprint
    parts, _ = checkpoint.newest(tmp_path / "one" / "checkpoints", fingerprint, end["best_epoch"] * STEPS)
    assert same(best[0], parts["model"])


def test_accuracy_in_the_end_is_of_the_best_weights_on_all_test_images(images, tmp_path):
    end = train(config(images, defence="plain", batch_size=7, epochs=2), tmp_path / "run")
    splits: Splits = load_data(Config.load(tmp_path / "run" / "config.json"))
    with torch.no_grad():
        right = load_model(tmp_path / "run", trust=True)(splits.test.images.float() / 255).argmax(-1) == splits.test.labels
    assert end["test_accuracy"] == right.double().mean().item() and end["test_images"] == 30
    assert "draws" not in end


def test_the_run_names_its_data(images, tmp_path):
    train(config(images, epochs=1), tmp_path / "run")
    facts = Path(tmp_path / "run" / "data.json").read_text()
    assert '"train": 108' in facts and '"val": 12' in facts and '"test": 30' in facts


@pytest.mark.parametrize("model", ["vgg16", "model-a"])
def test_a_network_that_does_not_take_the_images_is_refused_before_there_is_a_folder(model, tmp_path):
    with pytest.raises(ValueError, match=f"model: '{model}' cannot sort images .1, 8, 8. of handwritten digits .8x8. into 10 classes"):
        train(Config(data="digits", model=model, device="cpu", epochs=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
