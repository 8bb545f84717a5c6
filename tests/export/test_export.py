"""Exported ensembles: what runs in a process without this package gives what `Ensemble.predict` gives for the same seed."""

import importlib.util

import numpy as np
import pytest
import torch
from small_nets import NETS, rounding, sequential
from torch import nn

import rse_fast
from rse_fast import Ensemble, reference
from rse_fast.nn import GaussianNoise

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWS = 4
BATCHES = (1, 2, 5)
SEEDS = (0, 7, -3, 2**63 - 1, -(2**63))

# Runs a program of either kind, and shows that this package is not there to help. -I leaves only the installed packages, and the finder
# of an editable install is taken away.
ELSEWHERE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "rse_fast" not in getattr(finder, "__module__", finder.__class__.__module__)]
sys.path[:] = [entry for entry in sys.path if "rse_fast" not in entry]
try:
    import rse_fast
except ImportError:
    pass
else:
    raise SystemExit(f"rse_fast is there: {rse_fast.__file__}")

import numpy as np

path, inputs, out = sys.argv[1:]
x, results = np.load(inputs), []
cases = [(b, seed) for b in (1, 2, 5) for seed in (0, 7, -3, 2**63 - 1, -(2**63))]
if path.endswith(".onnx"):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for b, seed in cases:
        results.append(dict(zip(names, session.run(None, {"x": x[:b], "seed": np.array(seed, np.int64)}))))
else:
    import torch

    program = torch.export.load(path).module()
    for b, seed in cases:
        results.append({name: t.numpy() for name, t in program(torch.from_numpy(x[:b]), torch.tensor(seed)).items()})
