"""The demo, run for real on a tiny scale: what it writes, that its figures agree, that bad input and Ctrl-C end it cleanly."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rse_fast
from rse_fast.models import SmallNet

for package in ("foolbox", "matplotlib", "rich", "sklearn", "tqdm"):
    pytest.importorskip(package)
Image = pytest.importorskip("PIL.Image")

from rse_fast import demo, demo_report  # noqa: E402
from rse_fast.evaluate.estimate import wilson_interval  # noqa: E402

TINY = ["--quick", "--epochs", "1", "--attack-images", "6", "--test-images", "40", "--steps", "2", "--draws", "3", "--eps", "0.1", "8/255"]
PICTURES = ("accuracy-eps.png", "accuracy-draws.png", "examples.png")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The folder of one complete tiny run on the digits."""
    out = tmp_path_factory.mktemp("demo") / "nested" / "report"
    assert demo.main([*TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(report) -> dict:
    return json.loads((report / "results.json").read_text())


def estimates(tree) -> list[dict]:
    """All measured accuracies in the results."""
    if isinstance(tree, dict):
        own = [tree] if {"mean", "low", "high"} <= tree.keys() else []
        return own + [found for value in tree.values() for found in estimates(value)]
    return [found for value in tree for found in estimates(value)] if isinstance(tree, list) else []


def test_writes_report_json_and_pictures_and_nothing_else(report):
    assert sorted(os.listdir(report)) == sorted(["report.md", "results.json", *PICTURES])
    for name in PICTURES:
        with Image.open(report / name) as picture:
            picture.load()
            assert min(picture.size) > 400
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50  # drawn on


def test_results_are_complete_and_consistent(results):
    assert results["status"] == "complete"
    assert results["settings"]["eps"] == [8 / 255, 0.1]
    assert [level["eps"] for level in results["attack"]["levels"]] == [8 / 255, 0.1]
    assert results["versions"]["torch"] == torch.__version__ and results["versions"]["foolbox"]
    assert [row["epoch"] for row in results["training"]["rse"]["epochs"]] == [1]
    assert results["accuracy"]["plain"]["images"] == 40
    found = estimates(results)
    assert len(found) == 3 + 2 + 2 * 3 + 2 * 4  # clean, unattacked, attacked, draws 1 2 3 5 on clean and attacked images
    for estimate in found:
        assert 0 <= estimate["low"] <= estimate["mean"] <= estimate["high"] <= 1
        assert estimate["mean"] == pytest.approx(np.mean(estimate["repeats"]))
        assert all(abs(value * estimate["images"] - round(value * estimate["images"])) < 1e-9 for value in estimate["repeats"])
    for key in ("clean", "attacked"):
        assert [row["draws"] for row in results["draws"][key]] == [1, 2, 3, 5]
        assert [len(row["repeats"]) for row in results["draws"][key]] == [5, 2, 1, 1]
    assert results["accuracy"]["rse_one_draw"] == results["draws"]["clean"][0]


def test_every_scoring_used_another_seed(results):
    seeds = [seed for estimate in estimates(results) for seed in estimate.get("seeds", [])]
    assert len(seeds) == 2 * (1 + 1 + 2 * 2)  # repeats x (clean, unattacked, two levels with transfer)
    assert len(set(seeds)) == len(seeds)


def test_attack_stays_in_its_ball_and_uses_it(results):
    for level in results["attack"]["levels"]:
        assert level["eps"] * 0.9 < level["largest_change"] <= level["eps"] + 1e-6


def test_speed_ratio_is_that_of_the_rates(results):
    speed = results["speed"]
    rounds = speed["rounds"]
    loops = {name: np.median(rates) for name, rates in rounds.items() if name not in ("plain", "ensemble")}
    assert len(loops) == 3 and {len(rates) for rates in rounds.values()} == {3}
    assert speed["eager_loop_form"] == max(loops, key=loops.get)
    assert speed["eager_loop"] == pytest.approx(max(loops.values()))
    assert speed["ensemble"] == pytest.approx(np.median(rounds["ensemble"]))
    assert speed["ratio"] == pytest.approx(np.median(np.divide(rounds["ensemble"], rounds[speed["eager_loop_form"]])))


def percent(estimate: dict) -> str:
    spread = "" if estimate["sd"] is None else f" ± {100 * estimate['sd']:.1f}"
    return f"{100 * estimate['mean']:.1f}{spread} ({100 * estimate['low']:.1f}–{100 * estimate['high']:.1f})"


def test_report_is_made_from_the_json_and_links_to_what_is_there(report, results):
    text = (report / "report.md").read_text()
    assert text == demo_report.markdown(results, list(PICTURES))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (report / target).is_file()
    for name in PICTURES:
        assert f"]({name})" in text


def test_report_puts_every_figure_in_its_place(results):
    results = copy.deepcopy(results)
    for index, estimate in enumerate(estimates(results)):  # a tiny run may measure the same accuracy twice
        estimate |= {"mean": 0.3 + index / 100, "low": 0.2 + index / 100, "high": 0.5 + index / 100}
    text = demo_report.markdown(results, [])
    accuracy, speed, levels = results["accuracy"], results["speed"], results["attack"]["levels"]
    one_draw = percent(accuracy["rse_one_draw"] | {"sd": None})
    rows = [("clean", percent(accuracy["plain"]), one_draw, percent(accuracy["rse_ensemble"]))]
    rows += [
        (f"PGD eps {name}", percent(lv["plain"]), "–", percent(lv["rse_ensemble"]))
        for name, lv in zip(("8/255", "0.1"), levels, strict=True)
    ]
    for name, lv in zip(("8/255", "0.1"), levels, strict=True):
        rows.append((name, percent(lv["plain"]), percent(lv["rse_ensemble"]), percent(lv["rse_transfer"]), f"{lv['largest_change']:.4f}"))
    rows.append(("ensemble/loop", "–", "–", f"{speed['ratio']:.2f}x"))
    for row in rows:
        assert f"\n| {' | '.join(row)} |\n" in text
    assert re.findall("^## (.*)", text, re.MULTILINE)[-3:] == ["Speed", "Training", "Versions"]
    assert "no full robustness evaluation" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_report_warns_when_the_transfer_is_stronger_than_the_attack(results):
    def text(transfer: float, ensemble: float) -> str:
        level = results["attack"]["levels"][0]
        level = level | {
            "rse_transfer": level["rse_transfer"] | {"mean": transfer},
            "rse_ensemble": level["rse_ensemble"] | {"mean": ensemble, "low": ensemble - 0.1},
        }
        return demo_report.markdown(results | {"attack": results["attack"] | {"levels": [level]}}, [])

    assert "**Warning:**" in text(transfer=0.3, ensemble=0.5)
    assert "**Warning:**" not in text(transfer=0.45, ensemble=0.5)
    assert "**Warning:**" not in text(transfer=0.7, ensemble=0.5)


def test_diverging_training_is_said_in_one_line(tmp_path, capsys):
    assert demo.main([*TINY, "--init-sigma", "3e38", "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "RSE" in line and "diverged" in line
    assert os.listdir(tmp_path) == []


def test_another_run_trains_the_same_and_shows_one_table_in_80_columns(tmp_path, monkeypatch, capsys, results):
    monkeypatch.setenv("COLUMNS", "80")
    assert demo.main([*TINY, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("RSE, n = 3") == 1
    for row in ("clean", "PGD eps 8/255", "PGD eps 0.1", "images/s", "images/s, loop", "ensemble/loop"):
        assert re.search(rf"^\s*{re.escape(row)}\s", shown, re.MULTILINE), row
    assert "…" not in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    again = json.loads((tmp_path / "results.json").read_text())
    for name in ("plain", "rse"):
        assert again["training"][name]["epochs"] == results["training"][name]["epochs"]
    assert again["accuracy"]["plain"] == results["accuracy"]["plain"]


def test_image_folder_run(tmp_path, rng):
    for level, name in ((40, "dark"), (128, "grey"), (215, "light")):
        for i in range(30):
            pixels = np.clip(rng.normal(level, 20, (12, 14, 3)), 0, 255).astype(np.uint8)
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.jpg")
    out = tmp_path / "out"
    assert demo.main([*TINY, "--data", str(tmp_path / "images"), "--out", str(out), "--resize", "10", "--bf16"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["name"] == "images (JPEG)"
    assert results["data"]["classes"] == ["dark", "grey", "light"]
    assert results["data"]["shape"] == [3, 10, 10]
    assert results["accuracy"]["plain"]["images"] == 18
    assert "images (JPEG)" in (out / "report.md").read_text()


def test_eager_peer_computes_what_the_ensemble_computes():
    """The loop that is timed beside the ensemble is the same model: their mean softmax agrees within the noise of the draws."""
    net, draws = SmallNet(in_channels=1, width=4).eval(), 1000
    images = torch.rand(4, 1, 8, 8)
    noisy = rse_fast.convert(SmallNet(in_channels=1, width=4), init_sigma=0.7, inner_sigma=0.5)
    noisy.load_state_dict(net.state_dict())
    clean = net(images).softmax(-1)
    demo.add_eager_noise(net, 0.7, 0.5)
    with torch.inference_mode():
        one_by_one = torch.stack([net(images).softmax(-1) for _ in range(200)])
    standard_error = one_by_one.std(0) * math.sqrt(2 / draws)
    loop = demo.eager_loop(net, images, draws)
    packed = rse_fast.Ensemble(noisy, draws=draws).eval().predict(images).probs
    assert ((loop - packed).abs() < 5 * standard_error).all()
    assert ((loop - clean).abs() > 5 * standard_error).any()  # fine enough to see the noise


@pytest.mark.parametrize(
    ("accuracy", "images", "low", "high"),
    [(0.0, 10, 0.0, 0.27753), (1.0, 10, 0.72247, 1.0), (0.5, 10, 0.23659, 0.76341), (0.9, 200, 0.85059, 0.93433)],
)
def test_wilson_interval(accuracy, images, low, high):
    scipy_stats = pytest.importorskip("scipy.stats")
    found = wilson_interval(accuracy, images)
    expected = scipy_stats.binomtest(round(accuracy * images), images).proportion_ci(method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["--draws", "0"],
        ["--epochs", "-1"],
        ["--eps", "0"],
        ["--eps", "1.5"],
        ["--eps", "8/0"],
        ["--init-sigma", "-0.1"],
        ["--inner-sigma", "nan"],
        ["--steps", "x"],
        ["--repeats", "1"],
        ["--attack-images", "0"],
    ],
)
def test_bad_options_are_refused_by_name(options, capsys):
    with pytest.raises(SystemExit) as end:
        demo.main(options)
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {options[0]}: expected" in said and options[1] in said.partition("got ")[2]


def test_bad_data_and_output_are_one_clear_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for options, words in (
        (["--data", str(tmp_path / "nowhere")], "rse-fast demo: --data: expected a folder of images"),
        (["--data", str(tmp_path)], "class folders"),
        (["--resize", "8"], "--resize"),
        (["--out", str(tmp_path / "file")], "file"),
        (["--device", "nonsense"], "--device"),
    ):
        assert demo.main([*TINY, "--out", str(tmp_path / "out"), *options]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("rse-fast demo: ") and words in line
    assert not (tmp_path / "out" / "report.md").exists()


def test_missing_package_is_one_line_that_names_the_extra(tmp_path):
    # None in sys.modules is how Python is told that a package is not there.
    code = "import sys; sys.modules |= {'foolbox': None, 'sklearn': None}; from rse_fast.demo import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *TINY, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "foolbox" in line and "scikit-learn" in line and "pip install 'rse-fast[demo]'" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["training", "attacking"])
def test_interrupt_ends_with_what_is_known(tmp_path, moment):
    """Ctrl-C in a process of its own: exit status 130, whole files or none; a run that measured nothing leaves an older report alone."""
    (tmp_path / "report.md").write_text("an older report")
    (tmp_path / "examples.png").write_bytes(b"an older picture")
    # Slow enough that the signal falls into the wanted stage; the program prints a line as each stage begins.
    slow = {"training": ["--epochs", "1000"], "attacking": ["--steps", "100000"]}[moment]
    # A process started in the background may have inherited that SIGINT is ignored.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from rse_fast.demo import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *TINY, *slow, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith(moment):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"interrupted while {moment}" in out + err
    if moment == "training":
        assert sorted(os.listdir(tmp_path)) == ["examples.png", "report.md"]
        assert (tmp_path / "report.md").read_text() == "an older report"
    else:
        assert sorted(os.listdir(tmp_path)) == ["accuracy-draws.png", "report.md", "results.json"]  # the older picture would not belong
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["status"] == "interrupted while attacking"
        assert "speed" in results and not results.get("attack", {}).get("levels")
        assert "interrupted while attacking" in (tmp_path / "report.md").read_text()


@pytest.mark.data
@pytest.mark.slow
def test_cifar10_jpeg_quick_run(tmp_path, monkeypatch):
    folder = os.environ.get("RSE_FAST_CIFAR10")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RSE_FAST_CIFAR10 does not name a folder with CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg")
    monkeypatch.setenv("RSE_FAST_CACHE", str(tmp_path / "cache"))
    assert demo.main(["--data", folder, "--quick", "--bf16", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["accuracy"]["plain"]["mean"] > 0.3  # one epoch; guessing is 0.1
