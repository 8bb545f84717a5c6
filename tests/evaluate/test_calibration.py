"""Calibration and uncertainty: each figure against counting by hand and against torchmetrics, NaN, and the section of the report."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from entropy import seeded
from tiny_training import config, write_images

from rse_fast.evaluate import calibration
from rse_fast.evaluate.calibration import Answers, measure

pytestmark = pytest.mark.usefixtures("one_thread")


def random_answers(images, classes, scale=2.0):
    """(log-probabilities, labels) of a classifier that is right more often than not, the labels drawn of others."""
    logits = scale * torch.randn(images, classes)
    labels = torch.distributions.Categorical(logits=0.6 * logits).sample()
    return logits.log_softmax(-1), labels


# ------------------------------------------------------------------------------------------------------------------------ by hand
def test_figures_of_three_images():
    probs = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.65, 0.25], [0.2, 0.2, 0.6]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 2])
    assert calibration.negative_log_likelihood(probs.log(), labels) == pytest.approx(-(math.log(0.7) + math.log(0.1) + math.log(0.6)) / 3)
    squares = [0.3**2 + 0.3**2, 0.9**2 + 0.65**2 + 0.25**2, 0.2**2 + 0.2**2 + 0.4**2]
    assert calibration.brier(probs, labels) == pytest.approx(sum(squares) / 3)
    low, high = calibration.reliability(probs, labels, bins=3)  # 0.65 and 0.6 in the second, 0.7 in the third
    assert low == {"low": 1 / 3, "high": 2 / 3, "images": 2, "confidence": pytest.approx(0.625), "accuracy": 0.5}
    assert high == {"low": 2 / 3, "high": 1.0, "images": 1, "confidence": pytest.approx(0.7), "accuracy": 1.0}
    assert calibration.calibration_error([low, high]) == pytest.approx((2 * 0.125 + 0.3) / 3)


def test_no_images_and_other_labels_are_refused():
    for images, labels in ((0, 0), (3, 2)):
        with pytest.raises(ValueError, match=f"one for each of one or more images, got {labels} for {images} images"):
            measure(Answers(torch.zeros(images, 4)), torch.zeros(labels, dtype=torch.int64), 1.0)


def test_a_probability_of_one_is_in_the_last_bin():
    probs = torch.tensor([[1.0, 0.0], [0.99, 0.01]])
    (only,) = calibration.reliability(probs, torch.tensor([0, 1]), bins=10)
    assert only["images"] == 2 and only["high"] == 1.0 and only["accuracy"] == 0.5


def test_disagreement_is_that_of_pairs_of_draws():
    votes = torch.tensor([[3, 1], [4, 0], [2, 2]])  # pairs that differ, of 6: 3, 0, 4
    assert calibration.disagreement(votes) == pytest.approx((3 + 0 + 4) / 6 / 3)
    assert calibration.disagreement(torch.tensor([[1, 0]])) is None


def test_auroc_counts_pairs_and_halves_ties(rng):
    inside, outside = torch.randint(6, (40,)), torch.randint(9, (30,))
    pairs = [(1.0 if b > a else 0.5 if a == b else 0.0) for a in inside.tolist() for b in outside.tolist()]
    assert calibration.auroc(inside, outside) == pytest.approx(np.mean(pairs))


def test_risk_and_coverage(rng):
    confidence = torch.tensor([0.9, 0.5, 0.8, math.nan, 0.6])
    right = torch.tensor([True, False, False, False, True])
    assert calibration.risk_coverage(confidence, right).tolist() == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4, 3 / 5])
    equal = calibration.risk_coverage(torch.full((4,), 0.7), torch.tensor([True, True, False, True]))
    assert equal.tolist() == pytest.approx([0.25] * 4)  # whatever their order
    confidence, right = torch.rand(50), torch.rand(50) < 0.7
    order = sorted(range(50), key=lambda i: -confidence[i])
    by_hand = [np.mean([not right[i] for i in order[: k + 1]]) for k in range(50)]
    assert calibration.risk_coverage(confidence, right).tolist() == pytest.approx(by_hand)


def test_the_same_as_torchmetrics(rng):
    try:
        from torchmetrics.functional import classification
    except Exception as error:  # it imports torchvision, which fails beside a torch of another build
        pytest.skip(f"torchmetrics cannot be imported: {error}")
    log_probs, labels = random_answers(700, 6)
    probs = log_probs.double().exp()
    for bins in (5, 15):
        theirs = classification.multiclass_calibration_error(probs, labels, num_classes=6, n_bins=bins, norm="l1")
        ours = calibration.calibration_error(calibration.reliability(probs, labels, bins))
        assert ours == pytest.approx(float(theirs), abs=700 * 2**-24)  # sums in float32
    inside, outside = torch.rand(90).round(decimals=1), torch.rand(60).round(decimals=1).sqrt()
    target = torch.cat([torch.zeros(90), torch.ones(60)]).long()
    theirs = classification.binary_auroc(torch.cat([inside, outside]), target)
    assert calibration.auroc(inside, outside) == pytest.approx(float(theirs), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------- all together
def test_what_is_measured_is_what_the_parts_give(rng):
    (log_probs, labels), (other, _) = random_answers(300, 4), random_answers(200, 4, scale=0.5)
    votes = torch.distributions.Multinomial(10, probs=log_probs.exp()).sample().long()
    mutual, other_mutual = torch.rand(300), torch.rand(200) + 0.2
    found = measure(Answers(log_probs, mutual, votes), labels, 2.0, Answers(other, other_mutual, None))
    json.dumps(found, allow_nan=False)
    right = log_probs.argmax(-1) == labels
    assert (found["images"], found["undefined"], found["accuracy"]) == (300, 0, pytest.approx(right.double().mean().item()))
    one, two = found["by_temperature"]
    assert (one["temperature"], two["temperature"]) == (1.0, 2.0)
    tempered = (log_probs / 2).log_softmax(-1)
    assert two["nll"] == pytest.approx(calibration.negative_log_likelihood(tempered, labels), rel=1e-6)
    assert one["brier"] == pytest.approx(calibration.brier(log_probs.exp(), labels), rel=1e-6)
    assert sum(entry["images"] for entry in two["diagram"]) == 300
    assert found["disagreement"] == pytest.approx(calibration.disagreement(votes))
    risk = calibration.risk_coverage(tempered.exp().amax(-1), right)
    assert found["risk"] == pytest.approx(risk.tolist()) and found["aurc"] == pytest.approx(risk.mean().item())
    assert found["selective"][0] == {"coverage": 1.0, "images": 300, "accuracy": pytest.approx(right.double().mean().item())}
    assert found["selective"][-1]["images"] == 150 and found["selective"][-1]["accuracy"] == pytest.approx(1 - risk[149].item())
    entropies = [-((p / 2).log_softmax(-1) * (p / 2).softmax(-1)).sum(-1) for p in (log_probs, other)]
    assert found["ood"]["entropy"] == pytest.approx(calibration.auroc(*entropies), abs=1e-4) and found["ood"]["entropy"] > 0.6
    assert found["ood"]["mutual_information"] == pytest.approx(calibration.auroc(mutual, other_mutual))


def test_nan_never_enters_a_figure_in_silence(rng):
    log_probs, labels = random_answers(80, 3)
    votes = torch.distributions.Multinomial(5, probs=log_probs.exp()).sample().long()
    mutual = torch.rand(80)
    bad = torch.arange(80) % 4 == 1
    poisoned = Answers(log_probs.masked_fill(bad[:, None], math.nan), mutual.masked_fill(bad, math.nan), votes * ~bad[:, None])
    found = measure(poisoned, labels, 1.5, poisoned)
    json.dumps(found, allow_nan=False)
    clean = measure(Answers(log_probs[~bad], mutual[~bad], votes[~bad]), labels[~bad], 1.5)
    assert found["undefined"] == 20 and found["ood"]["undefined"] == 20
    assert found["by_temperature"] == clean["by_temperature"] and found["disagreement"] == clean["disagreement"]
    assert found["accuracy"] == pytest.approx(0.75 * clean["accuracy"])  # what gave NaN is wrong
    assert found["risk"][:60] == pytest.approx(clean["risk"]) and found["risk"][-1] == pytest.approx(1 - found["accuracy"])
    nothing = measure(Answers(torch.full((4, 3), math.nan)), labels[:4], 1.0, Answers(log_probs))
    json.dumps(nothing, allow_nan=False)
    assert nothing["undefined"] == 4 and nothing["accuracy"] == 0 and nothing["by_temperature"] == [] and nothing["risk"] == [1.0] * 4
    assert nothing["ood"]["entropy"] is None


# ------------------------------------------------------------------------------------------------------------------------ the command
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a noisy and of a plain run, and a data set of other images."""
    for package in ("foolbox", "pyautoattack", "matplotlib", "safetensors", "tqdm"):
        pytest.importorskip(package)
    from rse_fast import train

    folder, rng = tmp_path_factory.mktemp("calibration"), seeded(__name__)
    write_images(folder / "images.npz", rng, train=240, test=90)
    with np.load(folder / "images.npz") as stored:
        noisy = dict(stored)
    for name in ("train_labels", "test_labels"):  # some labels are wrong: no network can be sure, and a best temperature exists
        noisy[name] = np.where(rng.random(len(noisy[name])) < 0.2, rng.integers(0, 3, len(noisy[name])), noisy[name])
    np.savez(folder / "images.npz", **noisy)
    others = dict(noisy)
    others["test_images"] = rng.integers(0, 256, (50, 3, 12, 10), dtype=np.uint8)
    others["test_labels"], others["train_images"] = np.zeros(50, int), np.zeros((240, 3, 12, 10), np.uint8)
    np.savez(folder / "others.npz", **others)
    for defence in ("rse", "plain"):
        settings = config(folder / "images.npz", defence=defence, epochs=2, lr=0.1, init_sigma=0.1, inner_sigma=0.1, val_fraction=0.3)
        assert train.train(settings, folder / defence)["event"] == "end"
    return folder


