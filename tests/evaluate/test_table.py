"""The table of defences, end to end on a tiny network: trained, attacked, certified, continued after a stop, and what is absent."""

import dataclasses
import json
import re
import shlex

import pytest
from tiny_training import config, write_images

for package in ("foolbox", "pyautoattack", "matplotlib", "safetensors", "scipy", "tqdm"):
    pytest.importorskip(package)

from rse_fast import certify_cli, train  # noqa: E402
from rse_fast.evaluate import PROTOCOLS, command, protocols, table  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
DEFENCES = ("plain", "rse")


@pytest.fixture
def tiny(tmp_path, rng, monkeypatch):
    """Options for networks of a fifth of a second, with few images; attacks of the protocol's kinds with few steps."""
    write_images(tmp_path / "images.npz", rng)
    config(tmp_path / "images.npz", epochs=2).save(tmp_path / "config.json")
    cases = protocols._CASES[PROTOCOLS["table"]]
    short = lambda *args: (dataclasses.replace(case, steps=2) for case in cases(*args))  # noqa: E731
    monkeypatch.setitem(protocols._CASES, PROTOCOLS["table"], short)
    return ["--config", str(tmp_path / "config.json"), "--data", str(tmp_path / "images.npz"), "--defences", *DEFENCES, "--images", "4",
            "--draws", "2", "--n", "200", "--out", str(tmp_path / "out")]  # fmt: skip


def read(out):
    return json.loads((out / "table.json").read_text())


