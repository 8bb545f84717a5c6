"""The benchmarks' frame: what is refused, how results are merged, compared and written down, and that every target is judged."""

import copy
import ctypes
import json
import subprocess

import numpy as np
import pytest
import torch

import rse_fast
from bench import ensemble, measure, networks, noise, peers, report, results, scaling, targets
from bench.__main__ import main, measure_cases
from rse_fast import reference

CPU = torch.device("cpu")
HERE = {"device": "cpu", "driver": "", "cpu": "a processor", "versions": "torch 0", "commit": "0" * 40, "date": "2026-01-01T00:00:00"}


def found(*rows):
    return results.merge({"rows": [], "targets": []}, list(rows), [], HERE)


def row(case="c", implementation="rse_fast", p50=10.0, unit="images/s", suite="s"):
    return measure.Row(suite, case, implementation, "m", unit, 0.9 * p50, p50, 1.1 * p50)


# ---------------------------------------------------------------------------------------------------------------- what is timed
def test_an_implementation_that_fails_or_is_refused_is_listed_and_not_timed():
    calls = {"good": 0, "wrong": 0}

    def counted(name, value):
        def run():
            calls[name] += 1
            return value

        return lambda: run

    def broken():
        raise ImportError("no module named peer\nand more")

    def check(name, result, again):
        if result != 1:
            raise measure.Refused(f"{name} gave {result}")

    builders = {"good": counted("good", 1), "wrong": counted("wrong", 2), "absent": broken}
    rows, medians = measure.compare("s", "c", "m", "u", 1, builders, check, rounds=3, least=3)
    assert [(r.implementation, r.error) for r in rows] == [
        ("good", ""),
        ("wrong", "Refused: wrong gave 2"),
        ("absent", "ImportError: no module named peer"),
    ]
    assert calls == {"good": 5, "wrong": 2}  # two calls to be checked, three rounds
    assert rows[0].p20 <= rows[0].p50 <= rows[0].p80 and medians["good"] == rows[0].p50
    assert rows[1].p50 is None and medians["wrong"] is None and medians["absent"] is None


def test_noise_of_another_size_or_type_is_refused(rng):
    x = torch.randn(64, 64, 16, 16)
    noise.check_moments(x, peers.eager_noise(x, noise.SIGMA))
    for y in (x, peers.eager_noise(x, 1.05 * noise.SIGMA), peers.eager_noise(x, noise.SIGMA) + 0.001, x.double()):
        with pytest.raises(measure.Refused):
            noise.check_moments(x, y)


def test_inputs_go_round_and_results_still_match_theirs():
    with measure.choice(only="rse_fast"):
        rows, _ = noise.measure(torch.float32, torch.contiguous_format, "4M")
    assert [r.error for r in rows if r.implementation == "rse_fast"] == [""] and rows[0].p50 > 0


def test_the_time_of_an_ensemble_is_told_by_what_takes_it():
    noisy = rse_fast.convert(networks.plain("SmallNet", CPU), *networks.SIGMAS)
    direct = rse_fast.Ensemble(noisy, 10, algorithm="direct")  # in Winograd's algorithm noise and product are one kernel
    products, noise, rest = ensemble.time_shares(direct, networks.images(4, 32, CPU)).values()
    assert products + noise + rest == pytest.approx(1) and products > noise > 0.01 and 0 < rest < 0.5


def test_an_ensemble_of_other_noise_is_refused(rng):
    plain, x = networks.plain("SmallNet", CPU), networks.images(4, 16, CPU)
    known = ensemble.Reference(plain, x, 16)
    right, calm = (lambda: peers.packed(peers.eager_rse(plain, *networks.SIGMAS), x, 16)), peers.packed(plain, x, 1)
    known.check("peer", right(), right())
    known.check("(limit)", calm, calm)
    once, weak = right(), peers.packed(peers.eager_rse(plain, 0.05, 0.025), x, 16)
    for name, probs, again in (("peer", once, once), ("peer", weak, right()), ("peer", calm, right()), ("(limit)", right(), right())):
        with pytest.raises(measure.Refused):
            known.check(name, probs, again)

    ours = rse_fast.Ensemble(rse_fast.convert(copy.deepcopy(plain), *networks.SIGMAS), 4, dtype="float32")
    ensemble.check_exact(ours, ours.model, x, ensemble.ROUNDING)
    other = rse_fast.convert(copy.deepcopy(plain), 0.2, 0.11)
    with pytest.raises(measure.Refused):
        ensemble.check_exact(ours, other, x, ensemble.ROUNDING)