def evaluated(runs, defence, out, *further):
    from rse_fast.evaluate import command

    options = ["--images", "2", "--only", "clean", "--draws", "4", "--seed", "5", "--device", "cpu", "--trust", "--repeats", "1"]
    return command.run([str(runs / defence), *options, *further, "--out", str(out)])


@pytest.mark.parametrize("defence", ["rse", "plain"])
def test_evaluate_writes_the_section_and_the_pictures(runs, defence, tmp_path):
    from rse_fast import train

    found = evaluated(runs, defence, tmp_path, "--ood", str(runs / "others.npz"))["calibration"]
    assert found["images"] == 90 and found["temperature"] == train.load_temperature(runs / defence) != 1
    kept = json.loads((tmp_path / "results.json").read_text())["calibration"]
    assert kept == found and kept["ood"]["images"] == 50 and (kept["ood"]["mutual_information"] is None) == (defence == "plain")
    text = (tmp_path / "report.md").read_text()
    section = text.partition("## Calibration and uncertainty")[2].partition("\n## ")[0]
    for name in ("reliability.png", "risk-coverage.png"):
        assert f"]({name})" in section and text.count(name) == 1 and (tmp_path / name).stat().st_size > 5000
    assert f"at temperature {found['temperature']:.3f}" in section and f"{found['by_temperature'][1]['nll']:.4f}" in section
    assert "50 images of others" in section and ("Disagreement" in section) == (defence == "rse") and "NaN" not in section
    assert evaluated(runs, defence, tmp_path, "--ood", str(runs / "others.npz"))["calibration"] == found  # the same folder, once more
    bare = evaluated(runs, defence, tmp_path, "--calibration", "0")  # and without: no section, no picture of before
    assert bare["calibration"] is None and "Calibration" not in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "reliability.png").exists()


