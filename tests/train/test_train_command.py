"""``rse-fast train`` as it is called: flags, the configuration that is kept, what a run folder holds, and what is refused."""

import dataclasses
import io
import json
import os
import random
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_images import cifar_batches, make_folder, write_cifar
from tiny_training import config, same, without_times

pytest.importorskip("tqdm")
safetensors = pytest.importorskip("safetensors.torch")

from rse_fast import cli  # noqa: E402
from rse_fast.train import Config, Trainer, load_model  # noqa: E402
from rse_fast.train.command import main  # noqa: E402
from rse_fast.train.log import draw_curves, read  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--model", "tiny_training:net", "--epochs", "1", "--batch-size", "18", "--log-steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The folder of a short run, and what the command printed. Not to be changed."""
    threads, out = torch.get_num_threads(), tmp_path_factory.mktemp("runs") / "run"
    torch.set_num_threads(1)
    stdout, sys.stdout = sys.stdout, io.StringIO()
    try:
        assert cli.main(["train", "--data", str(images), "--out", str(out), *TINY, "--epochs", "2"]) == 0
        return out, sys.stdout.getvalue()
    finally:
        sys.stdout = stdout
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """The command puts the current folder on sys.path for a user's own model."""
    monkeypatch.setattr(sys, "path", list(sys.path))


