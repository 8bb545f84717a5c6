"""Attacks on a deployed ensemble, for real on a tiny network: the noise each part gets, interrupts, sharing among processes, errors."""

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from nearest_mean import nearest_mean

import rse_fast
from rse_fast.models import SmallNet
from rse_fast.nn import NoisyConv2d, noise_layers

for package in ("foolbox", "pyautoattack", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(package)

from rse_fast import data  # noqa: E402
from rse_fast.data import lines  # noqa: E402
from rse_fast.ensemble.runner import seeded  # noqa: E402
from rse_fast.evaluate import PROTOCOLS, Case, attacks, command, evaluate, rows, run  # noqa: E402
from rse_fast.evaluate.target import Answer, Queries, Target, derive  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def noisy():
    return nearest_mean(True)


@pytest.fixture(scope="module")
def plain():
    return nearest_mean(False)


@pytest.fixture(scope="module")
def digits():
    return data.digits().test


def without_times(found):
    return {key: {k: v for k, v in row.items() if k != "seconds"} for key, row in found.items()}


def evaluated(target, part, cases, out, images=6, seed=5, **options):
    out.mkdir(exist_ok=True)
    evaluate(target, part.images[:images], part.labels[:images], cases, out, seed=seed, **options)
    return rows.read(out)


# ---------------------------------------------------------------------------------------------------------------- streams of noise
def test_attacks_that_reseed_or_switch_modes_change_nothing(noisy, digits, monkeypatch):
    x, y = digits.images[:3].float() / 255, digits.labels[:3]
    seen = {}

    def method(name, rude):
        def attack(case, queries, x, y):
            for _ in range(3):
                if rude:
                    torch.manual_seed(0)
                    np.random.seed(0)
                    queries.train()
                    noisy.train()
                seen.setdefault(name, []).append(queries(x))
                if rude:
                    queries.eval()
                    noisy.eval()
            return [x], torch.zeros(len(x), dtype=torch.bool)

        return attack

    for fuse in (True, False):
        chosen = {"__init__": functools.partialmethod(rse_fast.Ensemble.__init__, fuse=fuse)}
        monkeypatch.setattr("rse_fast.evaluate.target.Ensemble", type("Chosen", (rse_fast.Ensemble,), chosen))
        seen.clear()
        statistics = {name: buffer.clone() for name, buffer in noisy.named_buffers()}
        for name in ("rude", "polite"):
            monkeypatch.setitem(attacks.METHODS, name, method(name, name == "rude"))
            target = Target(noisy, 4, dtype="float32")
            before = torch.get_rng_state()
            attacks.run(Case(name, name, eot=4), target.queries(Case(name, name, eot=4), 7), None, x, y, 1)
            assert torch.equal(torch.get_rng_state(), before)
        for rude, polite in zip(seen["rude"], seen["polite"], strict=True):
            assert torch.equal(rude, polite)
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(seen["rude"], seen["rude"][1:], strict=False))  # fresh noise at every query
        assert all(torch.equal(buffer, statistics[name]) for name, buffer in noisy.named_buffers())


