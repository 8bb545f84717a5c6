"""`rse-fast certify`: the table, resuming after a kill, the summary and the picture."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import certify_model
import numpy as np
import pytest
import torch

import rse_fast
from rse_fast import certify_cli, cli, data, train
from rse_fast.certify_cli import Row, read_table
from rse_fast.confidence import clopper_pearson
from rse_fast.smoothing import COVERS

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = ["--model", "certify_model:make", "--n0", "20", "--n", "120", "--alpha", "0.01", "--dtype", "float32"]


def run(out, *options):
    return cli.main(["certify", *BASE, "--out", str(out), *map(str, options)])


def facts(table):
    return [(r.index, r.target, r.label, r.radius, r.correct, r.p_lower, r.votes, r.draws) for r in table]


def test_the_table_is_what_certify_says(tmp_path, capsys):
    assert run(tmp_path, "--images", 12, "--seed", 5) == 0
    digits = data.digits().test
    x, labels = digits.images[:12].float() / 255, digits.labels[:12]
    out = rse_fast.certify(rse_fast.Ensemble(certify_model.make(), dtype="float32"), x, n0=20, n=120, alpha=0.01, seed=5)
    table = read_table(tmp_path / "certified.tsv")
    assert [r.index for r in table] == list(range(12)) and [r.target for r in table] == labels.tolist()
    assert [r.label for r in table] == out.labels.tolist() and [r.radius for r in table] == out.radius.tolist()
    assert [r.p_lower for r in table] == out.p_lower.tolist() and all(r.draws == 120 for r in table)
    assert [r.votes for r in table] == out.votes.gather(1, out.selected[:, None])[:, 0].tolist()
    assert [bool(r.correct) for r in table] == (out.labels == labels).tolist()

    summary = json.loads((tmp_path / "summary.json").read_text())
    right = (out.labels == labels) & (out.radius >= 0.1)
    at = next(c for c in summary["certified"] if c["radius"] == 0.1)
    assert at["accuracy"] == right.double().mean() and summary["settings"]["seed"] == 5
    assert [at["low"], at["high"]] == pytest.approx([float(b) for b in clopper_pearson(int(right.sum()), 12, 0.025)])
    assert summary["covers"] == COVERS and COVERS in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "certified.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "| 0.1 |" in said and f"certify: 12 of 12 images, certified {(out.labels == labels).double().mean():.1%}, " in said


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, "--images", 9, "--every", 3, "--seed", 8, "--radius", 0.05, 0.2) == 0
    expected = facts(read_table(whole / "certified.tsv"))
    assert [row[0] for row in expected] == list(range(0, 27, 3)) and len({row[-1] for row in expected}) > 1
    options = ["--images", 9, "--every", 3, "--radius", 0.05, 0.2]
    assert run(parts, *options, "--seed", 8) == 0
    text = (parts / "certified.tsv").read_bytes()
    lines = text.splitlines(keepends=True)
    for kept in (b"", lines[0], b"".join(lines[:4]) + lines[4][:7], b"".join(lines[:6]), b"".join([lines[0], *lines[5:]])):
        (parts / "certified.tsv").write_bytes(kept)
        assert run(parts, *options) == 0  # the seed is the folder's
        assert sorted(facts(read_table(parts / "certified.tsv"))) == expected
    before = (parts / "certified.tsv").read_bytes()
    assert run(parts, *options) == 0 and (parts / "certified.tsv").read_bytes() == before


def test_bound_and_tolerance_are_those_of_certify_and_part_of_the_folder(tmp_path, capsys):
    options = ["--images", 6, "--seed", 5, "--tolerance", 0.02, "--bound", "randomised"]
    assert run(tmp_path, *options) == 0
    x = data.digits().test.images[:6].float() / 255
    ensemble = rse_fast.Ensemble(certify_model.make(), dtype="float32")
    out = rse_fast.certify(ensemble, x, n0=20, n=120, alpha=0.01, seed=5, tolerance=0.02, bound="randomised")
    table = read_table(tmp_path / "certified.tsv")
    assert [r.radius for r in table] == out.radius.tolist() and [r.draws for r in table] == out.draws.tolist()
    summary = (tmp_path / "summary.md").read_text()
    assert "bound randomised" in summary and "enlarge the radius by 0.02 at most" in summary
    assert run(tmp_path, *options[:-2]) == 2 and "bound 'randomised' there, 'clopper-pearson' here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, *options, "--radius", 0.1)


def test_a_killed_run_loses_no_line_that_was_written(tmp_path):
    options = ["--n", "4000", "--images", "60", "--seed", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "rse_fast.cli", "certify", *BASE, *options]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1] / "helpers"),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    table, end = tmp_path / "certified.tsv", time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None and (not table.exists() or table.read_bytes().count(b"\n") < 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # before it was done
    seen = facts(read_table(table))
    assert 2 <= len(seen) < 60
    assert run(tmp_path, "--n", 4000, "--images", len(seen) + 2, "--seed", 2) == 0
    assert facts(read_table(table))[: len(seen)] == seen and len(read_table(table)) == len(seen) + 2


def test_a_training_run_is_certified_with_its_data(tmp_path, capsys):
    config = train.Config(defence="rse", model="small", epochs=1, batch_size=512, init_sigma=0.25, seed=3)
    train.train(config, tmp_path / "run")
    out = tmp_path / "out"
    assert cli.main(["certify", str(tmp_path / "run"), "--n", "50", "--images", "2", "--seed", "4", "--out", str(out)]) == 0
    settings = json.loads((out / "certify.json").read_text())
    assert settings["sigma"] == 0.25 and settings["data"] == data.digits().name
    x = data.digits().test.images[:2].float() / 255
    expected = rse_fast.certify(rse_fast.Ensemble(train.load_model(tmp_path / "run")), x, n=50, seed=4)
    assert [row.radius for row in read_table(out / "certified.tsv")] == expected.radius.tolist()
    train.train(dataclasses.replace(config, defence="plain"), tmp_path / "plain")
    assert cli.main(["certify", str(tmp_path / "plain"), "--out", str(out)]) == 2
    assert "model must have noisy layers" in capsys.readouterr().err


def test_images_of_one_class_only_are_told(tmp_path, rng):
    images = rng.integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    for name, labels in (("sorted", np.arange(12) // 4), ("mixed", np.arange(12) % 3)):
        np.savez(tmp_path / f"{name}.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    given = ["--data", tmp_path / "sorted.npz", "--images", 3]
    with pytest.warns(RuntimeWarning, match="these 3 images are of 1 of its 3 classes; --every 4 takes"):
        assert run(tmp_path / "a", *given) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path / "b", *given, "--every", 4) == 0
        assert run(tmp_path / "c", "--data", tmp_path / "mixed.npz", "--images", 2) == 0
    assert [row.target for row in read_table(tmp_path / "b" / "certified.tsv")] == [0, 1, 2]


def test_a_folder_goes_on_to_other_images(tmp_path, capsys):
    """A certificate depends on the index of its image alone, not on which others are certified."""
    assert run(tmp_path / "some", "--images", 3, "--every", 2, "--seed", 5) == 0
    assert run(tmp_path / "some", "--images", 4, "--seed", 5) == 0
    assert run(tmp_path / "all", "--images", 4, "--seed", 5) == 0
    some, whole = (read_table(tmp_path / name / "certified.tsv") for name in ("some", "all"))
    assert [row.index for row in some] == [0, 2, 4, 1, 3]
    assert sorted(facts(row for row in some if row.index < 4)) == facts(whole)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("some", "all")]
    assert summaries[0]["images"] == 4 and summaries[0]["certified"] == summaries[1]["certified"]


@pytest.mark.parametrize(
    "changed", (["--n", 130], ["--seed", 6], ["--alpha", 0.02], ["--radius", 0.1], ["--dtype", "bfloat16"], ["--part", "val"])
)
def test_a_folder_of_other_settings_is_refused(changed, tmp_path, capsys):
    assert run(tmp_path, "--images", 1, "--seed", 5) == 0
    before = (tmp_path / "certified.tsv").read_bytes()
    assert run(tmp_path, "--images", 1, *changed) == 2
    assert changed[0][2:].replace("radius", "radii") in capsys.readouterr().err
    assert (tmp_path / "certified.tsv").read_bytes() == before


def test_other_weights_are_other_settings(tmp_path, capsys, monkeypatch):
    assert run(tmp_path, "--images", 1, "--seed", 5) == 0
    made = certify_model.make()
    with torch.no_grad():
        made.head.bias[0] += 1e-3
    monkeypatch.setattr(certify_model, "make", lambda: made)
    assert run(tmp_path, "--images", 1, "--seed", 5) == 2
    assert "weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "certify_model:plain"], "model must have noisy layers"),
        (["--model", "certify_model:nothing"], "--model: expected package.module:function"),
        (["--model", "certify_model"], "--model: expected package.module:function"),
        (["some-run"], "RUN, --model: expected one of the two"),
        (["--every", 0], "--every: expected at least 1, got 0"),
        (["--images", 0], "--images: expected at least 1, got 0"),
        (["--alpha", 2], "alpha must be in"),
        (["--dtype", "int7"], "dtype must be"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, capsys):
    assert run(tmp_path / "out", "--images", 1, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("rse-fast certify: ") and message in error and error.count("\n") == 1


def test_what_is_refused_leaves_no_folder(tmp_path, capsys):
    for wrong in (["--n", 0], ["--n0", 0], ["--alpha", 2], ["--radius", -1]):
        assert run(tmp_path / "out", "--images", 1, *wrong) == 2
        assert not (tmp_path / "out").exists()


def test_a_damaged_table_is_refused(tmp_path, capsys):
    assert run(tmp_path, "--images", 2) == 0
    table = tmp_path / "certified.tsv"
    whole = table.read_text()
    for damaged in (whole.replace("radius", "radios"), whole + "x\ty\n", whole.replace("\t", " ")):
        table.write_text(damaged)
        assert run(tmp_path, "--images", 3) == 2 and "--out" in capsys.readouterr().err
        assert table.read_text() == damaged


def test_the_curve_counts_what_is_right_and_certified():
    rows = [(0, 0, 0.5), (1, 2, 0.9), (1, -1, 0.0), (3, 3, 0.2)]
    table = [Row(i, label, p, r, int(label == p), 0.6, 3, 5, 0.1) for i, (label, p, r) in enumerate(rows)]
    assert [certify_cli.certified_accuracy(table, r)[0] for r in (0, 0.2, 0.3, 0.5, 0.6)] == [0.5, 0.5, 0.25, 0.25, 0.0]
    settings = {"n0": 1, "radii": None, "n": 5}
    summary = certify_cli.summarise(table, settings, "rse-fast certify")
    assert (summary["abstained"], summary["wrong"], summary["mean_radius"]) == (0.25, 0.25, pytest.approx(0.175))
    assert summary["draws_per_image"] == 6 and [c["radius"] for c in summary["certified"]] == [0, 0.1, 0.25, 0.5, 0.75]
