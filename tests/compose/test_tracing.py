"""What watches or traces torch's calls meets noisy layers as the plain ones they stand for: torch.fx, counters of work, exporters."""

import copy

import pytest
import torch
from small_nets import NETS
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import rse_fast
from rse_fast import Ensemble
from rse_fast.models import VGG16
from rse_fast.nn import NoisyLinear, noise_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def converted():
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    return plain.eval(), rse_fast.convert(copy.deepcopy(plain), include=(nn.Conv2d, nn.Linear)).eval()


def same_noise(*functions):
    """The results of functions that begin at the same number of torch's generator."""
    results = []
    for function in functions:
        torch.manual_seed(3)
        results.append(function())
    return results


# ------------------------------------------------------------------------------------------------------------------------ torch.fx
def test_a_symbolic_trace_has_fresh_noise_at_every_call(rng):
    _, model = converted()
    traced, x = torch.fx.symbolic_trace(model), torch.rand(2, 3, 9, 9)
    names = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert set(noise_layers(model)) <= names
    assert torch.equal(*same_noise(lambda: traced(x), lambda: model(x)))
    assert not torch.equal(traced(x), traced(x))
    with rse_fast.noise_off(traced):
        assert torch.equal(traced(x), traced(x))
    assert torch.equal(*same_noise(lambda: traced(x[:1]), lambda: model(x[:1])))


def test_gaussian_noise_and_linear_layers_are_traced(rng):
    model = nn.Sequential(rse_fast.nn.GaussianNoise(0.1), NoisyLinear(4, 3))
    traced, x = torch.fx.symbolic_trace(model), torch.rand(2, 4)
    assert torch.equal(*same_noise(lambda: traced(x), lambda: model(x)))


def test_prepare_fx_quantises_what_stands_between(rng):
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    _, model = converted()
    x = torch.rand(2, 3, 9, 9)
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping(), (x,))
    assert set(noise_layers(model)) <= {node.target for node in prepared.graph.nodes if node.op == "call_module"}
    assert not torch.equal(prepared(x), prepared(x))


# ------------------------------------------------------------------------------------------------------------- counters of work
def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("training", [True, False])
def test_work_is_counted_as_the_plain_networks(training, rng):
    x = torch.rand(2, 3, 32, 32)
    for plain, noisy in (converted(), (VGG16(), rse_fast.convert(VGG16()))):

        def step(model):
            with torch.set_grad_enabled(training):
                y = model(x).sum()
            return y.backward() if training else y

        assert flops(lambda m=noisy: step(m)) == flops(lambda m=plain: step(m)) > 0


def test_an_ensembles_work_is_its_draws(rng):
    plain, noisy = converted()
    x, ensemble = torch.rand(2, 3, 9, 9), Ensemble(noisy, 4, seed=1, dtype="float32")
    with torch.no_grad():
        ensemble(x)  # whatever is done once for a model is not counted
        assert flops(lambda: ensemble(x)) == 4 * flops(lambda: plain(x))


# ------------------------------------------------------------------------------------------------------------------ exporters
def test_make_fx_of_a_layer_keeps_the_seed_an_op(rng):
    _, model = converted()
    x = torch.rand(2, 3, 9, 9)
    graph = make_fx(model)(x)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("rse_fast.add_noise.default") == targets.count("aten.randint.low") == 3
    assert targets.count("aten.convolution.default") == 2
    assert not torch.equal(graph(x), graph(x))
    assert torch.allclose(*same_noise(lambda: graph(x), lambda: model(x)), rtol=1e-5, atol=1e-6)


TRACERS = {
    "jit.trace": lambda ensemble, x: torch.jit.trace(ensemble, x),
    "make_fx": lambda ensemble, x: make_fx(ensemble)(x),
}


@pytest.mark.parametrize("name", list(TRACERS))
@pytest.mark.parametrize("fuse", [True, False])
def test_an_ensemble_with_fresh_noise_is_not_made_a_constant(name, fuse, rng):
    ensemble, x = Ensemble(NETS["plain"](), 3, dtype="float32", fuse=fuse), torch.rand(2, 3, 10, 10)
    with pytest.raises(ValueError, match="seed must be a number for an Ensemble to be traced, got None: .*Ensemble\\(seed="):
        TRACERS[name](ensemble, x)
    assert ensemble(x).shape == (2, 5)


@pytest.mark.parametrize("seed", [None, 5])
def test_torch_export_of_an_ensemble_is_refused(seed, rng):
    ensemble, x = Ensemble(NETS["plain"](), 3, seed=seed, dtype="float32"), torch.rand(2, 3, 10, 10)
    for strict, error in ((False, ValueError), (True, Unsupported)):
        with pytest.raises(error, match="an Ensemble runs a snapshot of its model, .*: rse_fast.export writes a program"):
            torch.export.export(ensemble, (x,), strict=strict)
    assert ensemble(x).shape == (2, 5)


def test_make_fx_of_an_ensemble_with_a_seed_is_that_ensemble(rng):
    ensemble, x = Ensemble(NETS["plain"]().requires_grad_(False), 3, seed=5, dtype="float32"), torch.rand(2, 3, 10, 10)
    graph = make_fx(ensemble)(x)
    assert (graph(x) - ensemble(x)).norm() <= 1e-5 * ensemble(x).norm()


@pytest.mark.parametrize("seed", [None, 5])
def test_an_ensemble_is_one_node_of_a_model_around_it(seed, rng):
    ensemble, x = Ensemble(NETS["plain"](), 3, seed=seed, dtype="float32"), torch.rand(2, 3, 10, 10)
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Hardtanh(0, 1), ensemble, nn.Softmax(1)))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "call_module", "output"]
    first, second = graph(x), graph(x)
    assert torch.equal(first, second) == (seed is not None)
    if seed is not None:
        assert torch.equal(first, ensemble(x).softmax(1))


NEITHER = {
    "trace of an ensemble": lambda e: torch.fx.symbolic_trace(e),
    "trace of predict": lambda e: torch.fx.symbolic_trace(lambda x: e.predict(x).probs),
    "trace of a layer": lambda e: torch.fx.symbolic_trace(rse_fast.nn.NoisyConv2d(3, 4, 1)),
    "script of an ensemble": lambda e: torch.jit.script(e),
    "script around an ensemble": lambda e: torch.jit.script(nn.Sequential(nn.ReLU(), e)),
    "script of a model": lambda e: torch.jit.script(e.model),
    "script of a layer": lambda e: torch.jit.script(rse_fast.nn.GaussianNoise(0.1)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
@pytest.mark.parametrize("name", NEITHER)
def test_what_torch_cannot_trace_or_script_names_export(name):
    tool = "torch.fx cannot trace into" if name.startswith("trace") else "torch.jit.script cannot take"
    with pytest.raises(ValueError, match=rf"^{tool} .*: rse_fast\.export\(rse_fast\.Ensemble\(model\), example, .* seed is an input"):
        NEITHER[name](Ensemble(NETS["plain"](), 3))
