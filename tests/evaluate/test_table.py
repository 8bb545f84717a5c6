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
from rse_fast.evaluate import PROTOCOLS, attacks, command, rows, table  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
DEFENCES = ("plain", "rse")


@pytest.fixture
def tiny(tmp_path, rng, monkeypatch):
    """Options for networks of a fifth of a second, with few images; attacks of the protocol's kinds with few steps."""
    write_images(tmp_path / "images.npz", rng)
    config(tmp_path / "images.npz", epochs=2).save(tmp_path / "config.json")
    for name, method in attacks.METHODS.items():
        monkeypatch.setitem(attacks.METHODS, name, lambda case, *args, method=method: method(dataclasses.replace(case, steps=2), *args))
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
    assert half["plain"]["cells"].keys() == set(table.STAGES[0]) and half["rse"]["trained"] and not half["rse"]["cells"]
    text = (out / "table.md").read_text()
    assert (
        set(half["rse"]["absent"].values()) == {"not done yet"}
        and "\n- rse: not done yet.\n" in text
        and "**This table is not complete.**" in text
    )
    kept = contents(out)
    assert table.main([*tiny, "--report"]) == 1 and contents(out) == kept  # the table of what is there
    assert read(out)["rows"]["plain"]["cells"] == half["plain"]["cells"]

    assert table.main(tiny) == 1  # plain has no certificate
    after = contents(out)
    assert all(content == after[path][: len(content)] for path, content in kept.items()) and len(after) == len(kept) + 2
    found = read(out)["rows"]
    assert not found["rse"]["absent"] and found["plain"]["cells"].items() >= half["plain"]["cells"].items()
    assert "deterministic" in found["plain"]["absent"][table.CERTIFIED]
    text = (out / "table.md").read_text()
    assert f"\n- plain ({table.CERTIFIED}): a deterministic" in text and "not complete" not in text and "not yet" not in text

    # Figures are those of the parts, each with an interval and the command that made it.
    results = json.loads((out / "rse/evaluation/results.json").read_text())
    summary = json.loads((out / "rse/certified/summary.json").read_text())
    for defence, row in found.items():
        assert row["config"]["defence"] == defence and row["config"]["temperature"] == 1 and row["settings"]["images"] == 4
        for column, cell in row["cells"].items():
            assert (
                cell["images"] == 4
                and cell["accuracy"]["low"] <= cell["accuracy"]["mean"] <= cell["accuracy"]["high"]
                and cell["accuracy"]["images"] == 4
            )
            ours = shlex.split(cell["command"])
            assert ours[:2] == ["rse-fast", "certify" if column == table.CERTIFIED else "evaluate"]
            assert column == table.CERTIFIED or ours[-1] == cell["name"]
    main = "Linf-0.03137"
    names = {"clean": "clean", "PGD-40 8/255": f"pgd40-{main}-eot50", "AutoAttack 8/255": f"autoattack-{main}-eot20"}
    names |= {f"c = {c}": f"cw-c{c}-eot2" for c in ("0.01", "0.03", "0.06", "0.1", "0.2")} | {"Square 8/255": f"square-{main}-5000"}
    names |= {"transfer": f"pgd20-{main}-eot20-plain", "noise off": f"pgd20-{main}-eot20-noise-off", "C&W median L2": "cw-eot2"}
    names |= {
        "fixed draw": f"pgd20-{main}-eot20-fixed-draw",
        "AutoAttack L2 0.5": "autoattack-L2-0.5-eot20",
        "PGD-40 L2 0.5": "pgd40-L2-0.5-eot20",
    }
    names |= {f"PGD-20 {eps}/255": f"pgd20-Linf-{eps / 255:.4g}-eot20" for eps in (2, 4, 8)}
    cells = found["rse"]["cells"]
    alone = {"APGD-CE 8/255": "apgd-ce", "APGD-DLR 8/255": "apgd-dlr"}
    assert {column: cell["name"] for column, cell in cells.items() if column not in (table.CERTIFIED, *alone)} == names
    assert all(cells[column]["accuracy"] == results["cases"][name]["accuracy"] for column, name in names.items())
    parts = results["cases"][names["AutoAttack 8/255"]]["parts"]
    assert all(cells[column]["accuracy"] == parts[part] for column, part in alone.items())
    assert cells[table.CERTIFIED]["accuracy"]["mean"] == summary["certified"][0]["accuracy"]

    for title, columns in table.SECTIONS.items():
        section = text.partition(f"\n## {title}\n\n")[2].partition("\n\n")[0]
        lines = {line.split(" | ")[0].strip("| "): line for line in section.splitlines() if line.startswith("| ")}
        assert list(lines) == (
            ["accuracy %", "plain", "*plain, paper*", "rse", "*rse, paper*"] if "clean" in columns else ["accuracy %", "plain", "rse"]
        )
        assert len({line.count("|") for line in lines.values()}) == 1
        assert len(re.findall(r"\(\d+\.\d–\d+\.\d\)", lines["rse"])) == len(columns) - ("C&W median L2" in columns)
    assert "–" in lines["plain"].split("|")[-2] and re.search(r"\| plain \| 2 \| \d+\.\d \| \d+\.\d \|", text)  # training's cost

    # Who is better, on the same images: what the rows say.
    scored = {name: rows.read(out / name / "evaluation") for name in DEFENCES}
    tests = {test["column"]: test for test in read(out)["compared"]}
    assert {test["first"] for test in tests.values()} == {"plain"} and {test["second"] for test in tests.values()} == {"rse"}
    for column, (mine, other) in {"clean": ("clean", "clean"), "PGD-40 8/255": (f"pgd40-{main}", f"pgd40-{main}-eot50")}.items():
        right = [
            [scored[n][case, i]["answers"][0] == scored[n][case, i]["target"] for i in range(4)]
            for n, case in (("plain", mine), ("rse", other))
        ]
        counts = [list(zip(*right, strict=True)).count(pair) for pair in ((True, False), (False, True))]
        assert [tests[column]["only_first"], tests[column]["only_second"]] == counts and tests[column]["images"] == 4

    # The same runs, read from elsewhere, give the same weights; a run that has not ended is a row with a reason.
    capsys.readouterr()
    whole, torn = out / "rse/run", tmp_path / "torn"
    train.Config.load(out / "plain/run/config.json").save(_made(torn) / "config.json")
    again = tmp_path / "again"
    fewer = ["--columns", "clean", "AutoAttack 8/255", table.CERTIFIED]
    assert table.main([*tiny, *fewer, "--out", str(again), "--reuse", str(whole), str(torn), f"twin={whole}"]) == 1
    reused = read(again)["rows"]
    assert list(reused) == ["plain", "rse", "twin"] and reused["twin"]["config"] == reused["rse"]["config"]
    assert all(reused[name]["cells"].keys() == {*fewer[1:], *table.PARTS} for name in ("rse", "twin"))
    assert reused["rse"]["settings"]["weights"] == found["rse"]["settings"]["weights"]
    assert set(reused["plain"]["absent"]) == set(table.COLUMNS) and "not complete" in reused["plain"]["absent"]["clean"]
    assert not (again / "rse/run").exists() and "plain: train: " in capsys.readouterr().err
    alone = ["--columns", table.CERTIFIED, "--defences", "--reuse", str(whole), "--out", str(tmp_path / "alone")]
    assert table.main([*tiny, *alone]) == 1 and read(tmp_path / "alone")["rows"]["rse"]["cells"].keys() == {table.CERTIFIED}
    assert table.main([*tiny, *fewer, "--images", "6", "--report", "--out", str(again), "--reuse", str(whole)]) == 1
    assert "4 of 6 images" in (again / "table.md").read_text() and read(again)["rows"]["rse"]["cells"]["clean"]["accuracy"]["images"] == 4
    assert "not complete" in (again / "table.md").read_text()


