"""From rows to the report: figures against counting by hand, each check seen to fail, failed checks first, files that are there."""

import base64
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from rse_fast.evaluate import PROTOCOLS, Case, report
from rse_fast.evaluate.estimate import mcnemar, paired_difference, wilson_interval
from rse_fast.evaluate.summary import summarise
from rse_fast.render import NETWORKS, markdown_table

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

IMAGES, REPEATS = 200, 3


def made(case: Case, accuracy: float, **columns) -> dict:
    """Rows of a case with about this accuracy, the label of every image 1; an image is easy for all cases or for none."""
    order = np.random.default_rng(7).permutation(IMAGES)
    rows = {}
    for index in range(IMAGES):
        right = order[index] < accuracy * IMAGES
        answers = [1 if right else 2 for _ in range(REPEATS)]
        rows[case.name, index] = {
            "case": case.name, "index": index, "target": 1, "answers": answers, "l2": 0.5 + index / IMAGES, "linf": 0.1,
            "verdict": not right, "queries": 20.0, "seconds": 0.25, "seeds": [1, 2, 3],
        } | columns  # fmt: skip
    return rows


def summary(**accuracy):
    """Of protocol sanity, with everything as it should be, but for the named cases."""
    cases = PROTOCOLS["sanity"].cases([0.1, 0.2], 0.5, 10, True)
    defaults = {"clean": 0.9, "noise": 0.88, "fgsm": 0.5, "pgd20-Linf-0.2-eot20": 0.3, "pgd20-Linf-0.2-eot10": 0.3, "pgd40": 0.0}
    defaults |= {"square": 0.6}
    rows = {}
    for case in cases:
        name = next((n for n in accuracy if case.name.startswith(n.replace("__", "-"))), None)
        if name is None and case.source != "deployed":
            value = 0.7
        else:
            value = accuracy[name] if name else next((v for n, v in defaults.items() if case.name.startswith(n)), 0.1)
        rows |= made(case, value)
    return summarise(cases, rows, IMAGES)


def failed(results):
    return [check["name"] for check in results["checks"] if not check["passed"]]


def test_all_checks_pass_where_all_is_well():
    results = summary()
    assert failed(results) == []
    assert {check["name"] for check in results["checks"]} == {
        "large eps", "iterated against one step", "attack against random noise", "white box against black box",
        "white box against transfer from plain", "white box against transfer from noise-off",
        "white box against transfer from fixed-draw", "ablation: fixed seed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("case", "accuracy", "name"),
    [
        ("pgd40", 0.02, "large eps"),
        ("fgsm", 0.1, "iterated against one step"),
        ("noise", 0.1, "attack against random noise"),
        ("square", 0.1, "white box against black box"),
        ("pgd20-Linf-0.2-eot20-plain", 0.1, "white box against transfer from plain"),
        ("pgd20-Linf-0.2-eot20-noise-off", 0.1, "white box against transfer from noise-off"),
        ("pgd20-Linf-0.2-eot20-fixed-draw", 0.1, "white box against transfer from fixed-draw"),
        ("pgd20-Linf-0.2-eot10-fixed-seed", 0.6, "ablation: fixed seed"),
    ],
)
def test_each_check_can_fail(case, accuracy, name):
    results = summary(**{case: accuracy})
    assert failed(results) == [name]
    assert results["checks"][0]["name"] == name  # the failed first
    assert f"{100 * accuracy:.1f} %" in results["checks"][0]["text"]