def test_inputs_are_larger_than_the_cache():
    x = torch.zeros(2**22)
    inputs = measure.Inputs(lambda: x.clone())
    first, seen = next(inputs), 1
    while next(inputs) is not first:
        seen += 1
    assert inputs.current is first and seen * x.numel() * 4 >= 2 * measure.cache_bytes(CPU)


def test_peak_memory_counts_what_is_alive_together():
    def run():
        for _ in range(3):
            torch.ones(1_000_000).add(1)  # two tensors of 4 MB at a time

    assert measure.peak_memory(run) == pytest.approx(8, rel=0.01)


def test_bare_philox_makes_the_words_of_the_contract(compiler):
    rows, quads = 2, 64
    counters = np.zeros((rows, quads, 4), np.uint32)
    counters[..., 0], counters[..., 1] = np.arange(quads), np.arange(rows)[:, None]
    words = reference.philox(counters, np.zeros((rows, quads, 2), np.uint32))
    got = noise.philox_words().philox_words(ctypes.c_int64(rows), ctypes.c_int64(quads), 1) % 2**32
    assert got == np.bitwise_xor.reduce(words.reshape(-1))


def test_the_batteries_get_the_words_of_the_contract(compiler, library, tmp_path):
    """Each order from where it begins: which address follows which."""
    battery = pytest.importorskip("bench.battery")
    program, start = battery.compile_words(tmp_path), 3

    def words(order, count):
        with subprocess.Popen([program, library.path, library.unit, order, str(start)], stdout=subprocess.PIPE) as source:
            return np.frombuffer(source.stdout.read(4 * count), np.uint32)

    def expected(quads=0, images=0, draws=0, streams=0, seed=start << 40):
        key = np.stack(np.broadcast_arrays(np.asarray(seed) & (2**32 - 1), np.asarray(seed) >> 32), -1)
        return reference.philox(np.stack(np.broadcast_arrays(quads, images, draws, streams), -1), key).reshape(-1)

    n = np.arange(64)
    assert (words("positions", 256) == expected(quads=n)).all()
    assert (words("first-words", 64) == expected(quads=n)[::4]).all()
    for order, address in {"images": "images", "draws": "draws", "streams": "streams"}.items():
        assert (words(order, 256) == expected(**{address: n})).all(), order
        assert (words(order, 4 * 4096 + 4)[-4:] == expected(quads=1)).all(), order
    assert (words("seeds", 256) == expected(seed=(start << 40) + n)).all()
    assert (words("high-seeds", 256) == expected(seed=(start << 24) + (n << 32))).all()
    assert (words("network", 8 * 256)[4 * 64 :][:256] == expected(quads=n, images=1)).all()
    bits = np.unpackbits(words("draws", 64).byteswap().view(np.uint8)).reshape(-1, 32)[:, ::-1]
    assert (words("draws-reversed", 64) == np.packbits(bits, 1).view(">u4").reshape(-1)).all()


def test_the_anderson_darling_p_values_are_the_published_ones():
    """Of A^2 with known parameters (D'Agostino and Stephens 1986, table 4.2)."""
    battery = pytest.importorskip("bench.battery")
    for square, p in ((1.248, 0.25), (1.933, 0.10), (2.492, 0.05), (3.070, 0.025), (3.878, 0.01)):
        assert battery.anderson_darling_p(square) == pytest.approx(p, rel=0.01)


# -------------------------------------------------------------------------------------------------------------------- results
def test_results_are_merged_by_case_and_survive_the_file(tmp_path):
    path = tmp_path / "results.json"
    first = found(row("a", p50=1), row("a", "gone", p50=1), row("b", p50=2))
    results.save(path, first)
    assert results.load(path) == first
    new = results.merge(results.load(path), [row("a", p50=3)], [measure.target("s", "a", "w", 1.0, 2, "x")], HERE)
    assert [(r["case"], r["implementation"], r["p50"]) for r in new["rows"]] == [("b", "rse_fast", 2), ("a", "rse_fast", 3)]
    assert new["targets"][0]["holds"] is False
    with pytest.raises(ValueError, match="another machine"):
        results.merge(first, [row()], [], {**HERE, "cpu": "another"})
    path.write_text(json.dumps({"rows": [{"suite": "s"}], "targets": []}))
    with pytest.raises(ValueError, match="must be a results file"):
        results.load(path)