def test_a_network_is_put_beside_a_table_made_elsewhere(tiny, tmp_path, capsys):
    assert table.main([*tiny, "--columns", "clean"]) == 1
    first, there = read(tmp_path / "out"), tmp_path / "out/table.json"
    assert all(set(row["cells"]["clean"]["right"]) <= {"0", "1"} for row in first["rows"].values())

    def beside(file, out, run="rse", *options):
        reuse = ["--defences", "--reuse", f"rse={tmp_path / 'out' / run / 'run'}", "--beside", str(file), "--out", str(tmp_path / out)]
        return table.main([*tiny, *reuse, *options])

    # The rows were made elsewhere: their cells stand, and those measured here stand beside them.
    assert beside(there, "more", "rse", "--columns", "PGD-20 8/255") == 1
    second = read(tmp_path / "more")
    assert list(second["rows"]) == ["plain", "rse"] and second["rows"]["plain"] == first["rows"]["plain"]
    assert second["rows"]["rse"]["cells"].keys() == {"clean", "PGD-20 8/255"}
    assert second["rows"]["rse"]["cells"]["clean"] == first["rows"]["rse"]["cells"]["clean"]
    assert second["compared"] == first["compared"] and first["compared"]
    assert "clean" not in second["rows"]["rse"]["absent"] and "PGD-20 8/255" not in second["rows"]["rse"]["absent"]
    # A report of what is there, without a row of an attack in the folder, and tests whose images are not listed.
    for row in first["rows"].values():
        del row["cells"]["clean"]["right"]
        row["notes"] = ["a check: it failed"]
    (tmp_path / "old.json").write_text(json.dumps(first))
    assert beside(tmp_path / "old.json", "report", "rse", "--report") == 1
    third = read(tmp_path / "report")
    assert third["rows"]["rse"]["cells"] == first["rows"]["rse"]["cells"] and third["compared"] == first["compared"]
    assert third["rows"]["rse"]["notes"] == ["a check: it failed"]
    # Fewer images here do not replace more there.
    assert beside(there, "fewer", "rse", "--columns", "clean", "--images", "2") == 1
    assert read(tmp_path / "fewer")["rows"]["rse"]["cells"]["clean"]["images"] == 4

    # Other weights, or another number of draws, make another network of it.
    capsys.readouterr()
    assert beside(there, "other", "plain", "--report") == 1 and "--beside: expected a row 'rse' of weights" in capsys.readouterr().err
    assert not read(tmp_path / "other")["rows"]["rse"]["cells"]
    assert beside(there, "draws", "rse", "--columns", "PGD-20 8/255", "--draws", "3") == 1
    assert "got another draws" in capsys.readouterr().err and read(tmp_path / "draws")["rows"]["rse"]["cells"].keys() == {"PGD-20 8/255"}
    first["rows"]["plain"]["cells"] = {"clean": 0.5}
    for name, content in (("a", "nothing"), ("b", "[]"), ("c", json.dumps(first)), ("d", '{"rows": {"x": 1}, "compared": []}')):
        (tmp_path / name).write_text(content)
        assert beside(tmp_path / name, "bad") == 2 and "rse-fast table: --beside: " in capsys.readouterr().err
    assert beside(tmp_path / "nowhere", "bad") == 2 and not (tmp_path / "bad").exists()