@pytest.mark.parametrize(
    ("case", "accuracy", "name"),
    [
        ("apgd-ce-Linf", 0.1, "PGD against apgd-ce"),
        ("autoattack-Linf", 0.1, "PGD against autoattack"),
        ("autoattack-L2", 0.05, "smallest distance against autoattack, L2 0.5"),
        ("pgd40-Linf-0.2-eot5", 0.6, "iterated against one step"),  # although others are strong
    ],
)
def test_each_check_of_several_attacks_can_fail(case, accuracy, name):
    cases = [
        Case("fgsm", "fgsm", eps=0.2, eot=5), Case("pgd20-Linf-0.2-eot5", "pgd", eps=0.2, steps=20, eot=5),
        Case("pgd40-Linf-0.2-eot5", "pgd", eps=0.2, steps=40, eot=5), Case("apgd-ce-Linf", "apgd-ce", eps=0.2, steps=100, eot=20),
        Case("autoattack-Linf", "autoattack", eps=0.2, steps=100, eot=20), Case("cw", "cw", "L2", steps=200, eot=10),
        Case("autoattack-L2", "autoattack", "L2", 0.5, 100, 20),
    ]  # fmt: skip

    def checked(**accuracies):
        rows = {}
        for each in cases:
            value = accuracies.get(each.name, {"fgsm": 0.5, "cw": 0.2}.get(each.name, 0.4))
            rows |= made(each, value, **({"l2": 0.4} if each.method == "cw" else {}))
        return failed(summarise(cases, rows, IMAGES))

    assert checked() == []
    found = checked(**{case: accuracy})
    assert name in found and all(other.startswith("PGD against") for other in found if other != name)


def test_cases_of_fewer_images_are_left_out_by_name():
    whole, part = Case("a", "fgsm", eps=0.1), Case("b", "pgd", eps=0.1)
    rows = made(whole, 0.5) | {key: row for key, row in made(part, 0.0).items() if key[1] < IMAGES - 1}
    results = summarise([whole, part], rows, IMAGES)
    assert results["cases"].keys() == {"a"} and results["incomplete"].keys() == {"b"}
    assert results["incomplete"]["b"]["images"] == results["incomplete"]["b"]["accuracy"]["images"] == IMAGES - 1


def test_plateau_over_eot():
    cases = [Case(f"p{eot}", "pgd", eps=0.1, steps=20, eot=eot) for eot in (1, 5, 20)]
    for last, plateau in ((0.4, True), (0.3, False), (0.45, True)):
        rows = {}
        for case, accuracy in zip(cases, (0.6, 0.4, last), strict=True):
            rows |= made(case, accuracy)
        results = summarise(cases, rows, IMAGES)
        (found,) = results["eot"]
        assert found["plateau"] == plateau == (failed(results) == [])
        assert [point["eot"] for point in found["points"]] == [1, 5, 20]
        assert found["gain"] == pytest.approx(0.4 - last)


def test_plateau_over_steps_is_that_of_the_most_draws():
    cases = [Case(f"p{steps}-{eot}", "pgd", eps=0.1, steps=steps, eot=eot) for steps in (20, 100, 400) for eot in (1, 20)]
    for last, plateau in ((0.4, True), (0.3, False)):
        rows = {}
        for case in cases:
            rows |= made(case, 0.9 - case.steps / 1000 if case.eot == 1 else {20: 0.5, 100: 0.4, 400: last}[case.steps])
        results = summarise(cases, rows, IMAGES)
        (found,) = results["steps"]
        assert found["eot"] == 20 and found["plateau"] == plateau and [point["steps"] for point in found["points"]] == [20, 100, 400]
        assert ("plateau over steps" in failed(results)) == (not plateau)


def test_mcnemar_is_what_counting_gives(rng):
    """Against the sum over all splits that are as likely or less."""
    for size in (1, 12, 60):
        first, second = (rng.random((2, size)) < [[0.7], [0.4]]).tolist()
        found = mcnemar(first, second)
        pairs = list(zip(first, second, strict=True))
        only = [pairs.count((True, False)), pairs.count((False, True))]
        likely = [math.comb(sum(only), k) for k in range(sum(only) + 1)]
        expected = sum(v for v in likely if v <= likely[only[0]]) / 2 ** sum(only)
        assert [found["first"], found["second"]] == only and found["p"] == pytest.approx(expected)
    same = rng.random(9) < 0.5
    assert mcnemar(same, same) == {"first": 0, "second": 0, "p": 1.0}