class Spy(Target):
    """Notes every seed that a classifier was given, and for what."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scored, self.asked = [], []

    def queries(self, case, seed):
        queries = super().queries(case, seed)
        queries.register_forward_pre_hook(lambda module, inputs: self.asked.append(derive(module.seed, module.calls)))
        return queries

    def answer(self, victim, x, seed, image_offset, draws=None):
        self.scored.append(seed)
        return super().answer(victim, x, seed, image_offset, draws)


def test_attack_selection_and_scoring_have_noise_of_their_own(noisy, digits, tmp_path):
    spy = Spy(noisy, 3)
    case = Case("p", "pgd", eps=0.1, steps=3, eot=2, restarts=2, by_draws=True)
    found = evaluated(spy, digits, [case], tmp_path, repeats=4)
    assert len(spy.asked) == 2 * (3 + 1)  # restarts x (steps and foolbox's own verdict)
    sizes = {*run.DRAWS, 3}
    assert len(spy.scored) == 2 + 4 + len(sizes)  # candidates (one seed, so that they compare), repeats, sizes of ensembles
    assert len({*spy.asked, *spy.scored}) == 8 + 1 + 4 + len(sizes)
    assert set(found["p", 0]["seeds"]) <= set(spy.scored) and len(set(found["p", 0]["seeds"])) == 4


def test_answers_are_those_of_the_deployed_ensemble(noisy, digits, tmp_path):
    found = evaluated(Target(noisy, 3), digits, [Case("clean", "clean")], tmp_path, images=70)
    ensemble = rse_fast.Ensemble(noisy, 3)
    for start, stop in ((0, 64), (64, 70)):  # two batches
        x = digits.images[start:stop].float() / 255
        for r, seed in enumerate(found["clean", start]["seeds"]):
            expected = ensemble.predict(x, seed=seed, image_offset=start).labels.tolist()
            assert [found["clean", i]["answers"][r] for i in range(start, stop)] == expected
    assert {row["l2"] for row in found.values()} == {0.0}


def test_fixed_seed_and_noise_off_are_what_their_attack_saw(noisy, digits):
    x = digits.images[:4].float() / 255
    target = Target(noisy, 3, dtype="float32")
    fixed = target.queries(Case("a", "pgd", eot=3, victim="fixed-seed"), 9)
    first, again = fixed(x), fixed(x)
    assert torch.equal(first, again) and not fixed.random
    assert (first.exp() - target.answer("fixed-seed", x, fixed.seed, 0).probs).abs().max() < 1e-5
    off = target.queries(Case("b", "pgd", victim="noise-off"), 9)
    with rse_fast.noise_off(noisy):
        expected = noisy(x).log_softmax(-1)
    assert (off(x) - expected).abs().max() < 1e-4 and (target.answer("noise-off", x, 1, 0).probs - expected.exp()).abs().max() < 1e-5
    assert all(layer.noise_enabled for layer in noise_layers(noisy).values())  # the ablation has a copy of its own
    draw = target.queries(Case("c", "pgd", eot=20, source="fixed-draw"), 9)
    assert draw.classifier.draws == 1 and torch.equal(draw(x), draw(x))


# ------------------------------------------------------------------------------------------------------------------------ attacks
SHORT = [
    Case("clean", "clean"), Case("noise", "noise", eps=0.2), Case("noise-l2", "noise", "L2", eps=1.0), Case("fgsm", "fgsm", eps=0.2, eot=2),
    Case("pgd", "pgd", eps=0.2, steps=5, eot=2), Case("momentum", "momentum", eps=0.2, steps=5, eot=2),
    Case("pgd-l2", "pgd", "L2", eps=1.0, steps=5, eot=2, restarts=2),
    Case("apgd-ce", "apgd-ce", eps=0.2, steps=6, eot=2), Case("apgd-dlr", "apgd-dlr", "L2", eps=1.0, steps=6, eot=2),
    Case("autoattack", "autoattack", eps=0.2, steps=6, eot=2), Case("square", "square", eps=0.2, steps=20, eot=2),
    Case("cw", "cw", "L2", steps=10, eot=2), Case("cw-c", "cw-c", "L2", steps=10, eot=2, c=0.1),
    Case("transfer", "pgd", eps=0.2, steps=5, source="plain"), Case("logits", "pgd", eps=0.2, steps=5, eot=2, source="mean-logits"),
]  # fmt: skip


@pytest.fixture(scope="module")
def short(noisy, plain, digits, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("short")
    return evaluated(Target(noisy, 3, plain=plain), digits, SHORT, out)


def test_every_method_stays_in_its_ball_and_uses_it(short):
    assert {name for name, _ in short} == {case.name for case in SHORT} and len(short) == 6 * len(SHORT)
    assert {case.method for case in SHORT} == attacks.METHODS.keys()
    for case in SHORT:
        own = [short[case.name, i] for i in range(6)]
        norms = [row["linf" if case.norm == "Linf" else "l2"] for row in own]
        if case.eps:
            assert max(norms) <= case.eps * (1 + 1e-5) + 1e-6, case.name
        if case.method != "clean":
            assert min(norms) > 0, case.name
        if case.method in ("fgsm", "pgd", "momentum"):
            assert min(norms) > (0.95 if case.norm == "Linf" else 0.8) * case.eps, case.name


def test_attacks_attack(short):
    def right(name):
        return sum(answer == short[name, i]["target"] for i in range(6) for answer in short[name, i]["answers"])

    assert all(right(name) < right("noise") for name in ("pgd", "momentum", "logits", "apgd-ce"))
    assert [short["pgd", i]["queries"] for i in range(6)] == [6.0] * 6
    assert [short["square", i]["queries"] for i in range(6)] == [20 + 3.0] * 6  # a lucky query ends nothing; start, classes, verdict


def test_a_case_gives_the_same_rows_again_and_other_rows_with_another_seed(noisy, plain, digits, tmp_path, short):
    cases = [case for case in SHORT if case.name in ("pgd-l2", "apgd-ce", "square", "autoattack")]
    target = Target(noisy, 3, plain=plain)
    again = evaluated(target, digits, cases, tmp_path / "again")
    assert without_times(again) == {key: row for key, row in without_times(short).items() if key in again}
    other = evaluated(target, digits, cases, tmp_path / "other", seed=6)
    assert all(other["pgd-l2", i]["linf"] != again["pgd-l2", i]["linf"] for i in range(6))


def test_an_attack_that_leaves_its_ball_is_an_error(noisy, digits, tmp_path, monkeypatch):
    for change in (0.3, float("nan")):

        def leave(case, queries, x, y, change=change):
            return [(x + change).clamp(0, 1)], torch.zeros(6, dtype=torch.bool)

        monkeypatch.setitem(attacks.METHODS, "fgsm", leave)
        with pytest.raises(RuntimeError, match="left its ball"):
            evaluated(Target(noisy, 3), digits, [Case("a", "fgsm", eps=0.1)], tmp_path)
        assert rows.read(tmp_path) == {}


@pytest.mark.parametrize("classes", (2, 3, 4))
@pytest.mark.parametrize("convert", (True, False), ids=("noisy", "plain"))
def test_autoattack_with_few_classes(classes, convert, digits, rng):
    """The library's versions ask for ten: with fewer they would stop on an index, losses that need more classes are left out."""
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(108, classes))
    target = Target(rse_fast.convert(net, 0.05, 0.02) if convert else net, 2)
    x = digits.images[:6].float() / 255
    y = target.answer("deployed", x, 1, 0).labels
    y[0] = (y[0] + 1) % classes  # wrong before
    case = Case("a", "autoattack", eps=0.3, steps=5, eot=2)
    queries = target.queries(case, 3)
    found = attacks.run(case, queries, lambda images: target.answer("deployed", images, 2, 0), x, y, 4)
    changed = (found.images != x).flatten(1).any(1)
    assert changed.all() if convert else not changed[0]  # a random answer that was wrong once is not taken for good
    assert convert or (found.verdict == (target.answer("deployed", found.images, 5, 0).labels != y)).all()