np.savez(out, **{f"{i} {name}": value for i, result in enumerate(results) for name, value in result.items()})
assert not [name for name in sys.modules if name.partition(".")[0] == "rse_fast"]
"""


def needs_onnx():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")


def check(found, ensemble, x, seed):
    """``found`` is what `predict` gives, up to what rounding makes of logits. Returns how many images had votes that rounding cannot turn.

    An image in 500 has two logits so close in one of its draws; its votes are not compared. So a single image may leave none.
    """
    wanted = ensemble.predict(x, seed)
    assert list(found) == ["probs", "labels", "votes", "entropy", "mutual_information"]
    logits = sequential(ensemble.model, x, ensemble.draws, seed % 2**64)
    # Both round; the noise differs by 2e-6 (its normals are float32), which the layers pass on as they do roundings of about 16 units.
    limit = 20 * rounding(ensemble.model, logits)
    probs = torch.as_tensor(found["probs"])
    assert probs.dtype == torch.float32 and probs.shape == wanted.probs.shape
    assert (probs - wanted.probs).abs().max() <= limit
    for name in ("entropy", "mutual_information"):  # a slope of log K at most in all but vanishing probabilities
        assert (torch.as_tensor(found[name]) - getattr(wanted, name)).abs().max() <= 10 * limit, name
    first, second = wanted.probs.topk(2, 1)[0].unbind(1)
    sure = first - second > 2 * limit
    assert torch.equal(torch.as_tensor(found["labels"])[sure], wanted.labels[sure])
    top = logits.topk(2, -1)[0]
    sure = (top[..., 0] - top[..., 1] > 2 * limit).all(0)
    assert torch.equal(torch.as_tensor(found["votes"])[sure], wanted.votes[sure])
    return int(sure.sum())


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_process_without_this_package_gives_the_same_answers(suffix, run_python, tmp_path, rng):
    if suffix == ".onnx":
        needs_onnx()
    ensemble, x = Ensemble(NETS["plain prefix"](), DRAWS, dtype="float32"), torch.rand(max(BATCHES), 3, 10, 10)
    path = tmp_path / f"model{suffix}"
    rse_fast.export(ensemble, x[:1], path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    np.save(tmp_path / "x.npy", x.numpy())
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    done = run_python("-I", script, path, tmp_path / "x.npy", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    found, compared = np.load(tmp_path / "out.npz"), 0
    for i, (b, seed) in enumerate((b, seed) for b in BATCHES for seed in SEEDS):
        result = {name.partition(" ")[2]: found[name] for name in found.files if name.partition(" ")[0] == str(i)}
        compared += check(result, ensemble, x[:b], seed)
    assert compared


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NETS if name not in ("not traceable", "plain prefix")])
def test_every_kind_of_network(name, tmp_path, rng):
    ensemble, x = Ensemble(NETS[name](), DRAWS, dtype="float32"), torch.rand(5, 3, 10, 10)
    rse_fast.export(ensemble, x, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    foreign = {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)} - {"aten"}
    assert not foreign
    assert check(program.module()(x, torch.tensor(-9)), ensemble, x, -9)


class Noise(nn.Module):
    """Its logits are eps itself."""

    def __init__(self):
        super().__init__()
        self.noise = GaussianNoise(1.0)

    def forward(self, x):
        return self.noise(x).flatten(1)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_the_noise_is_that_of_the_contract(suffix, tmp_path, rng):
    """Log-probabilities of one draw over the logits eps are eps less a constant of its row."""
    images, channels, height, width = 3, 6, 5, 3
    seed = int(rng.integers(-(2**63), 2**63))
    x = torch.zeros(images, channels, height, width)
    path = tmp_path / f"noise{suffix}"
    if suffix == ".onnx":
        needs_onnx()
        import onnxruntime
    rse_fast.export(Ensemble(Noise(), 1, dtype="float32"), x, path)
    if suffix == ".onnx":
        probs = torch.from_numpy(onnxruntime.InferenceSession(path).run(["probs"], {"x": x.numpy(), "seed": np.array(seed)})[0])
    else:
        probs = torch.export.load(path).module()(x, torch.tensor(seed))["probs"]
    eps = torch.from_numpy(reference.gaussian(seed, 0, images, 1, channels, height * width)).movedim(-1, 1).flatten(1)
    # Normals in float32 are within 2e-6; a softmax and its logarithm round numbers below 16 a few times.
    assert (probs.double().log() - eps.log_softmax(1)).abs().max() <= 2 * 2e-6 + 8 * torch.finfo(torch.float32).eps * 16


def test_an_undefined_image_has_no_label(tmp_path, rng):
    ensemble, x = Ensemble(NETS["plain"](), 3, dtype="float32"), torch.rand(3, 3, 10, 10)
    rse_fast.export(ensemble, x, tmp_path / "model.pt2")
    x[1] = float("nan")
    found = torch.export.load(tmp_path / "model.pt2").module()(x, torch.tensor(1))
    assert found["labels"][1] == -1 and found["probs"][1].isnan().all() and not found["votes"][1].any()
    assert (found["labels"][[0, 2]] >= 0).all()


@pytest.mark.long
def test_low_precision_is_close(tmp_path, rng):
    ensemble, x = Ensemble(NETS["plain"](), 3, dtype="bfloat16"), torch.rand(3, 3, 10, 10)
    rse_fast.export(ensemble, x, tmp_path / "model.pt2")
    found, wanted = torch.export.load(tmp_path / "model.pt2").module()(x, torch.tensor(1)), ensemble.predict(x, 1)
    limit = 4 * rounding(ensemble.model, sequential(ensemble.model, x, 3, 1), torch.bfloat16)  # errors of two runs, which differ by chance
    assert (found["probs"] - wanted.probs).abs().max() <= limit


@pytest.mark.long
def test_an_aot_inductor_package(compiler, tmp_path, rng):
    ensemble, x = Ensemble(NETS["late noise"](), DRAWS, dtype="float32"), torch.rand(5, 3, 10, 10)
    rse_fast.export(ensemble, x, tmp_path / "model.pt2", compiled=True)
    program = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    compared = sum(check(program(x[:b], torch.tensor(seed)), ensemble, x[:b], seed) for b in BATCHES for seed in SEEDS)
    assert compared


# ------------------------------------------------------------------------------------------------------------------------ refusals
def ensemble_of(**options):
    return Ensemble(NETS["plain"](), 2, **{"dtype": "float32", **options})


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path, rng):
    x = torch.rand(2, 3, 10, 10)
    export, path = rse_fast.export, tmp_path / "model.pt2"
    with pytest.raises(TypeError, match="^path must be a str or a path, got int"):
        export(ensemble_of(), x, 7)
    with pytest.raises(TypeError, match="ensemble must be an rse_fast.Ensemble, got Sequential"):
        export(NETS["plain"](), x, path)
    with pytest.raises(ValueError, match="early_exit must be None, got 'exact'"):
        export(ensemble_of(early_exit="exact"), x, path)
    with pytest.raises(ValueError, match="got 'int8'"):
        export(ensemble_of(dtype="int8", calibration=[x]), x, path)
    for wrong, error, words in ((torch.rand(3), ValueError, "be a batch"), (x.long(), TypeError, "be a floating-point"),
                                ("x", TypeError, "be a tensor"), (x.to("meta"), ValueError, "have data")):  # fmt: skip
        with pytest.raises(error, match=f"^example must {words}"):
            export(ensemble_of(), wrong, path)
    with pytest.raises(ValueError, match="example must hold at least one image"):
        export(ensemble_of(), x[:0], path)
    with pytest.raises(ValueError, match=r"path must end in \.pt2"):
        export(ensemble_of(), x, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="a folder that exists"):
        export(ensemble_of(), x, tmp_path / "none" / "model.pt2")
    path.mkdir()
    with pytest.raises(ValueError, match="path must name a file, got the folder"):
        export(ensemble_of(), x, path)
    path.rmdir()
    with pytest.raises(ValueError, match=r"compiled is for paths that end in \.pt2"):
        export(ensemble_of(), x, tmp_path / "model.onnx", compiled=True)
    with pytest.raises(ValueError, match="dtype 'float32' or 'auto' for ONNX, got 'bfloat16'"):
        export(ensemble_of(dtype="bfloat16"), x, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="model cannot be exported: torch.export gives up"):
        export(Ensemble(NETS["not traceable"](), 2), x, path)
    with pytest.raises(ValueError, match="draws random numbers of its own"):
        export(Ensemble(nn.Sequential(NETS["plain"](), nn.RReLU(), Always()), 2), x, path)
    assert not list(tmp_path.iterdir())


class Always(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
def test_torchs_own_onnx_export_names_ours(tmp_path, rng):
    x = torch.rand(2, 3, 10, 10)
    for model in (NETS["plain"](), ensemble_of(seed=1), ensemble_of()):
        with pytest.raises(Exception, match=r"rse_fast\.export"):
            torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
