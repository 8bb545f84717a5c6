"""The examples, run as a reader runs them; and what FSDP2 and the hub do to the noise."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.long
PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ABORTED = "terminate called without an active exception"


def needs(*packages):
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture
def run(run_python, tmp_path):
    def run(*arguments):
        done = run_python(*arguments, cwd=tmp_path, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
        # torch aborts a process of gloo now and then while it ends, with or without this package; what it has printed counts.
        ended = done.returncode == 0 or (arguments[: len(PROCESSES)] == PROCESSES and ABORTED in done.stderr)
        assert ended, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.parametrize(
    ("script", "packages", "launcher"),
    [
        ("plain_loop", [], ()), ("resume", [], ()), ("compiled", [], ()), ("ddp", [], PROCESSES), ("fsdp2", [], PROCESSES),
        ("lightning_loop", ["lightning"], ()), ("hf_trainer", ["transformers", "accelerate"], ()), ("accelerate_loop", ["accelerate"], ()),
        ("timm_loop", ["timm"], ()),
    ],
)  # fmt: skip
def test_a_loop_trains_a_noisy_network(run, script, packages, launcher):
    needs("sklearn", *packages)
    out = run(*launcher, EXAMPLES / f"{script}.py")
    (accuracy,) = re.findall(r"test accuracy of 10 draws: ([\d.]+)", out)
    assert float(accuracy) > 0.75  # of ten classes
    assert script != "resume" or "has the weights of the whole one: True" in out


def test_the_hub_brings_the_noise_back(run):
    needs("huggingface_hub", "transformers")
    first, second = run(EXAMPLES / "hub.py").strip().split("stream ")[1:]
    for table, layers in ((first, 7), (second, 6)):
        sigmas = [float(line.split()[3]) for line in table.strip().splitlines()[1:]]
        assert sorted(sigmas) == [0.05] * (layers - 1) + [0.3], table


def test_examples_are_short():
    long = {path.name for path in EXAMPLES.glob("*.py") if len(path.read_text().splitlines()) > 60}
    assert long <= {"ray_data.py", "serve.py"}  # programs, not loops


@pytest.fixture
def labels(run, tmp_path):
    """A network that was trained for an epoch in the folder ``run``, and labels(folder): what is predicted in it, by index."""
    needs("sklearn")
    run(
        "-m",
        "rse_fast.cli",
        "train",
        "--data",
        "digits",
        "--model",
        "small",
        "--epochs",
        "1",
        "--batch-size",
        "64",
        "--device",
        "cpu",
        "--out",
        "run",
    )

    def labels(folder):
        rows = map(json.loads, (tmp_path / folder / "predictions.jsonl").read_text().splitlines())
        found = {row["index"]: (row["label"], row["target"]) for row in rows}
        assert sorted(found) == list(range(100)) and len({label for label, _ in found.values()}) > 1
        return found

    return labels


PREDICT = ("-m", "rse_fast.cli", "predict", "run", "--seed", "5", "--images", "100", "--dtype", "float32", "--device", "cpu")


def test_torchrun_predicts_what_one_process_does(run, labels):
    run(*PREDICT, "--out", "one")
    run(*PROCESSES, *PREDICT, "--out", "two")
    assert labels("two") == labels("one")


def test_ray_predicts_what_one_process_does(run, labels):
    needs("ray", "pandas")
    run(*PREDICT, "--out", "one")
    run(EXAMPLES / "ray_data.py", "run", "--seed", "5", "--images", "100", "--dtype", "float32")
    assert labels(".") == labels("one")


SHARDED = """
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import rse_fast
from rse_fast.nn import noise_layers
from rse_fast.models import SmallNet

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
model = rse_fast.convert(SmallNet(10, 1, width=8), 0.2, 0.1).eval()
x = torch.rand(3, 1, 8, 8)
with torch.no_grad(), rse_fast.noise_off(model):
    plain = model(x)
names = list(noise_layers(model))
for layer in model.features:
    if next(layer.parameters(), None) is not None:
        fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert list(noise_layers(model)) == names and len(names) == 7
with torch.no_grad(), rse_fast.noise_off(model):
    assert torch.allclose(model(x), plain, atol=1e-5)
torch.manual_seed(1)  # the same in both processes
with torch.no_grad():
    noisy = model(x)
both = [torch.empty_like(noisy) for _ in range(2)]
distributed.all_gather(both, noisy)
assert (both[0] - both[1]).abs().max() > 1e-3 and (noisy - plain).abs().max() > 1e-3
model.train()(x).sum().backward()
assert all(p.grad is not None and bool(p.grad.to_local().isfinite().all()) for p in model.parameters())
if distributed.get_rank() == 0:
    print("sharded", flush=True)
distributed.barrier()
distributed.destroy_process_group()
"""


def test_fully_sharded_layers_keep_their_noise_and_each_process_has_its_own(run, tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    assert "sharded" in run(*PROCESSES, tmp_path / "sharded.py")