def test_the_first_attack_of_autoattack_is_that_attack_for_any_number_of_steps(digits):
    """Of a network whose noise is 0, so that no query has noise of its own. It is so crooked that the size of a step matters."""
    x, y = digits.images[:6].float() / 255, digits.labels[:6]
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(288, 10))
    with torch.no_grad():
        net[0].weight.mul_(20)
    target, found = Target(rse_fast.convert(net, 0, 0), 2, dtype="float32"), {}
    for method in ("autoattack", "apgd-ce"):
        case = Case("a", method, eps=0.2, steps=20, eot=2)
        with seeded(7, x.device):
            if method == "apgd-ce":
                attacks._seed()  # the other gave one to its library
            found[method], _ = attacks.METHODS[method](case, target.queries(case, 3), x, y)
    assert torch.equal(found["autoattack"]["apgd-ce"][0], found["apgd-ce"][0]) and not torch.equal(found["apgd-ce"][0], x)


def test_the_attacks_of_autoattack_are_scored_alone_too(short, noisy, digits):
    """Each with the best of its own candidates; of all candidates the best is that of one of them."""
    for i in range(6):
        assert short["autoattack", i]["parts"].keys() == {"apgd-ce", "apgd-dlr"}
        assert all(len(answers) == 5 for answers in short["autoattack", i]["parts"].values())
    assert not any("parts" in row for (name, _), row in short.items() if name != "autoattack")
    x, y = digits.images[:5].float() / 255, digits.labels[:5]
    target, given = Target(noisy, 3), {"a": [x, 1 - x], "b": [x.flip(-1), x.flip(-2)]}
    select = lambda images: target.answer("deployed", images, 3, 0)  # noqa: E731
    leads = {part: torch.stack([attacks.lead(select(c).probs, y) for c in images]) for part, images in given.items()}
    case = Case("a", "autoattack", eps=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attacks.METHODS, "autoattack", lambda *args: (given, torch.zeros(5, dtype=torch.bool)))
        found = attacks.run(case, target.queries(case, 1), select, x, y, 2)
    for i in range(5):
        for part in given:
            assert torch.equal(found.parts[part][i], given[part][leads[part][:, i].argmin()][i])
        strongest = min(given, key=lambda part: leads[part][:, i].min())
        assert torch.equal(found.images[i], found.parts[strongest][i])