def test_worse_is_slower_or_larger_and_peers_do_not_count():
    old = found(row("fast", p50=10), row("memory", unit="MB", p50=10), row("same", p50=1), row("fast", "peer", p50=10))
    new = found(row("fast", p50=5), row("memory", unit="MB", p50=30), row("same", p50=1), row("fast", "peer", p50=1))
    assert [(s["case"], s["worse"]) for s in results.slowdowns(old, new)] == [("memory", 3), ("fast", 2), ("same", 1)]
    with pytest.raises(ValueError, match="in common"):
        results.slowdowns(old, found(row("else")))
    new["rows"][0]["cpu"] = "another"
    with pytest.raises(ValueError, match="one machine"):
        results.slowdowns(old, new)


def test_the_command_measures_merges_and_compares(tmp_path, capsys):
    out, old = tmp_path / "new.json", tmp_path / "old.json"
    chosen = ["--suite", "noise", "--case", "float32 contiguous 64K", "--only", "rse_fast", "--out", str(out)]
    assert main(chosen) == 0
    measured = results.load(out)
    assert {r["implementation"] for r in measured["rows"]} == {"rse_fast", "rse_fast kernel, no allocation"}
    assert all(r["error"] or r["p20"] <= r["p50"] <= r["p80"] for r in measured["rows"]) and measured["rows"][0]["p50"] > 0
    assert "not measured here" in capsys.readouterr().out
    assert measure.selected("a peer")  # what --only chose was for that call

    results.save(old, measured)
    assert main([*chosen, "--compare", str(old), "--tolerance", "1000000"]) == 0
    for r in measured["rows"]:
        r["p50"] = r["p50"] and 1e12 * r["p50"]  # a busy machine may be a thousand times slower from one call to the next
    results.save(old, measured)
    assert main([*chosen, "--compare", str(old), "--tolerance", "1000000"]) == 1
    assert "REGRESSION" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "no such case"], "matches no case"),
        (["--report", "--out", "missing.json"], "holds no results"),
        (["--compare-ref", "no-such-commit"], "must name a commit"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "said"), [(["--compare", "missing.json"], "does not exist"), (["--tolerance", "0.5"], "at least 1")])