CELL = {"accuracy": {"mean": 0.5, "sd": None, "low": 0.4, "high": 0.6, "images": 4}, "images": 4}
ROW = {"run": "a", "config": None, "trained": None, "cells": {"clean": CELL}, "absent": {}, "notes": []}
TEST = {"column": "clean", "first": "a", "second": "b", "images": 4, "only_first": 1, "only_second": 1, "p": 1.0}


@pytest.mark.parametrize(
    "changed",
    [
        {"notes": None}, {"absent": None}, {"cells": None}, {"config": 1}, {"settings": None}, {"settings": {}},
        {"trained": {"event": "end"}},
        {"cells": {"clean": CELL | {"accuracy": 0.5}}}, {"cells": {"clean": CELL | {"accuracy": {}}}},
        {"cells": {"clean": CELL | {"images": "4"}}}, {"cells": {"clean": CELL | {"right": [1]}}},
    ],
    ids=str,
)  # fmt: skip
def test_rows_of_another_form_are_refused_by_name(changed, tmp_path, capsys):
    def status(rows, compared):
        (tmp_path / "there.json").write_text(json.dumps({"rows": rows, "compared": compared}))
        return table.main(["--defences", "--beside", str(tmp_path / "there.json"), "--out", str(tmp_path / "out"), "--report"])

    assert status({"a": ROW}, [TEST]) == 0
    (key,) = changed
    for row in (ROW | changed, {k: v for k, v in ROW.items() if k != key} if key in ROW else None):
        assert status({"a": row}, []) == 2 and "--beside: row 'a' of " in capsys.readouterr().err
    for test in (1, TEST | {"p": "small"}, {k: v for k, v in TEST.items() if k != "images"}):
        assert status({"a": ROW}, [test]) == 2 and "--beside: a comparison in " in capsys.readouterr().err