def test_mean_logits_are_those_of_the_draws(digits, rng):
    """Of a linear network with noise at its input they are the logits without noise, which the mean softmax is not."""
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 8), torch.nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(torch.from_numpy(rng.normal(size=(4, 1, 8, 8))))
    x = digits.images[:3].float() / 255
    with torch.no_grad():
        clean = net(x).double()
    target, draws = Target(rse_fast.convert(net, 0.5, 0.5), 3, dtype="float32"), 4000
    queries = target.queries(Case("a", "pgd", eot=draws, source="mean-logits"), 1)
    assert queries.random
    mean, again = queries(x).double(), queries(x).double()
    centred = lambda logits: logits - logits.mean(-1, keepdim=True)  # noqa: E731
    spread = (
        0.5 * net[0].weight.flatten(1).norm(dim=-1).max().item() / draws**0.5
    )  # sd of a mean logit; a difference from the mean less than 2
    assert (centred(mean) - centred(clean)).abs().max() < 6 * 2 * spread and not torch.equal(mean, again)
    assert (mean.exp().sum(-1) - 1).abs().max() < 1e-5
    softmax = target.classifier("deployed", draws)
    softmax.seed = 1
    assert (centred(softmax(x).double()) - centred(clean)).abs().max() > 6 * 2 * spread


def test_restarts_keep_the_image_whose_true_class_is_furthest_behind(noisy, digits):
    x, y = digits.images[:5].float() / 255, digits.labels[:5]
    target, candidates = Target(noisy, 3), [x, 1 - x, x.flip(-1)]
    probs = torch.stack([target.answer("deployed", c, 3, 0).probs for c in candidates])
    true = torch.nn.functional.one_hot(y, 10).bool()
    leads = torch.where(true, probs, 0).amax(-1) - torch.where(true, -1, probs).amax(-1)
    calls = iter(candidates)
    case = Case("a", "pgd", eps=1.0, restarts=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attacks.METHODS, "pgd", lambda *args: ([next(calls)], torch.zeros(5, dtype=torch.bool)))
        found = attacks.run(case, target.queries(case, 1), lambda images: target.answer("deployed", images, 3, 0), x, y, 2)
    for i, choice in enumerate(leads.argmin(0).tolist()):
        assert torch.equal(found.images[i], candidates[choice][i])


def test_an_image_that_is_wrong_is_kept_before_one_whose_true_class_is_less_probable_and_right():
    """The truth has 0.34 of three classes, and 0.45 of two."""
    probs = torch.tensor([[0.34, 0.33, 0.33], [0.45, 0.55, 0.0]])
    right, wrong, x, y = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    case = Case("a", "pgd", eps=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attacks.METHODS, "pgd", lambda *args: ([right, wrong], torch.ones(2, dtype=torch.bool)))
        found = attacks.run(case, Queries(torch.nn.Flatten(), 1), lambda c: Answer(y, probs[c[:, 0, 0, 0].long()]), x, y, 2)
    assert torch.equal(found.images, wrong)