def contents(out):
    """What the stages left behind, times apart: weights, rows of attacks and of certificates."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.name.startswith("rows-"):
            found[path] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
        elif path.name == "certified.tsv":
            found[path] = [line.rpartition("\t")[0] for line in path.read_text().splitlines()]
        elif path.name == "best.safetensors":
            found[path] = path.read_bytes()
    return found


def test_a_table_is_made_continued_and_reused(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:  # stops as Ctrl-C does, when plain is whole and rse is trained
        attack = command.run
        patch.setattr(table.command, "run", lambda argv: attack(argv) if "plain" in argv[0] else (_ for _ in ()).throw(KeyboardInterrupt))
        assert table.main(tiny) == 130
    half = read(out)["rows"]
    assert half["plain"]["absent"].keys() == {table.CERTIFIED} and half["plain"]["cells"].keys() == set(table.ATTACKED)
    assert half["rse"]["trained"] and set(half["rse"]["absent"].values()) == {"not done yet"}
    assert "\n- rse: not done yet.\n" in (out / "table.md").read_text()
    kept = contents(out)

    assert table.main(tiny) == 1  # plain has no certificate
    after = contents(out)
    assert {path: after[path] for path in kept} == kept and len(after) == len(kept) + 2
    found = read(out)["rows"]
    assert not found["rse"]["absent"] and found["plain"]["cells"] == half["plain"]["cells"]
    assert "deterministic" in found["plain"]["absent"][table.CERTIFIED]
    assert f"\n- plain ({table.CERTIFIED}): a deterministic" in (out / "table.md").read_text()

    # Figures are those of the parts, each with an interval and the command that made it.
    results = json.loads((out / "rse/evaluation/results.json").read_text())
    summary = json.loads((out / "rse/certified/summary.json").read_text())
    for defence, row in found.items():
        assert row["config"]["defence"] == defence and row["config"]["temperature"] == 1 and row["settings"]["images"] == 4
        for column, cell in row["cells"].items():
            assert cell["accuracy"]["low"] <= cell["accuracy"]["mean"] <= cell["accuracy"]["high"] and cell["accuracy"]["images"] == 4
            ours = shlex.split(cell["command"])
            assert ours[:2] == ["rse-fast", "certify" if column == table.CERTIFIED else "evaluate"]
            assert column == table.CERTIFIED or ours[-1] == cell["name"]
    names = {"clean": "clean", "PGD 8/255": "pgd40-Linf-0.03137-eot50", "AutoAttack 8/255": "autoattack-Linf-0.03137-eot20"}
    names |= {f"c = {c}": f"cw-c{c}-eot2" for c in ("0.01", "0.03", "0.06", "0.1", "0.2")}
    cells = found["rse"]["cells"]
    assert {column: cell["name"] for column, cell in cells.items() if column != table.CERTIFIED} == names
    assert all(cells[column]["accuracy"] == results["cases"][name]["accuracy"] for column, name in names.items())
    assert cells[table.CERTIFIED]["accuracy"]["mean"] == summary["certified"][0]["accuracy"]

    text = (out / "table.md").read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert list(lines) == ["accuracy %", "plain", "*plain, paper*", "rse", "*rse, paper*"]
    assert len({line.count("|") for line in lines.values()}) == 1
    assert len(re.findall(r"\(\d+\.\d–\d+\.\d\)", lines["rse"])) == len(table.COLUMNS) and "–" in lines["plain"].split("|")[-2]

    # The same runs, read from elsewhere, give the same weights; a run that has not ended is a row with a reason.
    capsys.readouterr()
    whole, torn = out / "rse/run", tmp_path / "torn"
    train.Config.load(out / "plain/run/config.json").save(_made(torn) / "config.json")
    again = tmp_path / "again"
    assert table.main([*tiny, "--out", str(again), "--reuse", str(whole), str(torn)]) == 1
    reused = read(again)["rows"]
    assert reused["rse"]["settings"]["weights"] == found["rse"]["settings"]["weights"] and not reused["rse"]["absent"]
    assert set(reused["plain"]["absent"]) == set(table.COLUMNS) and "not complete" in reused["plain"]["absent"]["clean"]
    assert not (again / "rse/run").exists() and "plain: train: " in capsys.readouterr().err
    assert "not complete" in (again / "table.md").read_text()


def _made(folder):
    folder.mkdir(parents=True)
    return folder


def test_another_configuration_and_diverged_runs_are_rows_with_a_reason(tiny, tmp_path):
    out = tmp_path / "out"
    config(tmp_path / "images.npz", epochs=1, defence="plain").save(_made(out / "plain/run") / "config.json")
    config(tmp_path / "images.npz", epochs=1, lr=1e30).save(tmp_path / "config.json")
    assert table.main(tiny) == 1
    rows = read(out)["rows"]
    assert "another configuration" in rows["plain"]["absent"]["clean"] and "training diverged" in rows["rse"]["absent"]["clean"]
    # A run of other data, whole though it is, is not taken for one of these.
    wanted = dataclasses.replace(train.Config.load(tmp_path / "config.json"), defence="plain", device="cpu")
    dataclasses.replace(wanted, data="elsewhere.npz").save(out / "plain/run/config.json")
    (out / "plain/run/log.jsonl").write_text('{"event": "end"}\n')
    assert table.main(tiny) == 1
    assert "another configuration" in read(out)["rows"]["plain"]["absent"]["clean"]


def test_failed_checks_stand_first_and_rows_of_other_images_are_told():
    def row(defence, labels, notes=(), images=9):
        figure = {"mean": 0.5, "sd": None, "low": 0.4, "high": 0.6, "images": 9}
        settings = {"labels": labels, "order": "first", "data": "cifar10 (JPEG)", "images": images, "weights": "0" * 64}
        settings |= {"seed": 1, "draws": 0}
        return {"config": dataclasses.asdict(train.Config(defence=defence)), "trained": {"test_accuracy": 0.5, "test_images": 9},
                "cells": {"clean": {"accuracy": figure, "paper": 92.0}, "c = 0.01": {"accuracy": figure, "paper": 50.0}},
                "absent": {}, "notes": list(notes), "settings": settings}  # fmt: skip

    same = {"plain": row("plain", "x", ["large eps: 2 % are right"]), "adversarial": row("adversarial", "x")}
    text = table.markdown({"command": "c", "rows": same})
    first = text.split("\n\n")
    assert first[1].startswith("**Checks that failed") and first[2] == "- plain: large eps: 2 % are right."
    assert "JPEG, which is lossy" in text and "against PGD" in text and "clean -42.0 (outside the interval), c = 0.01 +0.0." in text
    for other in (row("rse", "y"), row("rse", "x", images=8)):
        assert "different images" not in text and "different images" in table.markdown({"command": "c", "rows": same | {"rse": other}})


def test_bad_options_are_one_line(tmp_path, capsys):
    for name in ("a", "b"):
        train.Config(defence="plain").save(_made(tmp_path / name) / "config.json")
    for options, words in (
        (["--reuse", str(tmp_path / "nowhere")], "config"), (["--reuse", str(tmp_path / "a"), str(tmp_path / "b")], "both of the defence"),
        (["--reuse", str(tmp_path / "a"), "--defences", "rse"], "not among"), (["--config", str(tmp_path / "nowhere")], "config"),
    ):  # fmt: skip
        assert table.main([*options, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("rse-fast table: ") and words in line
    assert not (tmp_path / "out").exists()


def test_the_columns_are_the_cases_of_the_protocol():
    """Each column is found among the cases for noisy and for plain networks, and each case is in one column, or there for a check alone."""
    for draws in (0, 10):
        cases = PROTOCOLS["table"].cases([8 / 255], 0.5, draws, False)
        fits = [[case for case in cases if what.items() <= vars(case).items()] for what in table.ATTACKED.values()]
        checks = [case for case in cases if case.method in ("noise", "fgsm") or case.eps == 1]
        assert all(fits) and len(checks) == 3 and sum(map(len, fits)) + 3 == len(cases)
        assert not any(case in checks for fit in fits for case in fit)
    assert certify_cli.RADII.count(table.RADIUS) == 1 and set(table.DEFENCES) == set(train.config.DEFENCES)
