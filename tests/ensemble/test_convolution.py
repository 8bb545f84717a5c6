"""Winograd's algorithm in the engine: the same function and gradient as the direct one, what runs it, how that is chosen, and refusals."""

import math

import numpy as np
import pytest
import torch
from small_nets import CLASSES, NETS, Head, kept_for_gradient, lively, rounding, sequential
from test_fuse import ADDITIONS, LIKE, Net
from torch import nn
from torch.nn.functional import conv2d
from winograd_bound import bound, transformed

import rse_fast
from rse_fast import Ensemble
from rse_fast.context import NoiseContext
from rse_fast.ensemble import convolution, gradient
from rse_fast.ensemble.convolution import Form, Winograd
from rse_fast.ensemble.fused_conv import Activation, FusedConv
from rse_fast.ensemble.runner import has_bfloat16
from rse_fast.kernels.cpu import winograd
from rse_fast.models import VGG16
from rse_fast.nn import NoisyConv2d

pytestmark = [pytest.mark.usefixtures("one_thread", "library")]
FORMS = (Form(2, torch.float32), Form(4, torch.float32))
FAMILIES = ("plain", "residual", "plain prefix", "bypass", "shared", "norm first", "smooth")


@pytest.fixture
def seed(rng):
    return int(rng.integers(2**64, dtype=np.uint64))


@pytest.fixture(params=FORMS, ids=str)
def form(request, monkeypatch):
    """The one form there is."""
    monkeypatch.setattr(convolution, "forms", lambda dtype: [request.param])
    return request.param


def loss_of_precision(tile: int) -> float:
    """How much larger the terms are that Winograd's algorithm adds up than those of a direct convolution, on normal data: each rounding
    of a term is that much larger."""
    x, weight = torch.randn(1, 8, 8, 8, dtype=torch.float64), torch.randn(8, 8, 3, 3, dtype=torch.float64)
    return (transformed(x, weight, tile, 1, torch.abs).norm() / conv2d(x.abs(), weight.abs(), padding=1).norm()).item()


def tolerance(model, logits, tile=4, dtype=torch.float32):
    return rounding(model, logits, dtype) * (loss_of_precision(tile) if dtype == torch.float32 else 2)  # weights are rounded as well


def of_winograd(ensemble) -> list[str]:
    return [name for name, choice in ensemble.algorithms.items() if choice.algorithm != "direct"]


# ----------------------------------------------------------------------------------------------------------------------- one layer
def layers(activation: str, padding: int, sigma, inputs=5, outputs=7):
    """A `FusedConv` in float32, and in float64."""
    made = []
    torch.manual_seed(int(torch.randint(2**31, ())))
    weight, bias, affine = torch.randn(outputs, inputs, 3, 3), torch.randn(outputs), (torch.randn(inputs), torch.randn(inputs))
    for dtype in (torch.float32, torch.float64):
        layer = NoisyConv2d(inputs, outputs, 3, padding=padding, sigma=sigma).to(dtype)
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)
        layer.requires_grad_(False)
        before = None
        if activation:
            before = Activation(layer, "pool" in activation, tuple(t.to(dtype) for t in affine) if "affine" in activation else None)
        made.append(FusedConv(layer, "layer", before))
    return made