def test_the_closest_image_that_other_draws_confirm_is_kept(noisy, digits):
    """A candidate that one query found wrong, and no other does, is none; of those that are wrong the closest counts."""
    x, y = digits.images[:6].float() / 255, digits.labels[:6]
    target = Target(noisy, 3)
    select = lambda images: target.answer("deployed", images, 3, 0)  # noqa: E731
    near, wrong, far = (x + 1e-3).clamp(0, 1), 0.8 * (1 - x) + 0.1, 1 - x
    assert (select(wrong).labels != y).all() and (select(far).labels != y).all()
    confirmed = select(near).labels != y
    assert not confirmed.all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attacks.METHODS, "cw", lambda *args: ([near, far, wrong], torch.ones(6, dtype=torch.bool)))
        found = attacks.run(Case("a", "cw", "L2"), target.queries(Case("a", "cw", "L2"), 1), select, x, y, 2)
    for i in range(6):
        assert torch.equal(found.images[i], near[i] if confirmed[i] else wrong[i])


def test_carlini_wagner_without_success_ends_where_its_search_did(noisy, digits):
    x, y = digits.images[:4].float() / 255, digits.labels[:4]
    wrong = torch.where(Target(noisy, 20).answer("deployed", x, 1, 0).labels == y, y, -1)
    case = Case("a", "cw-c", "L2", steps=3, eot=20, c=1e-3)
    (closest, last), found = attacks.METHODS[case.method](case, Target(noisy, 20).queries(case, 1), x, y)
    unfooled = ~found & (wrong == y)
    assert unfooled.any()
    assert torch.equal(closest[unfooled], last[unfooled]) and 0 < (last - x).abs().max() < 0.02  # not foolbox's zeros


def test_a_deterministic_network_is_attacked_as_it_is(plain, digits, tmp_path):
    target = Target(plain, 10)
    assert target.draws == 0
    for name, protocol in PROTOCOLS.items():
        cases = protocol.cases([0.1, 0.2], 0.5, 0, False)
        assert all(case.eot == 1 and case.source == case.victim == "deployed" for case in cases), name
        assert not any("eot" in case.name for case in cases)
    found = evaluated(target, digits, [Case("p", "pgd", eps=0.2, steps=5), Case("c", "clean")], tmp_path, repeats=2)
    x = digits.images[:6].float() / 255
    assert [found["c", i]["answers"] for i in range(6)] == [[label] * 2 for label in plain(x).argmax(-1).tolist()]