def test_gradients_that_lead_nowhere_are_a_failed_check_said_first():
    case, clean = Case("pgd20-Linf-0.1", "pgd", "Linf", 0.1, 20), Case("clean", "clean")
    for nan, right, zero, passes in (
        (0.0, 1.0, 0.05, True), (0.01, 1.0, 0.0, False), (0.0, 1.0, 0.2, False), (0.0, 0.06, 0.05, False), (0.0, 0.0, 0.0, True)
    ):  # fmt: skip
        rows = made(clean, 0.9, gradients=None) | made(case, 0.9, gradients={"nan": nan, "right": right, "zero": zero})
        rows |= made(replace(case, name="fgsm", method="fgsm", steps=1), 0.1)  # a check of its own fails, too
        results = summarise([clean, case, replace(case, name="fgsm", method="fgsm", steps=1)], rows, IMAGES)
        assert ("gradients" in failed(results)) == (not passes)
        assert passes or (results["checks"][0]["name"] == "gradients" and "exactly zero" in results["checks"][0]["text"])
    assert not {"gradients", "verdict"} & results["cases"]["clean"].keys()
    assert results["cases"][case.name]["gradients"] == {"nan": 0.0, "zero": 0.0}


def test_figures_are_what_counting_gives(rng):
    case = Case("a", "cw", "L2")
    label = rng.integers(0, 3, 50).tolist()
    answers = rng.integers(0, 3, (50, 4)).tolist()
    l2 = rng.random(50).tolist()
    rows = {
        ("a", i): {"case": "a", "index": i, "target": label[i], "answers": answers[i], "l2": l2[i], "linf": l2[i] / 2,
                   "verdict": i % 5 == 0, "queries": 3.0, "seconds": 2.0, "seeds": [0] * 4,
                   "by_draws": {"1": answers[i][0], "10": answers[i][1]}}
        for i in range(50)
    }  # fmt: skip
    results = summarise([case], rows, 50)
    entry, right = results["cases"]["a"], np.array(answers) == np.array(label)[:, None]
    assert entry["accuracy"]["repeats"] == pytest.approx(right.mean(0).tolist())
    assert entry["accuracy"]["mean"] == pytest.approx(right.mean()) and entry["accuracy"]["sd"] == pytest.approx(right.mean(0).std(ddof=1))
    assert (entry["accuracy"]["low"], entry["accuracy"]["high"]) == pytest.approx(wilson_interval(right.mean(), 50))
    assert entry["worst"]["mean"] == pytest.approx(right.all(1).mean()) and entry["verdict"] == pytest.approx(0.8)
    won = np.where(right.mean(1) < 0.5, l2, np.inf)
    assert entry["won"] == pytest.approx(np.isfinite(won).mean())
    assert (entry["median_l2"] or np.inf) == np.sort(won)[24]  # the lower of the two in the middle
    assert [point["draws"] for point in results["draws"]["a"]] == [1, 10]
    assert [point["mean"] for point in results["draws"]["a"]] == pytest.approx(right.mean(0)[:2].tolist())


def test_replication_finds_the_l2_at_30_percent():
    cases, rows = PROTOCOLS["paper"].cases([0.1], 0.5, 10, False), {}
    assert [case.c for case in cases[1:]] == [0.01, 0.03, 0.06, 0.1, 0.2, 0.4, 1.0] and {case.steps for case in cases[1:]} == {300}
    for i, (case, accuracy) in enumerate(zip(cases, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.1), strict=True)):
        rows |= made(case, accuracy, l2=i / 10)
    results = summarise(cases, rows, IMAGES)
    assert results["replication"]["l2_at_30"] == pytest.approx(0.55)
    assert [column["c"] for column in results["replication"]["columns"]] == [case.c for case in cases[1:]]