def test_bad_values_are_refused_before_anything_is_measured(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- what is written
def test_the_block_of_results_is_replaced_and_nothing_else(tmp_path):
    page, path = tmp_path / "page" / "RESULTS.md", tmp_path / "r.json"
    page.parent.mkdir()
    results.save(path, found(row("x 4M", p50=2.5, suite="noise"), measure.Row("noise", "x 4M", "peer", "m", "images/s", error="it fails")))
    page.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    report.write_page(page, [path])
    once = page.read_text()
    assert once.startswith(f"above\n{report.BEGIN}\n") and once.endswith(f"\n{report.END}\nbelow\n") and "\nold\n" not in once
    assert "| rse_fast | 2.5 |" in once and "peer, not timed: it fails" in once and "a processor" in once
    assert once.count("needs a GPU") == 1 and "needs a CPU" not in once
    assert "([all figures](../r.json))" in once
    report.write_page(page, [path])
    assert page.read_text() == once
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must hold"):
        report.write_page(page, [path])


@pytest.mark.parametrize(("value", "holds", "shown"), [(1.0504, False, "1.0504 x"), (1.0496, True, "1.05 x"), (1.3, False, "1.3 x")])
def test_a_missed_target_is_never_shown_as_reached(value, holds, shown):
    missed = measure.target("train", "c", "time over the plain network's", value, 1.05, "x", at_most=True)
    assert missed["holds"] is holds and report.measured(missed) == shown


def test_a_gpu_is_not_told_that_it_needs_a_gpu():
    aims = [t for aim, t in targets.judge([{"device": "a GPU", "suite": "none", "target": 0}]) if aim.hardware == "GPU"]
    assert all("GPU" not in t["needs"] and "--suite" in t["needs"] for t in aims)
    assert all("GPU" in t["needs"] for aim, t in targets.judge([]) if aim.hardware == "GPU")


def test_every_target_of_noise_and_ensemble_is_judged_by_what_they_measure():
    """With figures for every implementation, each target of these suites has to find its own."""
    found = []
    for device, label, gpu in ((CPU, "4M", ""), (torch.device("cuda"), "512M", "a GPU")):
        rates = dict.fromkeys(("rse_fast", "rse_fast kernel, no allocation", "eager", "torch.compile", "copy (limit)"), 1.0)
        for dtype, layout in ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last")):
            measured = noise.targets(device, dtype, f"{str(dtype)[6:]} {layout} {label}", label, rates)
            found += [{**t, "device": gpu or "cpu"} for t in measured]
        ours = ("rse_fast", "rse_fast float32", "rse_fast bfloat16", f"rse_fast bfloat16, {ensemble.DIRECT}")
        rates = dict.fromkeys((*ours, "eager loop", "torch.compile loop", "plain network, packed float32 (limit)"), 1.0)
        for kind, batch, draws, which in ensemble.CASES[device.type]:
            if which == "few":
                continue
            measured = ensemble.targets(device, kind, batch, draws, ensemble.case_name(kind, batch, draws), rates)
            found += [{**t, "device": gpu or "cpu"} for t in measured]
    judged = {(p.hardware, p.suite, p.task): t for p, t in targets.judge(found)}
    assert len(judged) == len(targets.TARGETS)
    for (_, suite, task), t in judged.items():
        assert (t["holds"] is None) == (suite not in ("noise", "ensemble")), task
        assert t["holds"] is not None or t["needs"]


def test_no_case_begins_when_the_time_is_up(tmp_path, capsys):
    def piece(name):
        return lambda: ([measure.Row("s", name, "rse_fast", "m", "u", 1.0, 1.0, 1.0)], [])

    for seconds, kept in ((60, {"a", "b"}), (-1, set())):
        out = tmp_path / f"{len(kept)}.json"
        new = measure_cases({("s", name): piece(name) for name in "ab"}, out, seconds)
        assert {r["case"] for r in new["rows"]} == {r["case"] for r in results.load(out)["rows"]} == kept
    assert "no time left for s: b" in capsys.readouterr().out


def test_fits_find_the_line_and_the_exponent():
    x = [1, 2, 4, 8]
    line = scaling.fit(x, [3 + 2 * v for v in x])
    assert (line["a"], line["b"], line["r2"]) == pytest.approx((3, 2, 1))
    assert scaling.fit(x, [v**2 for v in x])["exponent"] == pytest.approx(2)
    flat = scaling.fit(x, [7, 7, 7, 7])
    assert (flat["b"], flat["r2"], flat["exponent"]) == pytest.approx((0, 1, 0), abs=1e-9)


def test_work_is_counted_and_the_plan_follows_from_it(tmp_path):
    vgg = scaling.work("VGG16")
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert vgg["multiply_adds"] == sum(9 * a * b * s * s for a, b, s in zip(widths, widths[1:], sides, strict=False))
    assert vgg["elements"] == sum(a * s * s for a, s in zip(widths, sides, strict=False))
    assert scaling.work("ResNet-50")["parameters"] == 25_557_032

    assert scaling.inference(1000, 8) == 800
    assert scaling.certification(1000, 64) == pytest.approx(782 * 100_100 / 1000 / 3600)
    hidden, exposed, exchange = scaling.training(1000, 1e9, 8)  # 4 GB of gradients take longer than they can hide
    assert exchange == pytest.approx(2 * 7 / 8 * 4 / 450) and exposed < hidden <= 1000 * 8

    page, path = tmp_path / "SCALING.md", tmp_path / "r.json"
    case = ensemble.case_name("VGG16", 16, 10)
    results.save(path, found(row(case, p50=20, suite="ensemble"), *(row(f"draws={n}", p50=5 * n, suite="growth") for n in (1, 10, 100))))
    scaling.write(page, [path])
    text = page.read_text()
    assert f"| 200 | measured: {case}" in text and "| a processor | 8 | 160 (predicted)" in text
    assert "| a processor | 1 | 20 (measured) | 67 (predicted) |" in text  # three passes a training image
    assert "| H200 SXM | 1 | " in text and "H200 SXM | 1 | 0" not in text and text.count("measured: ") == 1
