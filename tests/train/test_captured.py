"""A training step as a CUDA graph: what a run computes is what it computes without, and no step waits for the device."""

import dataclasses
import json

import pytest
import torch
from tiny_training import config

pytest.importorskip("tqdm")
pytest.importorskip("safetensors.torch")

from rse_fast.models import MODELS  # noqa: E402
from rse_fast.train import Config, Trainer, load_data  # noqa: E402
from rse_fast.train.captured import advice, captures  # noqa: E402
from rse_fast.train.distributed import Ranks  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

CASES = {
    "plain": {},
    "rse": {"draws": 2, "sigma_warmup": 1.5},
    "rse learnable": {"learnable_sigma": "channel", "sigma_regulariser": 0.1},
    "rse bfloat16": {"bf16": True, "clip": 0.5},
    "rse+adversarial": {"attack_steps": 2, "attack_draws": 2, "eps": 0.05},
    "adversarial": {"attack": "fgsm"},
    "brelu": {"ema": 0.9},
}


def trainer(images, case, device="cuda", **fields):
    settings = config(images, defence=case.split()[0], epochs=3, device=device, log_steps=1, **CASES[case], **fields)
    return Trainer(settings, load_data(settings), Ranks(0, 1, torch.device(device)))


def losses(trainer):
    rows = []
    while not trainer.complete:
        rows.append(trainer.advance())
    return torch.tensor([row.get("val_loss", row["loss"]) for row in rows if row])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_captured_run_is_the_run(images, case):
    """Step by step, over three epochs with their validation: noise, crops, attacks, rates and statistics are all in the losses."""
    want, got = losses(trainer(images, case)), losses(trainer(images, case, cuda_graphs=True))
    assert len(want) > 15 and (got - want).abs().max() <= (3e-2 if "bfloat16" in case else 2e-3), (got - want).abs()
    other = losses(trainer(images, case, seed=1))
    assert (other - want).abs().max() > 0.1  # the comparison could fail


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_no_step_waits_for_the_device(images, cuda_graphs):
    run = trainer(images, "rse", cuda_graphs=cuda_graphs)
    for _ in range(5):
        run.advance()
    object.__setattr__(run.config, "log_steps", 100)
    before = run.step
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.zeros(1, device="cuda").item()  # a wait would be noticed
        row = run.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == before + 1 and row is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_that_cannot_be_captured_raises_and_spoils_nothing(images):
    run = trainer(images, "plain", cuda_graphs=True)
    norm = next(m for m in run.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.momentum = None  # reads the number of batches back from the device
    with pytest.raises(RuntimeError):
        losses(run)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert len(losses(trainer(images, "rse", cuda_graphs=True))) > 15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_own_network_is_captured_unasked_and_runs_on_where_that_fails(images):
    def reads_back(module, args):
        assert args[0].mean().item() < 1e9  # waits for the device: no capture

    want = losses(trainer(images, "plain", model="small", cuda_graphs=False))
    asked = losses(trainer(images, "plain", model="small"))
    other = losses(trainer(images, "plain", model="small", seed=1))
    assert (asked - want).abs().max() <= 1e-2 < (other - want).abs().max()
    runs = {}
    for cuda_graphs in (False, None, True):
        runs[cuda_graphs] = trainer(images, "rse", model="small", cuda_graphs=cuda_graphs)
        runs[cuda_graphs].model.register_forward_pre_hook(reads_back)
    with pytest.warns(RuntimeWarning, match="cannot be captured in a CUDA graph and runs without one") as warned:
        found = losses(runs[None])
    assert sum("captured" in str(w.message) for w in warned) == 1
    assert (found - losses(runs[False])).abs().max() <= 1e-2  # crops, noise and statistics are those of a run without
    with pytest.raises(RuntimeError):
        losses(runs[True])


def test_what_is_captured(images):
    def decided(device, processes, **fields):
        asked = config(images, **fields)
        return captures(asked, device, processes), advice(asked, device, processes)

    for name in MODELS:
        assert decided(GPU, 1, model=name) == (True, None)
    own, other = {"model": "vgg16"}, {"model": "tiny_training:net"}
    for network in (own, other):
        for device, processes in ((CPU, 1), (GPU, 2)):
            assert decided(device, processes, **network) == (False, None)
            with pytest.raises(ValueError, match=f"^cuda_graphs: needs one process on a CUDA device, got {processes} on {device}"):
                decided(device, processes, cuda_graphs=True, **network)
        assert decided(GPU, 1, compile=True, **network) == decided(GPU, 1, start_scale=0.5, **network) == (False, None)
        assert decided(GPU, 1, cuda_graphs=True, **network) == (True, None)
        for device, processes in ((CPU, 1), (GPU, 1), (GPU, 2)):
            assert decided(device, processes, cuda_graphs=False, **network) == (False, None)
    captured, line = decided(GPU, 1, **other)
    assert not captured and "tiny_training:net" in line and "--cuda-graphs" in line and "\n" not in line


def test_a_configuration_of_before_loads(images, tmp_path):
    """When cuda_graphs was true or false, and when there was no such field."""
    fields = dataclasses.asdict(config(images))
    path = tmp_path / "config.json"
    for kept in ({"cuda_graphs": True}, {"cuda_graphs": False}, {}):
        path.write_text(json.dumps({name: value for name, value in fields.items() if name != "cuda_graphs"} | kept))
        found = Config.load(path)
        assert found.cuda_graphs is kept.get("cuda_graphs") and found.fingerprint == config(images).fingerprint


def test_without_a_gpu_it_is_refused(images):
    with pytest.raises(ValueError, match="cuda_graphs: needs one process on a CUDA device, got 1 on cpu"):
        trainer(images, "plain", "cpu", cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs.*compile"):
        config(images, cuda_graphs=True, compile=True)