def test_a_network_that_was_attacked_nowhere_is_put_beside_itself(tiny, tmp_path):
    assert table.main([*tiny, "--columns", table.CERTIFIED]) == 1
    there = read(tmp_path / "out")
    assert "settings" not in there["rows"]["rse"] and table.CERTIFIED in there["rows"]["rse"]["cells"]
    reuse = ["--defences", "--reuse", f"rse={tmp_path / 'out/rse/run'}", "--beside", str(tmp_path / "out/table.json")]
    assert table.main([*tiny, *reuse, "--out", str(tmp_path / "more"), "--report"]) == 1
    assert read(tmp_path / "more")["rows"]["rse"]["cells"] == there["rows"]["rse"]["cells"]


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


FIGURE = {"mean": 0.5, "sd": None, "low": 0.4, "high": 0.6, "images": 9}


def row(defence, labels, notes=(), images=9, cells=None, absent=None):
    """A row of table.json, as `table.markdown` takes it."""
    settings = {"labels": labels, "order": "first", "data": "cifar10 (JPEG)", "images": images, "weights": "0" * 64}
    settings |= {"seed": 1, "draws": 0}
    paper = {"clean": {"accuracy": FIGURE, "paper": 92.0, "images": 9}, "c = 0.01": {"accuracy": FIGURE, "paper": 50.0, "images": 9}}
    return {"config": dataclasses.asdict(train.Config(defence=defence)), "trained": {"test_accuracy": 0.5, "test_images": 9},
            "cells": paper if cells is None else cells, "absent": absent or {}, "notes": list(notes), "settings": settings}  # fmt: skip


def test_failed_checks_stand_first_and_rows_of_other_images_are_told():
    same = {"plain": row("plain", "x", ["large eps: 2 % are right"]), "adversarial": row("adversarial", "x")}
    whole = {"command": "c", "images": 9, "compared": [], "sections": {"A": ["clean", "c = 0.01"]}}
    text = table.markdown(whole | {"rows": same})
    first = text.split("\n\n")
    assert first[1].startswith("**Checks that failed") and first[2] == "- plain: large eps: 2 % are right."
    assert "JPEG, which is lossy" in text and "against PGD" in text and "clean -42.0 (outside the interval), c = 0.01 +0.0." in text
    for other in (row("rse", "y"), row("rse", "x", images=8)):
        assert "different images" not in text and "different images" in table.markdown(whole | {"rows": same | {"rse": other}})


