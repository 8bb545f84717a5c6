"""A few small networks of timm and torchvision, as `make zoo` measures all, and timm's way to load weights."""

import json

import pytest
import torch

import rse_fast
from rse_fast.bench import zoo
from rse_fast.nn import GaussianNoise

try:
    zoo.import_torchvision()
    import timm
except ImportError:
    pytest.skip("needs timm and torchvision, which make zoo installs", allow_module_level=True)

QUICK = ("timm test_resnet", "timm test_efficientnet", "timm test_convnext", "timm test_vit", "timm test_byobnet", "timm test_coatnet")


@pytest.mark.parametrize("name", QUICK)
def test_a_network_is_fused_and_comes_back(name, one_thread):
    row = zoo.measure(name)
    assert row["layers"] > 0 and row["why"] is None and not row["remarks"]
    assert row["difference"] <= 1e-5  # of float32 log-probabilities near -log(10), after some dozen layers
    assert row["revert"]


def test_every_name_is_known():
    assert len(zoo.NAMES) == len(set(zoo.NAMES)) >= 130
    import torchvision

    assert set(zoo.TIMM) <= set(timm.list_models())
    assert set(zoo.TORCHVISION) <= set(torchvision.models.list_models())


def test_a_run_goes_on_and_writes_its_table(tmp_path, monkeypatch, one_thread, capsys):
    monkeypatch.setattr(zoo, "NAMES", ["timm test_resnet", "timm no_such_network", "timm test_vit"])
    rows, page = tmp_path / "rows.jsonl", tmp_path / "zoo.md"
    first = {"image": "3x9x9", "layers": 7, "difference": 0.0, "why": "a|b", "remarks": ["one"], "speed_up": 2.0, "revert": True}
    rows.write_text(json.dumps({"model": "timm test_vit", **first}) + "\n" + '{"model": "timm te')  # cut off
    rows.write_text(rows.read_text() + "\n")
    assert zoo.main(["--rows", str(rows), "--table", str(page)]) == 0
    found = zoo.read(rows)
    assert found["timm test_vit"] == first and found["timm test_resnet"]["revert"] and "Error" in found["timm no_such_network"]["problem"]
    text = page.read_text()
    assert "3 of 3 networks measured: 2 work, 1 of them fused" in text
    assert "| timm test_vit | 3x9x9 | 7 | no: a/b |" in text and "- timm test_vit: one" in text
    before = page.stat().st_mtime_ns, len(rows.read_text())
    zoo.main(["--rows", str(rows), "--table", str(page)])
    assert len(rows.read_text()) == before[1]


# ------------------------------------------------------------------------------------------------------------ pretrained weights
def test_weights_of_a_pretrained_cfg_load_before_and_after_convert(tmp_path, rng):
    from safetensors.torch import save_file

    source = timm.create_model("test_resnet").eval()
    path = tmp_path / "model.safetensors"
    save_file(source.state_dict(), path)
    config = {"file": str(path), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    loaded = timm.create_model("test_resnet", pretrained=True, pretrained_cfg_overlay=config).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), source(x))
    rse_fast.convert(loaded, 0.1, 0.1)
    noisy = rse_fast.convert(timm.create_model("test_resnet").eval(), 0.1, 0.1)
    timm.models.load_checkpoint(noisy, str(path))
    wanted = rse_fast.Ensemble(loaded, 3, seed=1, dtype="float32").predict(x).probs
    assert torch.equal(rse_fast.Ensemble(noisy, 3, seed=1, dtype="float32").predict(x).probs, wanted)
    again = tmp_path / "noisy.safetensors"
    save_file(noisy.state_dict(), again)
    plain = timm.create_model("test_resnet", pretrained=True, pretrained_cfg_overlay={"file": str(again)}).eval()
    with torch.no_grad():
        assert torch.equal(plain(x), source(x))


def test_a_network_of_fewer_classes_takes_the_rest_of_its_pretrained_weights(tmp_path):
    from safetensors.torch import save_file

    source = timm.create_model("test_resnet")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    config = {"file": str(tmp_path / "model.safetensors")}
    model = timm.create_model("test_resnet", pretrained=True, pretrained_cfg_overlay=config, num_classes=4).eval()
    state = model.state_dict()
    kept = {key: tensor for key, tensor in source.state_dict().items() if not key.startswith("fc.")}
    assert kept and all(torch.equal(state[key], tensor) for key, tensor in kept.items())
    rse_fast.convert(model, 0.1, 0.1)
    assert rse_fast.Ensemble(model, 2).predict(torch.rand(2, 3, 64, 64)).probs.shape == (2, 4)


def test_the_normalisation_of_a_pretrained_cfg_stands_behind_the_noise():
    network = timm.create_model("test_resnet", num_classes=3).eval()
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))

    class Normalize(torch.nn.Module):
        def forward(self, x):
            return (x - mean) / std

    rse_fast.convert(network, 0.1, 0.1)
    first = next(name for name, layer in rse_fast.nn.noise_layers(network).items())
    rse_fast.revert(network)
    rse_fast.convert(network, 0.1, 0.1, exclude=first)
    model = torch.nn.Sequential(GaussianNoise(0.2), Normalize(), network)
    found = rse_fast.certify(rse_fast.Ensemble(model, dtype="float32"), torch.rand(2, 3, 64, 64), n0=4, n=20, alpha=0.05)
    assert found.sigma == pytest.approx(0.2)