@pytest.mark.parametrize("packed", [False, True], ids=["lazy", "packed"])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("activation", ["", "relu", "relu, pool", "affine, relu", "affine, relu, pool"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layer_and_its_gradient_against_float64(form, activation, padding, packed, rng, seed):
    images, draws = 2, 3
    fused, wide = layers(activation, padding, torch.rand(5), 5, 7)
    fused.winograd = Winograd(fused, form)
    sides = (11, 9) if "pool" in activation else (7, 6)
    x = torch.randn(images * (draws if packed else 1), 5, *sides)
    if "affine" in activation:  # float32 and float64 round a value next to the kink to its two sides
        scale, shift = (t[:, None, None] for t in (fused.activation.scale, fused.activation.shift))
        x = torch.where((x * scale + shift).abs() < 1e-3, x + 0.01 / scale, x)
    x = x.contiguous(memory_format=torch.channels_last)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    at = torch.tensor(seed - 2**63)
    with NoiseContext(at, images, draws):
        y = fused(leaf)
    with NoiseContext(at, images, draws):
        want = wide(exact)
    with torch.no_grad(), NoiseContext(at, images, draws):
        assert torch.equal(fused(x), y)
    g = torch.randn_like(y).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        z = wide.activation.clean(x.double()) if activation else x.double()
        z = z if packed else z.repeat(draws, 1, 1, 1)
        # The noise is at most 6.77 of its sigma, which is below 1, and within 1e-6; its sum with the value is rounded once.
        limit = bound(z.abs() + 6.77, fused.layer.weight, form.tile, padding, torch.float32) + 9 * 5 * 4 * 2e-6
        assert ((y - want).abs() <= limit).all() and limit.max() < 0.05
    got, wanted = torch.autograd.grad(y, leaf, g)[0], torch.autograd.grad(want, exact, g.double())[0]
    limit = bound(g, winograd.turned(fused.layer.weight), form.tile, 2 - padding, torch.float32)
    limit = limit if packed else limit.unflatten(0, (draws, images)).sum(0) + draws * 2**-24 * wanted.abs().max()
    size = fused.activation.scale.abs().max() if "affine" in activation else 1
    assert got.shape == x.shape and (got - wanted).abs().max() <= 2 * size * limit.max() and wanted.abs().max() > 10 * size * limit.max()


@pytest.mark.parametrize("activation", ["relu", "affine, relu, pool"])
def test_clean_values_beside_the_result(activation, form, rng, seed):
    """They are those of torch, and the gradients of both come together."""
    fused, wide = layers(activation, 1, 0.0)
    fused.activation.clean_output = wide.activation.clean_output = True
    fused.winograd = Winograd(fused, form)
    x = torch.randn(2, 5, 8, 6).contiguous(memory_format=torch.channels_last)
    if "affine" in activation:
        scale, shift = (t[:, None, None] for t in (fused.activation.scale, fused.activation.shift))
        x = torch.where((x * scale + shift).abs() < 1e-3, x + 0.01 / scale, x)
    leaf, exact, at = x.clone().requires_grad_(), x.double().requires_grad_(), torch.tensor(seed - 2**63)
    with NoiseContext(at, 2):
        y, clean = fused(leaf)
    with NoiseContext(at, 2):
        want, wanted_clean = wide(exact)
    assert (clean - wanted_clean).abs().max() <= 4 * 2**-24 * wanted_clean.abs().max()
    assert (y - want).norm() <= 1e-5 * want.norm()
    for weight_of_clean in (0.0, 1.0):
        g, g_clean = torch.randn_like(y), torch.randn_like(clean) * weight_of_clean
        got = torch.autograd.grad([y, clean], leaf, [g, g_clean], retain_graph=True)[0]
        expected = torch.autograd.grad([want, wanted_clean], exact, [g.double(), g_clean.double()], retain_graph=True)[0]
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_second_derivatives_and_what_watches(seed):
    """They are made of torch's own operations, which know each other's gradients, transforms and tracers."""
    fused, wide = layers("affine, relu, pool", 1, 0.0)
    fused.winograd = Winograd(fused, FORMS[1])
    # Values behind the affine map lie apart from each other and from 0: float32 and float64 take the same of a window, and of a kink.
    values = (torch.randperm(640).view(2, 5, 8, 8) + 0.5) * (6 / 640) - 3
    scale, shift = (t[:, None, None] for t in (wide.activation.scale, wide.activation.shift))
    x, at = ((values - shift) / scale).float(), torch.tensor(1)

    def loss(module, dtype, direction=None):
        def value(x):
            with NoiseContext(at, 2):
                return (module(x) ** 2).sum()

        leaf = x.to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), leaf)
        # Along the gradient, where no sum cancels.
        direction = first.detach() if direction is None else direction.to(dtype)
        return first, second, torch.func.grad(value)(x.to(dtype)), torch.func.jvp(value, (x.to(dtype),), (direction,))[1]

    wanted = loss(wide, torch.float64)
    for got, want in zip(loss(fused, torch.float32, wanted[0].detach()), wanted, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm() and want.norm() > 0


# ------------------------------------------------------------------------------------------------------------------ whole networks
@pytest.mark.parametrize("name", FAMILIES)
def test_small_networks(name, form, seed):
    model, x, draws = NETS[name](), torch.rand(5, 3, 10, 10), 6
    with torch.no_grad():
        logits = sequential(model, x, draws, seed)
    limit = tolerance(model, logits, form.tile)
    probs = logits.double().softmax(-1).mean(0)
    for rows in (None, 1, 7):
        ensemble = Ensemble(model, draws, max_rows=rows, dtype="float32", algorithm="winograd")
        found = ensemble.predict(x, seed)
        assert (found.probs - probs).abs().max() <= limit / 2 and limit < 1e-2
        assert of_winograd(ensemble) and {choice.algorithm for choice in ensemble.algorithms.values()} <= {"direct", str(form)}


@pytest.mark.parametrize("name", LIKE)
def test_other_families_at_odd_sizes(name, form, seed):
    model = lively(rse_fast.convert(nn.Sequential(*LIKE[name][0]()), 0.3, 0.2), x=torch.rand(16, 3, 13, 11))
    x = torch.rand(3, 3, 13, 11)
    with torch.no_grad():
        logits = sequential(model, x, 4, seed)
    ensemble = Ensemble(model, 4, dtype="float32", algorithm="winograd")
    assert (ensemble.predict(x, seed).probs - logits.softmax(-1).mean(0)).abs().max() <= tolerance(model, logits, form.tile) / 2
    assert of_winograd(ensemble)


@pytest.mark.parametrize("forward", ADDITIONS)
def test_additions(forward, form, seed):
    model, x = lively(rse_fast.convert(Net(forward), 0.3, 0.2)), torch.rand(3, 3, 10, 10)
    with torch.no_grad():
        logits = sequential(model, x, 4, seed)
    ensemble = Ensemble(model, 4, seed=seed, dtype="float32", algorithm="winograd")
    assert (ensemble.predict(x).probs - logits.softmax(-1).mean(0)).abs().max() <= tolerance(model, logits, form.tile) / 2
    if forward.__name__ == "what_was_there_is_overwritten":  # no gradient flows through it
        return
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    direct = Ensemble(model, 4, seed=seed, dtype="float32", algorithm="direct")
    got, want = (torch.autograd.grad(e(leaf)[:, 0].sum(), leaf)[0] for e, leaf in zip((ensemble, direct), leaves, strict=True))
    assert of_winograd(ensemble) and torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_choice_moves_a_result_by_rounding_alone(dtype, seed):
    """As `Ensemble` states it: float32 logits by 1e-5 of the largest for every layer, bfloat16 ones as bfloat16 itself does."""
    if dtype == "bfloat16" and not has_bfloat16(torch.device("cpu")):
        pytest.skip("a processor without bfloat16")
    model = lively(rse_fast.convert(VGG16()), x=torch.rand(8, 3, 32, 32))
    x, at = torch.rand(2, 3, 32, 32), torch.tensor([[0, 0], [1, 0]])
    logits = {}
    for algorithm in ("direct", "auto", "winograd"):
        ensemble = Ensemble(model, 3, dtype=dtype, algorithm=algorithm)
        logits[algorithm] = ensemble.logits_at(x, at, 3, torch.tensor(seed % 2**62)).detach()
        assert bool(of_winograd(ensemble)) is (algorithm != "direct") or algorithm == "auto"
    with torch.no_grad():
        exact = Ensemble(model, 3, dtype="float32", algorithm="direct").logits_at(x, at, 3, torch.tensor(seed % 2**62))
    largest = exact.abs().max()
    assert len(of_winograd(ensemble)) >= 12
    for algorithm in ("auto", "winograd"):
        if dtype == "float32":
            assert (logits[algorithm] - exact).abs().max() <= 13e-5 * largest
        else:
            error, own = (logits[algorithm] - exact).norm(), (logits["direct"] - exact).norm()
            assert error <= 4 * own and own > 0  # two errors of the same kind differ by chance; see `runner.CHANCE`


def test_chunks_and_company_do_not_change_bits(form, seed):
    """A snapshot computes one function. What is no convolution of Winograd's here sums over one row alone."""
    model = lively(rse_fast.convert(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), Head(6))))
    x, ensemble = torch.rand(5, 3, 10, 10), Ensemble(model, 6, seed=seed, dtype="float32", algorithm="winograd")
    features = []
    prepared = ensemble.prepared(x).runner.model
    head = next(m for m in prepared.modules() if isinstance(m, nn.AdaptiveAvgPool2d))
    head.register_forward_pre_hook(lambda module, args: features.append(args[0].clone()))
    seen = []
    for rows in (1000, 1, 6, 12):
        features.clear()
        ensemble.max_rows = rows
        ensemble.predict(x)
        by_image = [f.unflatten(0, (-1, len(f) // min(6, len(f)))) if rows > 1 else f for f in features]
        seen.append(torch.cat([f.transpose(0, 1).flatten(0, 1) if rows > 1 else f for f in by_image]))
    assert all(torch.equal(s, seen[0]) for s in seen[1:])


def test_streams_early_exit_and_certificates(seed):
    model, x = NETS["plain"](), torch.rand(7, 3, 10, 10)
    for early_exit in (None, "exact", 0.9):
        ensemble = Ensemble(model, 20, seed=seed, dtype="float32", early_exit=early_exit, algorithm="winograd", max_rows=9)
        whole = ensemble.predict(x)
        parts = list(ensemble.stream(x.split(3)))
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels) and of_winograd(ensemble)
        assert torch.equal(torch.cat([p.draws_used for p in parts]), whole.draws_used)
    found = {
        algorithm: rse_fast.certify(Ensemble(model, dtype="float32", algorithm=algorithm), x[:3], n0=20, n=200, seed=seed % 2**62)
        for algorithm in ("direct", "winograd")
    }
    assert (found["direct"].votes - found["winograd"].votes).abs().sum() <= 4  # a vote at a tie may turn
    assert found["winograd"].votes.sum() == 3 * 200


# ---------------------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("net", ["smooth", "plain", "residual", "bypass", "shared"])
def test_gradient_of_recomputed_batches_is_the_same(net, form, seed, monkeypatch):
    model, x, weights = NETS[net]().requires_grad_(False), torch.rand(5, 3, 10, 10), torch.randn(5, CLASSES)
    ensemble = Ensemble(model, 6, seed=seed, max_rows=4, dtype="float32", algorithm="winograd")

    def of(keep):
        monkeypatch.setattr(gradient, "KEEP", keep)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad((ensemble(leaf) * weights).sum(), leaf)[0]

    kept = of(1000)
    assert of_winograd(ensemble)  # in the snapshot that is taken for gradients as well
    assert torch.equal(of(0), kept) and torch.equal(of(4), kept) and kept.abs().max() > 0
    direct = Ensemble(model, 6, seed=seed, max_rows=4, dtype="float32", algorithm="direct")
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad((direct(leaf) * weights).sum(), leaf)[0]
    if net == "smooth":  # no kinks that rounding could switch
        limit = 2 * tolerance(model, torch.ones(1), form.tile) * want.abs().max()
        assert (kept - want).abs().max() <= limit
    assert torch.nn.functional.cosine_similarity(kept.flatten(), want.flatten(), 0) > 0.99


def test_no_more_is_kept_for_the_gradient_than_was_planned_for(form):
    for net in ("plain", "residual", "bypass"):
        ensemble = Ensemble(NETS[net]().requires_grad_(False), 8, dtype="float32", algorithm="winograd")
        x = torch.rand(2, 3, 10, 10, requires_grad=True)
        ensemble(x)
        planned, kept, behind = kept_for_gradient(ensemble, x)
        assert 0.99 * kept - behind <= planned and of_winograd(ensemble)


# ---------------------------------------------------------------------------------------------------------------------- the choice
def test_what_each_layer_runs_and_why(seed):
    model = rse_fast.convert(nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2), Head(8),
    )).eval()  # fmt: skip
    x, ensemble = torch.rand(2, 3, 12, 12), Ensemble(model, 2, dtype="float32", algorithm="winograd")
    assert ensemble.algorithms == {}
    ensemble.predict(x, seed)
    found = ensemble.algorithms
    assert list(found) == ["0", "2", "4", "6"] and of_winograd(ensemble) == ["0"]
    assert "stride is (2, 2)" in found["2"].why and "kernel_size is (1, 1)" in found["4"].why and "groups is 2" in found["6"].why
    assert "of the direct one's time" in found["0"].why and found["0"].why in str(ensemble)
    direct = Ensemble(model, 2, dtype="float32", algorithm="direct")
    direct.predict(x, seed)
    assert not of_winograd(direct) and direct.algorithms["0"].why == "as was asked for"
    low = Ensemble(model, 2, dtype="float16")
    low.predict(x, seed)
    assert low.algorithms["0"] == ("direct", "there is none in float16")