def test_a_cell_of_fewer_draws_or_images_says_so():
    cell = {"accuracy": FIGURE, "images": 9, "eot": 5, "most_draws": 50}
    cells = {"PGD-40 8/255": cell, "clean": cell | {"eot": 50}, "C&W median L2": cell | {"eot": 50, "won": 0.3, "median_l2": None}}
    absent = {"Square 8/255": "not done yet", table.CERTIFIED: "a deterministic network has none"}
    columns = [*cells, *absent]

    def shown(images):
        found = {"command": "c", "images": images, "compared": [], "sections": {"A": columns}}
        text = table.markdown(found | {"rows": {"plain": row("plain", "x", cells=cells, absent=absent)}})
        (line,) = [line for line in text.splitlines() if line.startswith("| plain | 50.0")]
        return dict(zip(columns, [part.strip() for part in line.split("|")[2:-1]], strict=True))

    whole, partial = shown(9), shown(10)
    assert whole["PGD-40 8/255"] == "50.0 (40.0–60.0), EOT 5" and whole["C&W median L2"] == "more: 30 % won"
    assert whole["clean"] == "50.0 (40.0–60.0)" and partial["clean"] == "50.0 (40.0–60.0), 9 of 10 images"
    assert whole["Square 8/255"] == "not yet" and whole[table.CERTIFIED] == "–"


def test_bad_options_are_one_line(tmp_path, capsys):
    for name in ("a", "b"):
        train.Config(defence="plain").save(_made(tmp_path / name) / "config.json")
    for options, words in (
        (["--reuse", str(tmp_path / "nowhere")], "config"), (["--reuse", str(tmp_path / "a"), str(tmp_path / "b")], "both called plain"),
        (["--columns", "nothing"], "--columns"), (["--config", str(tmp_path / "nowhere")], "config"),
    ):  # fmt: skip
        assert table.main([*options, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("rse-fast table: ") and words in line
    assert not (tmp_path / "out").exists()


def test_the_columns_are_the_cases_of_the_protocol():
    """Each column is found among the cases, and each case is in one column, or there for a check alone; each column has its stage."""
    eps = list(table.EPS.values())
    for draws in (0, 10):
        cases = PROTOCOLS["table"].cases(eps, table.L2, draws, True)
        fits = {column: [case for case in cases if what.items() <= vars(case).items()] for column, what in table.ATTACKED.items()}
        checks = [case for case in cases if any(what.items() <= vars(case).items() for what in table.CHECKS)]
        assert {column for column, fit in fits.items() if not fit} == ({"noise off", "fixed draw"} if not draws else set())
        assert len(checks) == 3 and sum(map(len, fits.values())) + 3 == len(cases)
        assert not any(case in checks for fit in fits.values() for case in fit)
    assert sorted(column for stage in table.STAGES for column in stage) == sorted(table.ATTACKED)
    assert {*table.COLUMNS} == {*table.ATTACKED, *table.PARTS, table.CERTIFIED}
    assert certify_cli.RADII.count(table.RADIUS) == 1 and set(table.DEFENCES) == set(train.config.DEFENCES)


def test_tests_are_corrected_for_their_number(rng):
    """Holm's step-down: the k-th smallest p of m times m - k + 1, never falling."""
    right = {name: {column: "".join("01"[r] for r in (rng.random(40) < share).astype(int)) for column in ("clean", "c = 0.1")}
             for name, share in (("rse", 0.5), ("a", 0.9), ("b", 0.6), ("c", 0.5))}  # fmt: skip
    right["c"]["c = 0.1"] = "-" * 30 + right["c"]["c = 0.1"][30:]
    made = sorted(table.compare(right), key=lambda test: test["p"])
    assert len(made) == 6 and {test["images"] for test in made} == {40, 10}
    expected = [min(1.0, max(made[j]["p"] * (6 - j) for j in range(k + 1))) for k in range(6)]
    assert [test["holm"] for test in made] == pytest.approx(expected)
    assert table.compare({}) == []