class Second(torch.nn.Module):
    """Returns the logits of a network behind something else."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        logits = self.network(x)
        return logits * 0, logits


@pytest.mark.parametrize("noisy", [True, False])
def test_logits_that_are_named_are_attacked(noisy, digits, tmp_path):
    cases = [Case("p", "pgd", eps=0.2, steps=3, eot=2 if noisy else 1), Case("c", "clean")]
    wanted = evaluated(Target(nearest_mean(noisy), 3, dtype="float32"), digits, cases, tmp_path / "a", repeats=2)
    found = evaluated(Target(Second(nearest_mean(noisy)), 3, dtype="float32", logits=1), digits, cases, tmp_path / "b", repeats=2)
    assert {key: row["answers"] for key, row in found.items()} == {key: row["answers"] for key, row in wanted.items()}
    assert len({str(row["answers"]) for row in found.values()}) > 1


# ------------------------------------------------------------------------------------------- interrupts, processes, the command line
def make_network():
    return nearest_mean(True)


IMPORTS = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(nearest_mean.__code__.co_filename)])  # for other processes
ARGS = ["--model", "test_evaluate:make_network", "--data", "digits", "--protocol", "quick", "--eps", "0.1", "0.2", "--seed", "3",
        "--draws", "3", "--repeats", "2", "--images", "40"]  # fmt: skip
ONLY = ["--only", "clean", "pgd20-Linf-0.1-eot20", "pgd20-Linf-0.2-eot20", "fgsm-Linf-0.2-eot20"]


def main(*options, **environment):
    """The command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.path.dirname(__file__))
        for name, value in environment.items():
            patch.setenv(name, value)
        return command.main(list(options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert main(*ARGS, *ONLY, "--out", str(out)) == 0
    return out


def test_a_killed_run_loses_one_batch_at_most_and_resumes_to_the_same_table(whole, tmp_path):
    path = tmp_path / "rows-0.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "rse_fast.cli", "evaluate", *ARGS, *ONLY, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": IMPORTS, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 40):  # within the second case
        time.sleep(0.002)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert killed, process.communicate()[1]
    process.communicate()
    kept = rows.read(tmp_path)
    assert 40 < len(kept) < 4 * 40 and (len(kept) % 40) % 16 == 0  # batches of 16 images at EOT 20
    with open(path, "ab") as file:
        file.write(b'{"case": "pgd20-Linf-0.2-eo')  # what a process that is killed while it writes leaves behind
    assert rows.read(tmp_path) == kept
    assert main(*ARGS, *ONLY, "--out", str(tmp_path)) == 0
    after = rows.read(tmp_path)
    assert without_times(after) == without_times(rows.read(whole))
    assert all(after[key] == row for key, row in kept.items())  # times included: nothing was done again
    tables = [(out / "report.md").read_text().partition("## Cost")[0] for out in (tmp_path, whole)]
    assert tables[0] == tables[1]


def test_the_command_of_a_figure_makes_it_again(whole, tmp_path):
    results = json.loads((whole / "results.json").read_text())
    name = "fgsm-Linf-0.2-eot20"
    _, verb, *options = shlex.split(results["cases"][name]["command"])
    assert verb == "evaluate" and main(*options, "--out", str(tmp_path)) == 0
    again = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert again.keys() == {name} and again[name]["accuracy"] == results["cases"][name]["accuracy"]
    assert results["attack_seconds"] == pytest.approx(sum(row["seconds"] for row in rows.read(whole).values()))


def test_processes_share_the_batches_and_the_last_one_reports(whole, tmp_path, capsys):
    said = []
    for rank in "01":
        assert not (tmp_path / "report.md").exists()
        assert main(*ARGS, *ONLY, "--out", str(tmp_path), RANK=rank, WORLD_SIZE="2") == 0
        said.append(capsys.readouterr().out)
    lines = [len((tmp_path / f"rows-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert sum(lines) == 4 * 40 and min(lines) > 0
    assert f"evaluate: {lines[0]} of {lines[0]} images, " in said[0] and "evaluate: " not in said[1]
    assert without_times(rows.read(tmp_path)) == without_times(rows.read(whole))
    assert (tmp_path / "report.md").is_file()


def test_a_folder_goes_on_to_more_images(whole, tmp_path):
    def evaluated(images):
        assert main(*ARGS, *ONLY, "--images", str(images), "--out", str(tmp_path)) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        assert {entry["images"] for entry in results["cases"].values()} == {results["settings"]["images"]} == {images}
        return {name: entry["accuracy"] for name, entry in results["cases"].items()}, rows.read(tmp_path)

    few, first = evaluated(24)
    all_figures, every_row = evaluated(40)
    assert without_times(every_row) == without_times(rows.read(whole))
    assert all(every_row[key] == row for key, row in first.items() if "eot20" in key[0] and key[1] < 16)  # a full batch: not done again
    assert evaluated(24)[0] == few != all_figures and rows.read(tmp_path) == every_row


def test_a_folder_serves_several_protocols_and_reports_without_attacking(whole, tmp_path, monkeypatch):
    """What two protocols have in common is attacked once."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = rows.read(out)
    with monkeypatch.context() as patch:
        patch.setattr(attacks, "run", lambda *args: pytest.fail("attacked again"))
        other = ["--protocol", "plateau", "--only", "pgd20-Linf-0.2-eot20", "--out", str(out)]
        assert main(*ARGS, *other) == 0
        writer = rows.Writer(out, 0)  # another process attacks
        assert main(*ARGS, "--protocol", "plateau", "--report", "--out", str(out)) == 0
        writer.close()
    results = json.loads((out / "results.json").read_text())
    assert results["cases"].keys() == {"clean", "pgd20-Linf-0.2-eot20"} and results["settings"]["protocol"] == "plateau"
    assert rows.read(out) == before
    assert main(*ARGS, "--report", "--images", "48", "--out", str(out)) == 0  # not all of these were attacked
    results = json.loads((out / "results.json").read_text())
    assert not results["cases"] and {e["images"] for e in results["incomplete"].values()} == {40}
    assert "pgd20-Linf-0.2-eot20 (40 of 48 images)" in (out / "report.md").read_text()
    assert main(*ARGS, "--report", "--out", str(tmp_path / "nowhere")) == 2 and not (tmp_path / "nowhere").exists()


def test_the_folder_of_another_evaluation_is_refused(whole, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    for change in (["--draws", "4"], ["--seed", "4"], ["--repeats", "4"], ["--l2", "0.4"]):
        assert main(*ARGS, *change, "--out", str(whole)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert change[0].lstrip("-") in line and change[1] in line
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "RUN, --model"), (["--model", "nowhere:at_all"], "--model"), (["--model", "math:floor"], "--model"),
        (["nowhere"], "no run at 'nowhere'"), (["--model", "test_evaluate:make_plain", "--weights", "nowhere.safetensors"], "--weights"),
        (["--model", "test_evaluate:make_plain", "--only", "nothing"], "--only"),
        (["--model", "test_evaluate:make_plain", "--plain", "test_evaluate:make_noisy"], "--plain"),
        (["--model", "test_evaluate:make_plain", "--data", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(options, words, tmp_path, capsys):
    assert main(*options, "--images", "2", "--out", str(tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("rse-fast evaluate: ") and words in line


@pytest.mark.parametrize("options", [["--eps", "0"], ["--eps", "1/0"], ["--draws", "0"], ["--images", "-1"], ["--protocol", "x"]])
def test_bad_options_are_refused_by_name(options, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(options)
    assert end.value.code == 2 and f"argument {options[0]}" in capsys.readouterr().err


def make_plain():
    return SmallNet(10, 1, width=2)


def make_noisy():
    return torch.nn.Sequential(NoisyConv2d(1, 2, 3))


def test_a_part_that_is_sorted_by_class_is_shuffled():
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1)
    for labels, given in (([0, 0, 0, 1, 1, 1, 2, 2], False), ([0, 1, 0, 2, 0, 1, 2, 2], True)):
        part = data.Part(images, torch.tensor(labels))
        indices, order = command.image_order(part)
        found, chosen = command.images_of(part, indices[:5])
        assert (found.flatten().tolist() == [0, 1, 2, 3, 4]) == given and ("shuffle" in order) != given
        assert chosen.tolist() == [labels[i] for i in found.flatten().tolist()]


def test_rows_that_are_no_rows_are_an_error(tmp_path):
    (tmp_path / "rows-0.jsonl").write_bytes(lines.json_line({"case": "a", "index": 0}))
    with pytest.raises(ValueError, match="line 1 .*rows-0.jsonl.*target is missing"):
        rows.read(tmp_path)


def test_settings_name_what_was_evaluated(whole):
    settings = json.loads((whole / "evaluation.json").read_text())
    assert settings["draws"] == 3 and settings["sigmas"] == [0.1, 0.2] and settings["seed"] == 3
    assert len(settings["weights"]) == 64


def test_nan_is_a_wrong_answer():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Flatten()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.layer(x)[:, :3] * torch.where(x.flatten(1).sum(1, keepdim=True) > 1e3, torch.nan, self.weight)

    x = torch.rand(3, 1, 2, 2)
    x[1] = 1e4
    answer = Target(Broken(), 1).answer("deployed", x, 1, 0)
    assert (answer.labels == -1).tolist() == [False, True, False]