def test_paired_difference_covers(rng):
    """Of many samples of pairs with a known mean difference, 95 % intervals miss it about one time in twenty."""
    misses = 0
    for _ in range(400):
        common, a, b = rng.random((3, 150))
        first, second = (common < 0.3) | (a < 0.2), (common < 0.3) | (b < 0.2)  # equal on average
        mean, margin = paired_difference(first.astype(float), second.astype(float))
        misses += abs(mean) > margin
    assert misses <= 20 + 4 * np.sqrt(400 * 0.05 * 0.95)
    assert paired_difference([1.0, 1.0], [1.0, 1.0]) == (0.0, 0.5)


# --------------------------------------------------------------------------------------------------------------------- the report
@pytest.fixture
def results(rng):
    cases = PROTOCOLS["adaptive"].cases([0.1, 8 / 255], 0.5, 10, True) + [Case("cw-c0.1-eot10", "cw-c", "L2", None, 300, 10, c=0.1)]
    rows = {}
    for case in cases:
        rows |= made(case, float(rng.random()))
    for (name, index), row in rows.items():
        if index < 6:
            row["example"] = base64.b64encode(bytes(rng.integers(0, 256, 3 * 5 * 4, dtype=np.uint8))).decode()
        if name in ("clean", "pgd20-Linf-0.03137-eot20"):
            row["by_draws"] = {"1": 1, "10": 2}
    settings = {"protocol": "adaptive", "model": "m", "weights": "0" * 64, "plain": "p", "data": "d", "part": "test", "order": "first",
                "labels": "2" * 64,
                "images": IMAGES, "draws": 10, "sigmas": [0.1, 0.2], "seed": 3}  # fmt: skip
    machine = {"device": "cpu", "processor": "x", "system": "y", "threads": 1, "processes": 1}
    return {"settings": settings, "classes": ["cat", "dog", "cow"], "shape": [3, 5, 4], "command": "rse-fast evaluate", "machine": machine,
            "versions": {"torch": "1"}, "seconds": 1.0, "attack_seconds": 9.0} | summarise(cases, rows, IMAGES), rows  # fmt: skip