def test_what_loses_stays_direct_and_is_measured_once(seed, monkeypatch):
    model, x = NETS["plain"](), torch.rand(2, 3, 10, 10)
    monkeypatch.setattr(convolution, "_seconds", {})
    monkeypatch.setattr(convolution, "_time", lambda runs, rows: {form: 1.0 if form is None else 0.98 for form in runs})
    auto = Ensemble(model, 3, seed=seed, dtype="float32")
    want = Ensemble(model, 3, seed=seed, dtype="float32", algorithm="direct").predict(x)
    assert torch.equal(auto.predict(x).probs, want.probs) and auto.algorithms and not of_winograd(auto)
    monkeypatch.setattr(convolution, "_time", lambda *_: pytest.fail("measured again"))
    again = Ensemble(NETS["plain"](), 5, dtype="float32", max_rows=3)
    again.predict(torch.rand(4, 3, 10, 10))
    auto(x.requires_grad_())  # from now on with gradients, hence another snapshot
    assert again.algorithms == auto.algorithms


def test_a_measurement_is_one(seed, monkeypatch):
    """Of a layer as large as VGG16's, whose quarter of the multiplications shows on every processor."""
    fused, _ = layers("relu", 1, 0.1, 64, 64)
    monkeypatch.setattr(convolution, "_seconds", {})  # as in a fresh process, which measures
    rows, seconds = convolution._measured(fused, (64, 16, 16), 20, FORMS)
    assert rows == 20 and set(seconds) == {None, *FORMS} and all(0 < s < math.inf for s in seconds.values()) and fused.winograd is None


