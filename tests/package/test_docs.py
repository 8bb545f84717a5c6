"""README and documentation: Python blocks run, commands and flags in shell blocks exist, links lead somewhere."""

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
import types
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

import rse_fast
from rse_fast import cli, models, train
from rse_fast.nn import noise_layers

ROOT = Path(__file__).parents[2]
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "bench/RESULTS.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(path, language):
    return [code for kind, code in FENCE.findall(path.read_text()) if kind == language]


def pages_with(language):
    found = [path for path in TEXTS if blocks(path, language)]
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in found]


# ----------------------------------------------------------------------------------------------------------------------- Python
def network():
    """What a reader has: a network, here one that trains in an instant."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AvgPool2d(4))
    return torch.nn.Sequential(layers, torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(10))


class _Stem(torch.nn.Module):
    """The stem of a timm network, by its name, in front of a small rest."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.rest = models.make("small", 10, 8)
        self.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

    def forward(self, x):
        return self.rest(self.conv1(x))


class _HuggingFace(torch.nn.Module):
    """A classifier that takes and returns what those of transformers do."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.ModuleDict({"embedder": torch.nn.ModuleDict({"embedder": torch.nn.ModuleDict()})})
        self.network["embedder"]["embedder"]["convolution"] = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.rest = models.make("small", 10, 8)

    def forward(self, pixel_values):
        return types.SimpleNamespace(logits=self.rest(self.network["embedder"]["embedder"]["convolution"](pixel_values)))


def stand_ins(monkeypatch):
    """Packages that the tests do not install, by the few names that the pages use of them; an installed one is not replaced."""
    auto = types.SimpleNamespace(from_pretrained=lambda name: _HuggingFace())
    found = {
        "timm": {"create_model": lambda name, pretrained, num_classes: _Stem()},
        "transformers": {"AutoModelForImageClassification": auto},
        "lightning": {"LightningModule": torch.nn.Module},
        "huggingface_hub": {"PyTorchModelHubMixin": object},
    }
    for name, members in found.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("path", pages_with("python"))
def test_python_blocks_run_one_after_the_other(path, monkeypatch, tmp_path, rng, one_thread):
    stand_ins(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_model", lambda run: network())  # a run that the reader has trained before
    images, labels = torch.rand(4, 3, 16, 16), torch.randint(10, (4,))
    model = network()
    model(images)
    names = {"model": model.eval(), "images": images, "labels": labels, "loader": [(images, labels)] * 2, "__name__": "page"}
    for code in blocks(path, "python"):
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*can never")
            exec(compile(code, str(path), "exec"), names)
        found = [value for value in names.values() if isinstance(value, torch.nn.Module)]
        hardens = code.rfind("rse_fast.convert(") > code.rfind("rse_fast.revert(")
        assert not hardens or any(map(noise_layers, found)), f"nothing is hardened by\n{code}"
        for ensemble in (value for value in found if isinstance(value, rse_fast.Ensemble) and noise_layers(value)):
            probs = ensemble.predict(images).probs
            assert probs.isfinite().all() and (probs.sum(1) - 1).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------------------------ shell
@cache
def flags_of(command):
    """Every flag that the help of a command names."""
    arguments = [sys.executable, "-m", "rse_fast.evaluate.table"] if command == "table" else [sys.executable, "-m", "rse_fast.cli", command]
    done = subprocess.run([*arguments, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout))


def commands(text):
    """(command, its other words) of every call of ours in lines of a shell."""
    for line in text.splitlines():
        words = re.sub(r"\s#.*|[`'\"]", "", line).split()
        for opening, length in (("rse-fast", 1), ("-m rse_fast.cli", 2), ("-m rse_fast.evaluate.table", 2)):
            for i in range(len(words)):
                if " ".join(words[i : i + length]) == opening:
                    name = "table" if opening.endswith("table") else words[i + length]
                    yield name, words[i + length + (not opening.endswith("table")) :]


@pytest.mark.parametrize("path", pages_with(""))
def test_commands_and_flags_of_shell_blocks_exist(path):
    for code in blocks(path, ""):
        for target in re.findall(r"^make ([a-z]+)", code, re.M):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"make {target}"
        for command, words in commands(code):
            assert command in cli.COMMANDS or command == "table", command
            unknown = {word for word in words if word.startswith("--")} - flags_of(command)
            assert not unknown, f"{command}: {unknown}"


def test_every_command_has_its_place_on_the_page_of_commands():
    page = (ROOT / "docs" / "command-line.md").read_text()
    assert not [name for name in cli.COMMANDS if f"| `rse-fast {name}` |" not in page]


# ------------------------------------------------------------------------------------------------------------------------ links
def headings(path):
    """The anchors of a page's headings, as GitHub and the site make them. A page that includes another file has that file's."""
    text = path.read_text()
    if included := re.fullmatch(r'--8<-- "(.*)"\n', text):
        text = (ROOT / included[1]).read_text()
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_exist(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text())):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not anchor or anchor in headings(found), target


def test_the_site_shows_every_page():
    listed = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_messages_of_the_faq_are_those_that_users_see():
    sources = [*(ROOT / "rse_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"]
    said = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sources))  # a message may be written on several lines
    tables = (ROOT / "docs" / "faq.md").read_text().partition("## Training is slow")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", tables, re.M)
    assert len(messages) > 20 and not [message for message in messages if message not in said]


def test_names_of_the_reference_can_be_imported():
    for name in re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.M):
        module, _, attribute = name.rpartition(".")
        assert attribute in dir(importlib.import_module(module)) or importlib.util.find_spec(name), name


# ------------------------------------------------------------------------------------------------------------- what is promised
def test_the_readme_is_short_and_the_picture_small():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
    assert (ROOT / "docs" / "assets" / "front.png").stat().st_size < 100_000


def test_files_that_pages_name_are_there():
    pattern = re.compile(r"`((?:bench|docs|examples|kernels|rse_fast|tests)/[\w./+-]+)`")
    for path in TEXTS:
        missing = [name for name in pattern.findall(path.read_text()) if not (ROOT / name).exists()]
        assert not missing, f"{path.name}: {missing}"


def test_the_layout_in_the_design_names_every_module():
    layout = (ROOT / "DESIGN.md").read_text().partition("## Layout")[2].partition("## The noise contract")[0]
    modules = [path for folder in ("rse_fast", "kernels", "bench") for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    missing = [path.relative_to(ROOT).as_posix() for path in modules if path.name not in layout]
    assert len(modules) > 80 and not missing


def test_the_table_of_speed_is_what_was_measured():
    machine = json.loads((ROOT / "bench" / "results" / "epyc-avx512bf16.json").read_text())
    rates = {
        (row["case"], row["implementation"]): row["p50"]
        for row in machine["rows"]
        if row["suite"] == "ensemble" and row["metric"] == "images"
    }
    names = ("rse_fast", "rse_fast float32", "eager loop", "eager packed, bfloat16 autocast", "torch.compile packed, bfloat16 autocast",
             "plain network, packed bfloat16 in chunks (limit)", "plain network, packed float32 in chunks (limit)")  # fmt: skip
    table = (ROOT / "README.md").read_text().partition("## Speed")[2].partition("## Robustness")[0]
    shown = [tuple(map(float, cells)) for cells in re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) \|$", table, re.M)]
    measured = [tuple(float(f"{rates[f'VGG16 32x32 B={batch} n=10', name]:.3g}") for batch in (16, 1)) for name in names]
    assert shown == measured