def test_report_pictures_and_json(results, tmp_path):
    results, rows = results
    images = torch.randint(0, 256, (IMAGES, 3, 5, 4), dtype=torch.uint8)
    report.write(tmp_path, results, images, list(rows.values()))
    text = (tmp_path / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert sorted(pictures) == [
        "accuracy-c.png",
        "accuracy-draws.png",
        "accuracy-eps.png",
        "cost.png",
        "eot.png",
        "examples.png",
        "steps.png",
    ]
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert min(picture.size) > 300 and len(np.unique(np.asarray(picture.convert("L")))) > 50  # drawn on
    for table in (block for block in text.split("\n\n") if block.startswith("|")):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for name, entry in results["cases"].items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} | ") and "EOT" not in line and line.count("|") == 10]
        accuracy, worst = entry["accuracy"], entry["worst"]
        assert f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f} ({100 * accuracy['low']:.1f}–" in line
        assert f"| {100 * worst['mean']:.1f} (" in line
    assert "worst of 3 queries" in text and "## Replication" in text
    everything = json.loads((tmp_path / "results.json").read_text())
    assert everything["cases"].keys() == results["cases"].keys()


def hues(path):
    """The hues, 0 to 255 around the circle, of the coloured pixels of a picture."""
    hue, saturation, _ = np.moveaxis(np.asarray(Image.open(path).convert("RGB").convert("HSV")).astype(int), -1, 0)
    return hue[saturation > 60]


@pytest.mark.parametrize("defence", [None, "adversarial", "brelu"])
def test_every_picture_has_the_colour_of_its_network_alone(results, defence, tmp_path):
    results, rows = results
    report.write(tmp_path, results | {"defence": defence}, torch.zeros(IMAGES, 3, 5, 4, dtype=torch.uint8), list(rows.values()))
    Image.new("RGB", (1, 1), NETWORKS[defence or "rse"]).save(tmp_path / "expected.png")
    (expected,) = hues(tmp_path / "expected.png")
    for name in ("accuracy-c.png", "accuracy-draws.png", "accuracy-eps.png", "cost.png", "eot.png", "steps.png"):
        found = hues(tmp_path / name)
        assert len(found) > 100 and (abs((found - expected + 128) % 256 - 128) < 8).all(), name


def test_columns_of_figures_are_set_to_the_right():
    table = markdown_table([("a", "b", "c"), ("x", "1 ± 2", "c = 1"), ("1", "–", "2")])
    assert table.splitlines()[1] == "|---|---:|---|" and markdown_table([("a", "b")]).splitlines()[1:] == ["|---:|---:|"]


def test_failed_checks_are_the_first_thing_said(results):
    results, _ = results
    bad = [c for c in results["checks"] if not c["passed"]]
    assert bad  # accuracies at random: large eps leaves something
    text = report.markdown(results, [])
    assert text.split("\n\n")[1].startswith("**Checks that failed")
    assert text.split("\n\n")[2] == "\n".join(f"- {c['name']}: {c['text']}." for c in bad)
    assert report.headline(results).splitlines()[: len(bad)] == [f"FAILED CHECK: {c['text']}" for c in bad]
    good = report.markdown(results | {"checks": [c for c in results["checks"] if c["passed"]]}, [])
    assert "failed" not in good.partition("## Accuracy")[0]


def test_the_headline_names_the_strongest_of_the_attacks_at_the_main_radius():
    results = summary(noise=0.05)
    line = report.headline(results).splitlines()[-1]  # fgsm, PGD, Square and three transfers; random noise is a control
    assert line.startswith("Linf 0.2, strongest of 6 attacks (pgd20-Linf-0.2-eot20): 30.0 ± 0.0")
    cases = PROTOCOLS["quick"].cases([0.1, 0.2], 0.5, 10, True)
    rows = {}
    for case in cases:
        rows |= made(case, 0.1 if case.eps == 0.1 else 0.4)  # attacks at the other radius do not count
    assert "Linf 0.2, strongest of 4 attacks (fgsm-Linf-0.2-eot20): 40.0 " in report.headline(summarise(cases, rows, IMAGES))


def test_certificates_become_a_section(results, tmp_path):
    results, rows = results
    folder, out = tmp_path / "certified", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    report.write(out, results, torch.zeros(IMAGES, 3, 5, 4, dtype=torch.uint8), list(rows.values()), folder)  # empty: nothing to add
    assert "Certified" not in (out / "report.md").read_text()
    certified = {name: results["settings"][name] for name in ("weights", "labels", "part")}
    (folder / "certify.json").write_text(json.dumps(certified))
    (folder / "summary.md").write_text("# Certified accuracy (L2)\n\n![c](certified.png)\n\n## What a certificate covers\n\nthis\n")
    (folder / "certified.png").write_bytes(b"picture")
    (folder / "certified.tsv").write_text("index\n")
    report.write(out, results, torch.zeros(IMAGES, 3, 5, 4, dtype=torch.uint8), list(rows.values()), folder)
    text = (out / "report.md").read_text()
    assert "\n## Certified accuracy (L2)\n" in text and "\n### What a certificate covers\n" in text
    assert (out / "certified.png").read_bytes() == b"picture" and (out / "certified.tsv").read_text() == "index\n"
    (folder / "certify.json").write_text(json.dumps(certified | {"weights": "1" * 64}))
    report.write(out, results, torch.zeros(IMAGES, 3, 5, 4, dtype=torch.uint8), list(rows.values()), folder)
    text = (out / "report.md").read_text()
    assert "are of something else (other weights)" in text and "What a certificate covers" not in text