# ------------------------------------------------------------------------------------------------------------------ the configuration
def test_what_was_given_is_kept_and_the_rest_is_the_default(images, tmp_path):
    flags = {
        "defence": "rse", "init_sigma": 0.25, "inner_sigma": 0.15, "sigma_warmup": 0.5, "test_inner_sigma": 0.05, "draws": 2, "lr": 0.02,
        "schedule": "step", "momentum": 0.8, "nesterov": False, "weight_decay": 1e-4, "label_smoothing": 0.1, "ema": 0.9, "clip": 2.0,
        "bf16": True, "channels_last": False, "seed": 7, "keep": 1, "save_steps": 2, "val_fraction": 0.2, "eps": 4 / 255, "workers": 1,
        "start_scale": 0.5, "full_scale": 0.3,
    }  # fmt: skip
    argv = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        text = "4/255" if name == "eps" else str(value)
        argv += [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [flag, text]
    assert main(["--data", str(images), "--out", str(tmp_path / "run"), *TINY, *argv]) == 0
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    given = {"data": str(images), "model": "tiny_training:net", "epochs": 1, "batch_size": 18, "log_steps": 2, "device": "cpu"} | flags
    assert kept == dataclasses.asdict(Config(**given))
    assert {name: kept[name] for name in given} == given
    assert Config.load(tmp_path / "run" / "config.json") == Config(**given)


def test_any_configuration_survives_its_file(tmp_path, rng):
    """Random values in every field."""
    choose = random.Random(int(rng.integers(2**32)))

    def value(f):
        rule = f.metadata
        if rule["optional"] and choose.random() < 0.3 or f.name in ("sigma_regulariser", "learnable_sigma"):
            return f.default
        if rule["choices"]:
            return choose.choice(rule["choices"])
        if rule["kind"] is bool:
            return choose.random() < 0.5
        if rule["kind"] is str:
            return choose.choice(["cpu", "a b", 'quote"d', "bäckerei", "mine:net"])
        low = max(rule["low"], rule["above"], 0)
        high = min(rule["high"], low + 50)
        return choose.randint(int(low), int(high)) if rule["kind"] is int else choose.uniform(low, high) + 1e-9 * (high > low + 1)

    for _ in range(30):
        fields = {f.name: value(f) for f in dataclasses.fields(Config)} | {"sigma_warmup": 0.25}
        fields["full_scale"] = fields["start_scale"] and fields["full_scale"]
        if fields["compile"] or fields["start_scale"] is not None:
            fields["cuda_graphs"] = fields["cuda_graphs"] and None
        settings = Config(**fields)
        settings.save(tmp_path / "config.json")
        assert Config.load(tmp_path / "config.json") == settings
        assert Config.load(tmp_path / "config.json").fingerprint == settings.fingerprint
        assert dataclasses.replace(settings, seed=settings.seed + 1).fingerprint != settings.fingerprint
        assert dataclasses.replace(settings, log_steps=settings.log_steps + 1).fingerprint == settings.fingerprint


def test_a_field_of_later_versions_that_is_not_used_changes_no_run():
    clip = next(f for f in dataclasses.fields(Config) if f.name == "clip")
    added = [("later", "float | None", dataclasses.field(default=None, metadata=clip.metadata))]
    later = dataclasses.make_dataclass("Later", added, bases=(Config,), frozen=True, kw_only=True)
    assert later().fingerprint == Config().fingerprint != later(later=3.0).fingerprint
    assert Config(clip=1.0).fingerprint != Config().fingerprint


def test_the_configuration_given_back_repeats_the_run_and_a_flag_changes_its_field(run, tmp_path):
    source = str(run[0] / "config.json")
    assert main(["--trust", "--config", source, "--out", str(tmp_path / "again")]) == 0
    assert main(["--trust", "--config", source, "--out", str(tmp_path / "other"), "--seed", "5"]) == 0
    again, other = (Config.load(tmp_path / name / "config.json") for name in ("again", "other"))
    assert again == Config.load(run[0] / "config.json") == dataclasses.replace(other, seed=0) != other
    logs = [without_times(read(folder / "log.jsonl")) for folder in (run[0], tmp_path / "again", tmp_path / "other")]
    assert logs[0] == logs[1] != logs[2]
    assert same(*(safetensors.load_file(folder / "best.safetensors") for folder in (run[0], tmp_path / "again")))


def test_none_takes_an_optional_field_back(run, tmp_path):
    config(Config.load(run[0] / "config.json").data, epochs=1, clip=0.5, learnable_sigma="layer", resize=8, start_scale=0.5).save(
        tmp_path / "config.json"
    )
    none = ["--clip", "none", "--learnable-sigma", "none", "--resize", "none", "--start-scale", "none"]
    assert main(["--trust", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run"), *none]) == 0
    found = Config.load(tmp_path / "run" / "config.json")
    assert (found.clip, found.learnable_sigma, found.resize, found.start_scale) == (None,) * 4
    with pytest.raises(SystemExit):
        main(["--lr", "none"])


def test_without_a_folder_the_run_is_named_after_model_and_defence(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", str(images), *TINY]) == 0
    assert main(["--trust", "--config", "runs/tiny_training.net-rse/config.json", "--defence", "brelu"]) == 0
    assert sorted(os.listdir("runs")) == ["tiny_training.net-brelu", "tiny_training.net-rse"]
    config(images, defence="plain", epochs=1).save(tmp_path / "config.json")
    assert main(["--trust", "--config", "config.json"]) == 0  # model and defence are the file's
    assert sorted(os.listdir("runs"))[1] == "tiny_training.net-plain"


def test_another_defence_brings_its_own_temperature(tmp_path, images):
    config(images, defence="distillation", epochs=1).save(tmp_path / "config.json")
    assert main(["--trust", "--config", str(tmp_path / "config.json"), "--defence", "plain", "--out", str(tmp_path / "plain")]) == 0
    assert Config.load(tmp_path / "plain" / "config.json").temperature == 1.0
    again = ["--trust", "--config", str(tmp_path / "plain" / "config.json"), "--defence", "distillation"]
    assert main([*again, "--out", str(tmp_path / "d")]) == 0
    assert Config.load(tmp_path / "d" / "config.json").temperature == 100.0


# -------------------------------------------------------------------------------------------------------------------------- bad input
BAD = [
    (["--lr", "0"], "lr"), (["--lr", "nan"], "lr"), (["--lr", "much"], "--lr"), (["--eps", "1/0"], "--eps"), (["--eps", "2"], "eps"),
    (["--init-sigma", "-0.1"], "init_sigma"), (["--test-inner-sigma", "-1"], "test_inner_sigma"), (["--epochs", "0"], "epochs"),
    (["--epochs", "1.5"], "--epochs"), (["--batch-size", "0"], "batch_size"), (["--batch-size", "1000"], "batch_size"),
    (["--draws", "0"], "draws"), (["--defence", "magic"], "--defence"), (["--schedule", "cosine"], "--schedule"),
    (["--val-fraction", "0"], "val_fraction"), (["--val-fraction", "0.95"], "val_fraction"), (["--sigma-warmup", "2"], "sigma_warmup"),
    (["--learnable-sigma", "layer", "--sigma-warmup", "1"], "learnable_sigma"), (["--sigma-regulariser", "1"], "sigma_regulariser"),
    (["--learnable-sigma", "layer", "--test-init-sigma", "1"], "learnable_sigma"), (["--label-smoothing", "1.1"], "label_smoothing"),
    (["--learnable-sigma", "layer", "--inner-sigma", "0"], "inner_sigma"), (["--ema", "2"], "ema"), (["--clip", "0"], "clip"),
    (["--model", "nothing"], "model"), (["--model", "no_such_module_here:net"], "model"), (["--model", "tiny_training:nothing"], "model"),
    (["--model", "tiny_training:Path"], "model"), (["--data", "nowhere"], "--data"), (["--resize", "8"], "resize"), (["--lazy"], "lazy"),
    (["--device", "abacus"], "device"), (["--config", "nowhere.json"], "config"), (["--from-step", "3"], "--from-step"),
    (["--resume", "nowhere"], "--resume"), (["--keep", "0"], "keep"), (["--seed", "-1"], "seed"), (["--what", "1"], "--what"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "name"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_fields_are_named_before_anything_is_written(images, tmp_path, monkeypatch, capsys, flags, name):
    monkeypatch.chdir(tmp_path)
    argv = ["--data", str(images), *TINY, "--out", "run", *flags]
    try:
        status = main(argv)
    except SystemExit as error:  # argparse's
        status = error.code
    said = capsys.readouterr().err
    assert status == 2 and f" {name}" in said.splitlines()[-1], said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot read"), ("[1]", "got list"), ('{"lr": 0.1, "momentun": 1}', "momentun"), ('{"lr": "1"}', "^lr: expected float"),
        ('{"epochs": true}', "^epochs: expected int"), ('{"epochs": 2.0}', "^epochs: expected"), ('{"lr": null}', "^lr: expected float"),
        ('{"lr": NaN}', "^lr: expected a number above 0"), ('{"defence": "none"}', "^defence: expected one of plain, rse"),
    ],
)  # fmt: skip
def test_bad_configuration_files(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, TypeError), match=words):
        Config.load(tmp_path / "config.json")
    assert main(["--trust", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_divergence_ends_with_1_and_a_line(images, tmp_path, capsys):
    assert main(["--data", str(images), "--out", str(tmp_path / "run"), *TINY, "--lr", "1e30", "--schedule", "step"]) == 1
    assert "training diverged" in capsys.readouterr().err.splitlines()[-1]


# -------------------------------------------------------------------------------------------------------------------- what a run leaves
def test_rows_of_the_log(run):
    rows = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["start", *["step"] * 3, "epoch", *["step"] * 3, "epoch", "end"]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 6, 8, 10, 12, 12, 12]
    assert rows[0].keys() >= {"defence", "model", "parameters", "processes", "device", "torch"}
    step = {"event", "step", "epoch", "loss", "lr", "sigma", "seconds", "cpu_seconds"}
    assert all(row.keys() == step for row in rows if row["event"] == "step")
    assert all(row.keys() == step | {"accuracy", "val_loss", "val_accuracy"} for row in rows if row["event"] == "epoch")
    best, test = {"best_score", "best_epoch"}, {"test_images", "test_accuracy", "draws", "test_ensemble_accuracy"}
    assert rows[-1].keys() == {"event", "step", "cpu_seconds"} | best | test
    spent = [row["cpu_seconds"] for row in rows[1:]]
    assert spent == sorted(spent) and 0 < spent[0] < spent[-1]
    assert rows[-1]["best_score"] == max(row["val_accuracy"] for row in rows if row["event"] == "epoch")


def test_the_last_line_says_what_came_out(run):
    folder, said = run
    end = read(folder / "log.jsonl")[-1]
    assert said.strip().splitlines()[-1] == (
        f"{folder}: best epoch {end['best_epoch']} ({end['best_score']:.2%} in validation); test accuracy {end['test_accuracy']:.2%}, "
        f"{end['test_ensemble_accuracy']:.2%} with 10 draws"
    )


def test_without_a_terminal_a_line_says_how_far_the_run_is(run):
    folder, said = run
    row = [row for row in read(folder / "log.jsonl") if row["event"] == "epoch"][-1]
    line = [line for line in said.splitlines() if "12 of 12 steps" in line][-1]
    known = f"rse: 12 of 12 steps, epoch 2 of 2, loss {row['loss']:.3g}, validation accuracy {row['val_accuracy']:.1%}, "
    assert line.startswith(known) and re.fullmatch(r"\d+ s", line.removeprefix(known))


def test_the_curves_are_a_picture_of_the_log(run):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    with Image.open(run[0] / "curves.png") as picture:
        assert picture.format == "PNG" and 3 < picture.width / picture.height < 4.5  # three panels side by side
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    panels = np.array_split(pixels, 3, axis=1)
    coloured = [(np.ptp(panel, axis=-1) > 60).sum() for panel in panels]  # axes and text are grey, curves are not
    assert min(coloured) > 50, coloured


@pytest.mark.parametrize(("sigmas", "panels"), [((0.1, 0.1, 0.1), 2), ((0.1, 0.2, 0.3), 3)], ids=["constant", "growing"])
def test_what_stays_constant_has_no_panel(sigmas, panels, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    rows = [{"event": "epoch", "epoch": n, "loss": 1 / n, "lr": 0.1 / n, "sigma": sigma} for n, sigma in enumerate(sigmas, 1)]
    draw_curves(rows, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert round(picture.width * 3.2 / picture.height) == 4 * panels


def test_tensorboard_has_the_figures_of_the_log(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    for event, name in (("step", "loss"), ("step", "lr"), ("epoch", "val_accuracy"), ("epoch", "sigma")):
        logged = [(row["step"], row[name]) for row in read(run[0] / "log.jsonl") if row["event"] == event]
        found = [(scalar.step, scalar.value) for scalar in events.Scalars(f"{event}/{name}")]
        assert [step for step, _ in found] == [step for step, _ in logged]
        assert [value for _, value in found] == pytest.approx([value for _, value in logged], rel=1e-6)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_progress_on_a_terminal_alone(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["--data", str(images), "--out", str(tmp_path / "run"), *TINY]) == 0
    shown = sys.stderr.getvalue().split("\r")[-1]
    assert "6/6" in shown and "100%" in shown and "validation accuracy" in shown and shown.startswith("rse:")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert main(["--data", str(images), "--out", str(tmp_path / "quiet"), *TINY]) == 0
    assert sys.stderr.getvalue() == ""


def test_ctrl_c_saves_and_ends_with_130(run, tmp_path, monkeypatch, capsys):
    advance = Trainer.advance

    def interrupted(self):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", interrupted)
    assert main(["--trust", "--config", str(run[0] / "config.json"), "--out", str(tmp_path / "run")]) == 130
    assert "stopped at step 4 and saved; to continue: rse-fast train --resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["--trust", "--resume", str(tmp_path / "run")]) == 0
    assert without_times(read(tmp_path / "run" / "log.jsonl")) == without_times(read(run[0] / "log.jsonl"))


def test_resume_names_the_folder_alone(run, capsys):
    assert main(["--resume", str(run[0]), "--out", "elsewhere"]) == 2
    assert "--resume: names the run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------- models and data
MINE = """
from torch import nn

def make(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.Flatten(), nn.Linear(144, num_classes))
"""


def test_a_model_of_the_users_own(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine_of_test_train_command.py").write_text(MINE)
    name = "mine_of_test_train_command:make"
    assert main(["--data", str(images), "--out", "run", *TINY, "--model", name]) == 0
    model = load_model("run", trust=True)
    assert model[2].weight.shape == (3, 144) and read(Path("run/log.jsonl"))[0]["model"] == name
    del sys.modules["mine_of_test_train_command"]


def test_auxiliary_heads_leave_the_main_one_to_be_trained(run, images, tmp_path, capsys):
    rows = []
    for kind in ("tuple", "dict"):
        model = ["--epochs", "2", "--model", f"tiny_training:net_with_a_{kind}"]
        assert main(["--data", str(images), "--out", str(tmp_path / kind), *TINY, *model]) == 0
        rows.append(without_times(read(tmp_path / kind / "log.jsonl")))
    assert rows[0] == rows[1] == without_times(read(run[0] / "log.jsonl"))
    assert main(["--data", str(images), "--out", str(tmp_path / "puzzle"), *TINY, "--model", "tiny_training:net_with_a_puzzle"]) == 2
    assert "model must return logits, or something with obvious ones" in capsys.readouterr().err


@pytest.mark.parametrize("defence", ["plain", "distillation", "rse+adversarial"])
def test_logits_in_a_mapping_are_trained_as_logits_alone(images, tmp_path, defence):
    logs = []
    for name in ("net", "net_with_names"):
        model = ["--defence", defence, "--model", f"tiny_training:{name}"]
        assert main(["--data", str(images), "--out", str(tmp_path / name), *TINY, *model]) == 0
        rows = without_times(read(tmp_path / name / "log.jsonl"))
        logs.append([{key: value for key, value in row.items() if key != "model"} for row in rows])
    assert logs[0] == logs[1] and logs[0][-1]["event"] == "end"


@pytest.mark.slow
@pytest.mark.parametrize(("defence", "error"), [("plain", 1e-3), ("rse", 0.1)])
def test_compiled_training_is_the_same_training(images, tmp_path, compiler, defence, error):
    """With noise it is so on average: compiled code draws its seeds from another generator."""
    figures = []
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        assert main(["--data", str(images), "--out", str(tmp_path / name), *TINY, "--defence", defence, *flags]) == 0
        figures.append([row["loss"] for row in read(tmp_path / name / "log.jsonl") if "loss" in row])
    assert np.allclose(*figures, rtol=error)
    assert json.loads((tmp_path / "compiled" / "config.json").read_text())["compile"]
    names = [load_model(tmp_path / name, trust=True).state_dict().keys() for name in ("compiled", "eager")]
    assert names[0] == names[1]


def test_a_folder_of_images_decoded_once_or_by_workers(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setenv("RSE_FAST_CACHE", str(tmp_path / "cache"))
    make_folder(tmp_path / "images", per_class=12)
    flags = ["--data", str(tmp_path / "images"), "--resize", "8", *TINY, "--batch-size", "4"]
    for name, options in (("cached", []), ("again", []), ("lazy", ["--lazy", "--workers", "1"]), ("none", ["--lazy", "--workers", "0"])):
        assert main([*flags, *options, "--out", str(tmp_path / name)]) == 0
    logs = [without_times(read(tmp_path / name / "log.jsonl")) for name in ("cached", "again", "lazy", "none")]
    assert all(log == logs[0] for log in logs) and len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    assert json.loads((tmp_path / "cached" / "data.json").read_text())["classes"] == ["cat", "dog"]


def test_both_releases_of_cifar10(tmp_path):
    written = cifar_batches(10)
    for kind in ("binary", "python 2"):
        (tmp_path / kind).mkdir()
        write_cifar(tmp_path / kind, written, kind)
        assert main(["--data", str(tmp_path / kind), "--out", str(tmp_path / f"{kind} run"), *TINY, "--val-fraction", "0.2"]) == 0
    logs = [without_times(read(tmp_path / f"{kind} run" / "log.jsonl")) for kind in ("binary", "python 2")]
    assert logs[0] == logs[1] and logs[0][-1]["test_images"] == 10


@pytest.mark.parametrize("content", [{"[" * 30_000: 1}, {"epochs": "9" * 4000}, {"data": ["a" * 30_000]}])
def test_a_configuration_as_long_as_a_book_has_a_short_error(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json") as error:
        Config.load(path)
    assert len(str(error.value)) < 1000 + len(str(path))