def test_the_temperature_of_a_run_is_fitted_on_its_validation_images_and_used(runs, tmp_path):
    import rse_fast
    from rse_fast import cli, data, train

    run = runs / "rse"
    temperature, model = train.load_temperature(run), train.load_model(run, trust=True)
    val = train.load_data(train.Config.load(run / "config.json")).val
    again = rse_fast.fit_temperature(rse_fast.Ensemble(model, 10), data.batches(val, 18))
    assert json.loads((run / "temperature.json").read_text())["images"] == len(val)
    assert again == pytest.approx(temperature, rel=0.3)  # other noise
    assert cli.main(["predict", str(run), "--trust", "--draws", "4", "--seed", "3", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    x = train.load_data(train.Config.load(run / "config.json")).test.images.float() / 255
    expected = rse_fast.Ensemble(model, 4, temperature=temperature).predict(x, seed=3)
    assert [row["probability"] for row in rows] == pytest.approx(expected.probs.amax(-1).tolist(), abs=2e-5)
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["temperature"] == temperature


def test_figures_of_the_images_that_the_temperature_was_fitted_on_are_called_optimistic(runs, tmp_path, recwarn):
    said = "temperature was fitted, and the best epoch chosen, on these very images"
    with np.load(runs / "images.npz") as stored:
        parts = dict(stored)
    np.savez(tmp_path / "moved.npz", **parts)
    parts["train_images"] = 255 - parts["train_images"]
    np.savez(tmp_path / "others.npz", **parts)  # labels alike
    moved, others = (("--data", str(tmp_path / f"{name}.npz")) for name in ("moved", "others"))
    cases = {"val": (("--part", "val"), True), "moved": (("--part", "val", *moved), True), "others": (("--part", "val", *others), False)}
    for name, (options, optimistic) in (cases | {"test": ((), False)}).items():
        recwarn.clear()
        found = evaluated(runs, "rse", tmp_path / name, *options)["calibration"]
        text = (tmp_path / name / "report.md").read_text()
        assert (found["chosen_by"], text.count(said)) == (optimistic, int(optimistic)), name
        assert sum(w.category is RuntimeWarning and f"--part val: the {said}" in str(w.message) for w in recwarn) == optimistic, name
    evaluated(runs, "rse", tmp_path / "none", "--part", "val", "--calibration", "0")
    assert said not in (tmp_path / "none" / "report.md").read_text()


def test_the_best_epoch_was_chosen_by_the_validation_images_of_a_run_without_a_temperature(runs, tmp_path):
    shutil.copytree(runs / "rse", tmp_path / "run")
    (tmp_path / "run" / "temperature.json").unlink()
    with pytest.warns(RuntimeWarning, match="--part val: the best epoch was chosen by these very images"):
        found = evaluated(tmp_path, "run", tmp_path / "out", "--part", "val")
    assert found["calibration"]["temperature"] == 1
    assert "The best epoch was chosen by these very images" in (tmp_path / "out" / "report.md").read_text()


def test_a_damaged_temperature_is_an_error_and_none_is_1(runs, tmp_path):
    from rse_fast import train

    assert train.load_temperature(tmp_path) == 1
    for content in ("{", "[]", '{"temperature": "hot"}', '{"temperature": 0}'):
        (tmp_path / "temperature.json").write_text(content)
        with pytest.raises(ValueError, match="^run: cannot read"):
            train.load_temperature(tmp_path)


def test_other_images_that_do_not_fit_are_refused_before_an_attack(runs, tmp_path):
    with pytest.raises(ValueError, match="^--ood: .*channels"):
        evaluated(runs, "rse", tmp_path, "--ood", "digits")
    with pytest.raises(ValueError, match="^--ood"):
        evaluated(runs, "rse", tmp_path, "--ood", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="^--calibration"):
        evaluated(runs, "rse", tmp_path, "--calibration", "-1")
    assert not (tmp_path / "evaluation.json").exists()
