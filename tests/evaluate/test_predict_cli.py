"""``rse-fast predict``: the same lines from one process and from several, and from a run that was killed and continued."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rse_fast
from rse_fast import data, predict_cli
from rse_fast.models import SmallNet

ARGUMENTS = ["--model", "predicted:net", "--images", "30", "--draws", "12", "--seed", "5", "--dtype", "float32", "--device", "cpu"]


def net() -> nn.Module:
    torch.manual_seed(0)
    model = rse_fast.convert(SmallNet(in_channels=1, width=8), 0.3, 0.2)
    x = data.digits().train.images[:64].float() / 255
    with rse_fast.noise_off(model):  # noise in training differs from rank to rank
        for _ in range(3):
            model.train()(x)  # running statistics
    with torch.no_grad():
        list(model.modules())[-1].weight.mul_(4)
    return model.eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    here = str(Path(__file__).parent)
    (tmp_path / "predicted.py").write_text(f"import sys; sys.path.insert(0, {here!r})\nfrom test_predict_cli import net\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", [[], ["--early-exit", "exact"]])
def test_two_processes_predict_what_one_does(folder, how):
    assert predict_cli.main([*ARGUMENTS, *how, "--out", "one"]) == 0
    one = lines(folder / "one")
    assert [row["index"] for row in one] == list(range(30)) and len({row["label"] for row in one}) > 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rse_fast.cli", "predict"]
    done = subprocess.run([*command, *ARGUMENTS, *how, "--out", "two"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = [len((folder / "two" / f"predictions-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert counts == [15, 15]
    for a, b in zip(one, lines(folder / "two"), strict=True):
        for name in ("index", "target", "label", "draws_used"):
            assert a[name] == b[name], (name, a, b)
        assert abs(a["probability"] - b["probability"]) < 1e-5


def test_a_killed_run_continues(folder, capsys):
    assert predict_cli.main([*ARGUMENTS, "--out", "whole"]) == 0
    whole = lines(folder / "whole")
    (folder / "part").mkdir()
    (folder / "part" / "predict.json").write_text((folder / "whole" / "predict.json").read_text())
    text = (folder / "whole" / "predictions-0.jsonl").read_text()
    (folder / "part" / "predictions-0.jsonl").write_text(text[: len(text) // 2])  # ends within a line
    kept = text[: len(text) // 2].count("\n")
    capsys.readouterr()
    assert predict_cli.main([*ARGUMENTS, "--out", "part"]) == 0
    assert f"predict: {30 - kept} of {30 - kept} images, " in capsys.readouterr().out
    again = lines(folder / "part")
    assert again[:kept] == whole[:kept]
    assert [row["label"] for row in again] == [row["label"] for row in whole]

    assert predict_cli.main([*ARGUMENTS, "--draws", "3", "--out", "part"]) == 2
    assert "holds results of something else (draws 12 there, 3 here)" in capsys.readouterr().err
    (folder / "part" / "predictions-7.jsonl").write_text("nonsense\n")
    assert predict_cli.main([*ARGUMENTS, "--out", "part"]) == 2
    assert "predictions-7.jsonl' is damaged" in capsys.readouterr().err


class NaNForBrightImages(nn.Module):
    """Gives NaN for images whose mean is above ``limit``."""

    def __init__(self, limit: float):
        super().__init__()
        self.net, self.limit = net(), limit

    def forward(self, x):
        bright = x.mean((1, 2, 3), keepdim=True) > self.limit
        return self.net(x.masked_fill(bright, float("nan")))


def test_what_is_not_finite_is_null_in_the_file(folder):
    means = data.digits().test.images[:2].float().mean((1, 2, 3)) / 255
    bright, dark = int(means.argmax()), int(means.argmin())
    assert means[bright] - means[dark] > 1e-3
    (folder / "broken.py").write_text(
        f"import predicted, test_predict_cli\ndef net(): return test_predict_cli.NaNForBrightImages({float(means.mean())})\n"
    )
    with pytest.warns(RuntimeWarning, match="NaN for 1 of 2 images"):
        assert predict_cli.main([*ARGUMENTS, "--model", "broken:net", "--images", "2", "--out", "x"]) == 0

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in (folder / "x" / "predictions.jsonl").read_text().splitlines()]
    assert rows[dark]["label"] >= 0 and 0 < rows[dark]["probability"] <= 1 and rows[dark]["entropy"] >= 0
    assert rows[bright]["label"] == -1
    assert rows[bright]["probability"] is rows[bright]["entropy"] is rows[bright]["mutual_information"] is None
    assert predict_cli.read(folder / "x").keys() == {0, 1}


def test_bad_input_is_named(folder, capsys):
    assert predict_cli.main(["--out", "x"]) == 2
    assert "RUN, --model: expected one of the two" in capsys.readouterr().err
    assert predict_cli.main(["--model", "nothing:here", "--out", "x"]) == 2
    assert "--model: expected package.module:function, got 'nothing:here'" in capsys.readouterr().err
    assert predict_cli.main([*ARGUMENTS, "--resize", "8x6", "--out", "x"]) == 2
    assert "resize: only an image folder takes it" in capsys.readouterr().err
    assert predict_cli.main([*ARGUMENTS, "--data", "nowhere", "--out", "x"]) == 2
    assert "--data: expected a folder of images, got 'nowhere'" in capsys.readouterr().err
    assert predict_cli.main([*ARGUMENTS, "--draws", "0", "--out", "x"]) == 2
    assert "draws must be at least 1, got 0" in capsys.readouterr().err
    assert not (folder / "x").exists()


class Hidden(nn.Module):
    """Its logits are one of two things that it returns."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        logits = self.net(x)
        return {"other": logits * 0 + 3, "scores": logits}


def test_logits_are_named_on_the_command_line(folder, capsys):
    here = str(Path(__file__).parent)
    (folder / "hidden.py").write_text(f"import sys; sys.path.insert(0, {here!r})\nfrom test_predict_cli import Hidden as make\n")
    assert predict_cli.main([*ARGUMENTS, "--out", "plain"]) == 0
    assert predict_cli.main([*ARGUMENTS, "--model", "hidden:make", "--out", "unnamed"]) == 2
    assert "got dict with 'other', 'scores'" in capsys.readouterr().err and not (folder / "unnamed").exists()
    for choice in ("scores", "1"):
        named = [*ARGUMENTS, "--model", "hidden:make", "--logits", choice, "--out", choice]
        assert predict_cli.main(named) == (0 if choice == "scores" else 2)  # a dict has no entry 1
    assert lines(folder / "scores") == lines(folder / "plain")
    assert predict_cli.main([*ARGUMENTS, "--model", "hidden:make", "--logits", "other", "--out", "scores"]) == 2
    assert "results of something else" in capsys.readouterr().err


def pixels() -> nn.Module:
    return rse_fast.convert(nn.Conv2d(1, 3, 1))


def test_a_model_of_pixels_is_refused(folder, capsys):
    here = str(Path(__file__).parent)
    (folder / "of_pixels.py").write_text(f"import sys; sys.path.insert(0, {here!r})\nfrom test_predict_cli import pixels\n")
    assert predict_cli.main([*ARGUMENTS, "--model", "of_pixels:pixels", "--out", "x"]) == 2
    assert "--model: expected one that gives an image one label" in capsys.readouterr().err and not (folder / "x").exists()
