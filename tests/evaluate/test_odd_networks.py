"""Networks that give NaN, mask classes, or have more or fewer of them than the data set, through the commands."""

import json
import sys

import pytest
from tiny_training import write_images

from rse_fast import certify_cli, data, predict_cli
from rse_fast.evaluate import command, rows

pytest.importorskip("foolbox")
plt = pytest.importorskip("matplotlib.pyplot")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return data.digits().test


BROKEN = """
import torch, rse_fast

class Broken(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4 * 36, 10)

    def forward(self, x):
        logits = self.head(self.conv(x).relu().flatten(1))
        return logits * torch.where(x.mean((1, 2, 3), keepdim=True).view(-1, 1) > LEVEL, torch.nan, 1.0)

def net():
    torch.manual_seed(0)
    return rse_fast.convert(Broken(), 0.01, 0.01)
"""


def test_a_network_that_gives_nan_for_some_images_is_evaluated(tmp_path, monkeypatch, digits):
    """They are wrong, and a check says that the attack's gradient was NaN."""
    level = digits.images.float().mean((1, 2, 3)).median().item() / 255
    (tmp_path / "gives_nan.py").write_text(f"LEVEL = {level}\n{BROKEN}")
    monkeypatch.chdir(tmp_path)
    args = ["--model", "gives_nan:net", "--protocol", "quick", "--eps", "0.1", "--images", "12", "--draws", "3", "--device", "cpu"]
    with pytest.warns(RuntimeWarning, match="NaN for"):
        assert command.main([*args, "--out", "out"]) == 0
    found, results = rows.read(tmp_path / "out"), json.loads((tmp_path / "out" / "results.json").read_text())
    bright = [index for index in range(12) if -1 in found["clean", index]["answers"]]
    assert 0 < len(bright) < 12 and all(set(found["clean", index]["answers"]) == {-1} for index in bright)
    assert results["cases"]["clean"]["accuracy"]["mean"] <= 1 - len(bright) / 12
    attacked = [name for name, entry in results["cases"].items() if (entry.get("gradients") or {}).get("nan", 0) > 0]
    assert attacked
    assert not results["checks"][0]["passed"] and "NaN" in results["checks"][0]["text"]


ODD = """
import torch, rse_fast

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 3)
        self.classes = classes

    def forward(self, x):
        logits = self.head(5 * self.conv(x).mean((2, 3)))
        if self.classes == "masked":  # what is left are names that the data set does not have
            return torch.cat([torch.full_like(logits, -torch.inf), logits], 1)
        return logits[:, : self.classes] if self.classes < 3 else torch.cat([logits[:, :0], logits * torch.nan], 1)

def masked(): return rse_fast.convert(Net("masked").eval(), 0.1, 0.1)
def two(): return rse_fast.convert(Net(2).eval(), 0.1, 0.1)
def nan(): return rse_fast.convert(Net(3).eval(), 0.1, 0.1)
"""
COMMANDS = {
    "predict": (predict_cli.main, ["--draws", "2"]),
    "certify": (certify_cli.main, ["--n0", "2", "--n", "20"]),
    "evaluate": (
        command.main,
        [
            "--draws",
            "2",
            "--protocol",
            "quick",
            "--eps",
            "0.1",
            "--repeats",
            "2",
            "--calibration",
            "6",
            "--only",
            "clean",
            "fgsm-Linf-0.1-eot20",
        ],
    ),
}


@pytest.fixture
def run(tmp_path, monkeypatch, rng):
    """(command, network) -> (exit status, folder)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd_networks.py").write_text(ODD)
    monkeypatch.delitem(sys.modules, "odd_networks", raising=False)
    images = write_images(tmp_path / "data.npz", rng, 6, 6)

    def run(name, network):
        main, options = COMMANDS[name]
        out = tmp_path / name
        return main(
            [*options, "--images", "6", "--model", f"odd_networks:{network}", "--data", str(images), "--device", "cpu", "--out", str(out)]
        ), out

    return run


def strict(text):
    """JSON, without the NaN and Infinity that Python's reader takes and the format does not have."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def files_are_json(folder):
    for path in folder.glob("*.json*"):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strict(text)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("network", "got"), [("masked", ("✗ class 3", "✗ class 4", "✗ class 5")), ("nan", ("✗ NaN",))])
def test_files_and_pictures_of_labels_that_have_no_name(run, network, got, monkeypatch):
    drawn = []
    close = plt.Figure.savefig
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), close(figure, *a, **k))[1])
    for name in COMMANDS:
        status, out = run(name, network)
        assert status == 0
        files_are_json(out)
    assert (out / "report.md").exists()
    labels = {axes.get_xlabel() for figure in drawn for axes in figure.axes}
    marked = {text for text in labels if text[:1] in "✓✗" and text}
    assert marked and marked <= set(got), marked


@pytest.mark.parametrize("name", COMMANDS)
def test_a_network_of_fewer_classes_is_refused_before_there_is_a_folder(run, name, capsys):
    status, out = run(name, "two")
    assert status == 2 and not out.exists()
    assert "--model: expected a network of at least 3 classes, as the data set has, got one of 2" in capsys.readouterr().err