@pytest.mark.parametrize("algorithm", ["auto", "winograd"])
def test_what_the_probe_refuses_is_not_used(algorithm, seed, monkeypatch):
    model, x = NETS["plain"](), torch.rand(2, 3, 10, 10)
    right = winograd.transform_weight
    monkeypatch.setattr(winograd, "transform_weight", lambda *arguments: right(*arguments) * 1.5)
    monkeypatch.setattr(convolution, "CLEARLY", math.inf)  # taken, however slow
    ensemble = Ensemble(model, 3, seed=seed, dtype="float32", algorithm=algorithm)
    if algorithm == "winograd":
        with pytest.raises(ValueError, match=r"algorithm must be 'auto' or 'direct' here.*other results"):
            ensemble.predict(x)
        return
    want = Ensemble(model, 3, seed=seed, dtype="float32", algorithm="direct").predict(x)
    assert torch.equal(ensemble.predict(x).probs, want.probs) and not of_winograd(ensemble)
    assert "other results" in ensemble.algorithms["0"].why


def one(**options):
    return rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, **options), Head(4)))


REFUSED = {
    "no such": ({"algorithm": "fft"}, "must be one of 'auto', 'direct', 'winograd', got 'fft'"),
    "not fused": ({"fuse": False}, "fuse=False"),
    "float16": ({"dtype": "float16"}, "none in float16"),
    "plain torch": ({"backend": "torch"}, "backend 'torch'"),
    "strided": ({"model": one(kernel_size=3, stride=2)}, "no 3x3 convolution"),
    "pointwise": ({"model": one(kernel_size=1)}, "no 3x3 convolution"),
    "padded by two": ({"model": one(kernel_size=3, padding=2)}, "no 3x3 convolution"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match="algorithm") as raised:
        Ensemble(**{"model": one(kernel_size=3), "algorithm": "winograd", **options})
    assert message in str(raised.value)


def test_a_model_that_cannot_be_fused_is_refused_at_the_first_call():
    with pytest.raises(ValueError, match="algorithm must be 'auto' or 'direct' here, got 'winograd': it cannot be traced"):
        Ensemble(NETS["not traceable"](), 2, algorithm="winograd").predict(torch.rand(2, 3, 10, 10))


# ---------------------------------------------------------------------------------------------------------------- kinds of sigma
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_sigma_of_another_dtype_or_layout_is_read_as_its_values(algorithm, seed):
    sigma = torch.linspace(0.1, 0.4, 8)
    wide = torch.zeros(8, 3)
    wide[:, 1] = sigma
    found = []
    for given in (sigma, sigma.double(), wide[:, 1], torch.tensor(0.3), torch.tensor(0.3).expand(8)):
        model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), Head(8)), 0.2)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model[2].sigma = given
        x = torch.rand(2, 3, 12, 12)
        found.append(Ensemble(model, 4, seed=3, dtype="float32", algorithm=algorithm).predict(x).probs)
    for other in (1, 2):
        assert torch.equal(found[other], found[0])
    # A scalar and a vector take other instructions, so they may differ by a rounding.
    assert (found[3] - found[4]).abs().max() < 1e-5 < (found[0] - found[3]).abs().max()


def test_choosing_leaves_torchs_generator_alone(monkeypatch):
    monkeypatch.setattr(convolution, "_seconds", {})  # as in a fresh process, which measures
    ensemble = Ensemble(NETS["plain"](), 2, dtype="float32")
    before = torch.get_rng_state()
    with torch.no_grad():
        ensemble(torch.zeros(1, 3, 10, 10))
    assert convolution._seconds or convolution.unavailable(torch.float32, torch.device("cpu"), "auto")
    assert torch.equal(torch.get_rng_state(), before)
