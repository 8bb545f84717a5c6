"""What bench/evidence.py measures, on a tiny network, against counting by hand."""

import json

import numpy as np
import pytest
import torch
from tiny_training import config, write_images

for package in ("matplotlib", "safetensors", "scipy", "tqdm"):
    pytest.importorskip(package)

from bench import evidence  # noqa: E402
from rse_fast import Ensemble, certify_cli, run_inputs, train  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run, and the folder of everything that was measured of it; a few images are copies of others, mirrored."""
    root = tmp_path_factory.mktemp("evidence")
    rng = np.random.default_rng(3)
    write_images(root / "images.npz", rng)
    arrays = dict(np.load(root / "images.npz"))
    arrays["test_images"][:3] = arrays["train_images"][:3, ..., ::-1]
    arrays["test_labels"][:3] = arrays["train_labels"][:3]
    np.savez(root / "images.npz", **arrays)
    made = config(root / "images.npz", epochs=1)
    made.save(root / "config.json")
    train.train(made, root / "run")
    certify_cli.run([str(root / "run"), "--trust", "--n", "200", "--images", "8", "--seed", "1", "--out", str(root / "certified")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "DRAWS", (1, 2, 10, 100, 120))
        for words in (
            ["halves", str(root / "images.npz"), "--config", str(root / "config.json"), "--epochs", "1"],
            ["duplicates", str(root / "images.npz"), "--run", str(root / "run")],
            ["draws", "--run", str(root / "run"), "--images", "6"],
            ["certificates", f"small={root / 'certified'}"],
            ["report"],
        ):
            assert evidence.main(["--out", str(root / "out"), *words]) == 0
    return root


def read(root, name):
    return json.loads((root / "out" / f"{name}.json").read_text())


def test_each_training_image_is_held_out_once(measured):
    found, splits = read(measured, "halves"), train.load_data(train.Config.load(measured / "config.json"))
    images = len(splits.train) + len(splits.val)
    assert found["held_out"]["images"] == images == sum(half["images"] for half in found["halves"])
    assert found["test"]["images"] == len(splits.test) == sum(e["test"]["images"] for e in found["by_class"] if e["test"])
    assert sum(e["held_out"]["images"] for e in found["by_class"]) == images
    mean = sum(half["mean"] * half["images"] for half in found["halves"]) / images
    assert found["held_out"]["mean"] == pytest.approx(mean)
    for share, e in found["validation"].items():
        chosen = len(train.load_data(config(measured / "images.npz", val_fraction=float(share))).val)
        assert (e["chosen"]["images"], e["others"]["images"]) == (chosen, images - chosen)


def test_mirrored_copies_are_found(measured):
    splits = train.load_data(config(measured / "images.npz", val_fraction=0.5))
    copies = sum(any(torch.equal(splits.test.images[i].flip(-1), image) for image in splits.train.images) for i in range(len(splits.test)))
    found = read(measured, "duplicates")["parts"]
    assert found["test"]["images"] == len(splits.test) and found["held out"]["images"] == len(splits.val)
    assert found["test"]["above"]["0.98"]["mean"] * len(splits.test) == pytest.approx(copies)


def test_an_ensemble_of_more_and_more_draws(measured):
    """The mean softmax of the draws, and the loss of single ones."""
    e = read(measured, "draws")["parts"]["test"]
    assert [p["draws"] for p in e["points"]] == [1, 2, 10, 100, 120] and e["label_as_limit"][-1] == 1
    model, splits = run_inputs.model_of(measured / "run", trust=True), train.load_data(train.Config.load(measured / "config.json"))
    picked = torch.arange(6) * len(splits.test) // 6
    x, y = splits.test.images[picked].float() / 255, splits.test.labels[picked]
    probs = [Ensemble(model, 1).predict(x, seed=1000 + i).probs.double() for i in range(100)]
    losses = torch.stack([-p.gather(1, y[:, None])[:, 0].log() for p in probs])
    assert e["loss_of_one_draw"]["mean"] == pytest.approx(float(losses.mean()), rel=1e-4)
    hundred = e["points"][3]
    mean = -torch.stack(probs).mean(0).gather(1, y[:, None]).log().mean()
    assert hundred["nll"]["mean"] == pytest.approx(float(mean), rel=1e-4)
    assert hundred["accuracy"]["mean"] == pytest.approx(float((torch.stack(probs).mean(0).argmax(-1) == y).double().mean()))
    assert all(p[key]["low"] <= p[key]["mean"] <= p[key]["high"] for p in e["points"] for key in ("accuracy", "nll"))
    assert e["loss_of_ensemble"]["mean"] == pytest.approx(float(mean), rel=1e-4)
    assert 0 < e["gap"]["mean"] == pytest.approx(e["loss_of_one_draw"]["mean"] - e["loss_of_ensemble"]["mean"])  # Jensen's inequality
    assert e["images_below_the_bound"] == 0


def test_curves_of_certificates_and_the_report(measured):
    table = certify_cli.read_table(measured / "certified" / "certified.tsv")
    found = read(measured, "certificates")["small"]
    assert found["images"] == 8 and found["draws_per_image"] == 300
    assert [point[0] for point in found["curve"]] == evidence.RADII
    for radius, share, low, high in found["curve"]:
        assert share == sum(row.correct and row.radius >= radius for row in table) / 8 and low <= share <= high
    text = (measured / "out" / "README.md").read_text()
    assert text.count("\n## ") == 4 and "| small |" in text and (measured / "out" / "draws.png").stat().st_size > 1000
    for block in (block for block in text.split("\n\n") if block.startswith("|")):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert (measured / "out" / "certificates.png").stat().st_size > 1000
