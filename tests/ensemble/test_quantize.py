"""int8 ensembles: the arithmetic of a layer against float64, what is quantised and what is not, and agreement on real digits."""

import copy
import math

import pytest
import torch
from small_nets import NETS
from torch import nn

import rse_fast
from rse_fast import data, reference
from rse_fast.context import NoiseContext
from rse_fast.ensemble import convolution, quantize
from rse_fast.models import SmallNet
from rse_fast.nn import NoisyConv2d, noise_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def int8(model, calibration, draws=10, **options):
    return rse_fast.Ensemble(model, draws, dtype="int8", calibration=calibration, **options)


def algorithms():
    """Those that a processor may have in int8, by name; the test is skipped where it has no Winograd."""
    without = pytest.mark.skipif(not convolution.byte_forms(), reason="a processor without AVX-512 VNNI")
    return pytest.mark.parametrize("algorithm", ["direct", pytest.param("winograd", marks=without)])


def identity(layer):
    """Covariance of independent inputs: weights are then rounded to nearest, each by itself."""
    terms = layer.weight[0].numel()
    return torch.eye(terms, dtype=torch.float64).expand(layer.groups, -1, -1)


# -------------------------------------------------------------------------------------------------------------------------- the layer
@pytest.mark.parametrize("source", (None, (0.02, 7)), ids=("from floats", "from bytes"))
@pytest.mark.parametrize("output", (None, (0.03, 40)), ids=("to floats", "to bytes"))
@pytest.mark.parametrize("shape", ((16, 24, 1), (8, 8, 8), (6, 4, 2), (3, 5, 1)), ids=str)
def test_a_layer_matches_its_integers_in_float64(shape, source, output, rng):
    """Noisy bytes, integer weights and float32 steps are what they are; from there the convolution is exact up to its last rounding."""
    channels, out, groups = shape
    layer = NoisyConv2d(channels, out, 3, stride=2, padding=1, dilation=1, groups=groups, bias=bool(rng.integers(2)), sigma=0.1)
    conv = quantize.QuantizedConv(layer, (0.021, 31), quantize.weight_bits(), identity(layer))
    conv.pool, conv.output, conv.relu = bool(rng.integers(2)), output, output is None
    if source is not None:
        conv.reads(*source)
    x = torch.randn(3, channels, 9, 6) if source is None else torch.randint(0, 256, (3, channels, 9, 6), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    with NoiseContext(torch.tensor(5), 3, 2):
        got = conv(x)
    clean = x.double() if source is None else (x.double() - source[1]) * source[0]
    clean = torch.nn.functional.max_pool2d(clean, 2) if conv.pool else clean
    noisy = reference.add_noise_u8(clean, 0.021, 31, torch.tensor(0.1), torch.tensor(5), 0, 3, 2)
    weight, steps = quantize.quantize_weight(layer.weight.detach(), 127 if quantize.weight_bits() == 8 else 64, identity(layer))
    bias = None if layer.bias is None else layer.bias.double()
    want = torch.conv2d(
        (noisy.double() - 31) * 0.021, weight.double() * steps.double()[:, None, None, None], bias, (2, 2), (1, 1), (1, 1), groups
    )  # zero padding is zero: the byte 31
    # The kernel, which computes in float32, may decide a tie otherwise: one step of one input.
    slack = 1e-5 * want.abs().max() + 0.021 * steps.max() * weight.abs().max()
    if output is None:
        assert got.dtype == torch.float32 and (got.double() - want.relu()).abs().max() <= slack
    else:
        want = (want / output[0]).round().add(output[1]).clamp(0, 255)
        assert got.dtype == torch.uint8 and (got.double() - want).abs().max() <= 1 + slack / output[0]
        assert (got.double() == want).double().mean() > 0.98
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_weights_never_saturate_the_vendors_products(rng):
    """All bytes at their largest, weights all of one sign at theirs: exact, also where products are added in 16 bits."""
    layer = NoisyConv2d(64, 32, 3, padding=1, sigma=0.1)
    with torch.no_grad():
        layer.weight.copy_(torch.sign(torch.randn(32, 1, 1, 1)).expand_as(layer.weight))
    conv = quantize.QuantizedConv(layer, (1.0, 0), quantize.weight_bits(), identity(layer))
    conv.bias.zero_()
    x = torch.full((1, 64, 5, 5), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    want = torch.conv2d(x.double(), layer.weight.detach().double(), padding=1)
    assert (conv.convolve(x).double() / want - 1).abs().max() < 0.02  # the step of 1 / most, at worst; saturation would halve it


def test_a_library_held_to_fewer_instructions_does_not_saturate(run_python):
    """``ONEDNN_MAX_CPU_ISA`` takes VNNI from the vendor's products on a processor that has it."""
    tests = ["-k", "saturate_the or its_integers", "-n", "0"]
    done = run_python("-m", "pytest", "-q", __file__, *tests, ONEDNN_MAX_CPU_ISA="AVX2")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_torch_s_default_type_changes_nothing(dtype, rng):
    model, x = rse_fast.convert(SmallNet()).eval(), torch.rand(4, 3, 8, 8)
    want = int8(model, x).predict(x, 1).probs
    quantize.weight_bits.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        got = int8(model, x).predict(x, 1).probs
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


def test_weights_are_rounded_for_correlated_inputs(rng):
    weight = torch.randn(12, 8, 3, 3)
    mixing = torch.randn(72, 72, dtype=torch.float64) + 3 * torch.randn(72, 1, dtype=torch.float64)
    covariance = (mixing @ mixing.mT / 72)[None]
    errors = []
    for moments in (covariance, torch.eye(72, dtype=torch.float64)[None]):
        rounded, steps = quantize.quantize_weight(weight, 64, moments)
        assert rounded.dtype == torch.int8 and rounded.abs().max() <= 64 and rounded.shape == weight.shape
        difference = (rounded.double() * steps.double()[:, None, None, None] - weight.double()).flatten(1)
        errors.append(((difference @ covariance[0]) * difference).sum())
    assert errors[0] < 0.5 * errors[1]
    nearest = (weight.double() / steps.double()[:, None, None, None]).round().clamp(-64, 64)
    assert torch.equal(rounded.double(), nearest)  # independent inputs: each weight by itself


def test_few_images_to_calibrate_on(rng):
    """Fewer patches than a layer has inputs: their covariance has no inverse. What is measured is then coarse, not an error."""
    model, x = rse_fast.convert(SmallNet()).eval(), torch.rand(4, 3, 8, 8)  # 4 x 4 patches of 1152 inputs
    ensemble = int8(model, x)
    assert ensemble.quantization.quantized
    off = (ensemble.predict(x, 1).probs - rse_fast.Ensemble(model, 10, dtype="float32").predict(x, 1).probs).abs().max()
    assert 0 < off < 0.1


@pytest.mark.parametrize("kernel,stride,padding", ((2, 2, 0), (3, 2, 1), ((1, 3), (2, 1), (0, 1)), (3, 1, 0)))
def test_pool_of_bytes(kernel, stride, padding, rng):
    pool = nn.MaxPool2d(kernel, stride, padding)
    x = torch.randint(0, 256, (2, 5, 9, 8), dtype=torch.uint8)
    assert torch.equal(quantize.BytesMaxPool(pool)(x).float(), pool(x.float()))


def test_steps_cover_the_values(rng):
    observed = quantize._Range()
    for x in (torch.randn(4, 3, 8, 8), torch.randn(1, 3, 8, 8) + 2):
        observed.add(x)
    step, zero_point = observed.choose()
    assert observed.low / step + zero_point > -60 and observed.high / step + zero_point < 315 and 0 < step < 0.05
    step, zero_point = observed.choose(relu=True)
    assert zero_point == 0 and step < 0.03
    constant = quantize._Range()
    constant.add(torch.zeros(1, 2, 3, 3))
    assert constant.choose() == (1.0, 0)
    constant.add(torch.full((1, 2, 3, 3), math.inf))
    with pytest.raises(ValueError, match="calibration must give finite activations"):
        constant.choose()


# -------------------------------------------------------------------------------------------------------------------------- the model
OF_WINOGRAD = {"plain", "residual", "plain prefix", "bypass", "norm first", "smooth", "wide"}  # have a noisy 3x3 convolution of stride 1


def in_bytes(choice):
    return choice.algorithm.startswith("winograd") and choice.algorithm.endswith("products in int8")


@algorithms()
@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_network_agrees_with_float32_where_it_is_quantised(name, algorithm, rng):
    model, x = NETS[name](), torch.rand(6, 3, 10, 10)
    ensemble = int8(model, [torch.rand(20, 3, 10, 10), torch.rand(7, 3, 10, 10)], seed=3, algorithm=algorithm)
    if algorithm == "winograd" and name not in OF_WINOGRAD:
        with pytest.raises(ValueError, match="algorithm must be 'auto' or 'direct' here, got 'winograd'"):
            ensemble.predict(x)
        return
    if algorithm == "winograd":
        assert ensemble.quantization and any(map(in_bytes, ensemble.algorithms.values()))
    if name == "not traceable":
        with pytest.warns(RuntimeWarning, match="unfused"):
            report = ensemble.quantization
        assert not report.quantized and set(report.kept) == set(noise_layers(model))
    report = ensemble.quantization
    for layer_name, layer in noise_layers(model).items():
        assert (layer_name in report.quantized) != (layer_name in report.kept), layer_name
        if type(layer) is not NoisyConv2d:
            assert layer_name in report.kept
    assert all(error <= quantize.LIMIT for error in report.quantized.values())
    got, want = (e.predict(x).probs for e in (ensemble, rse_fast.Ensemble(model, 10, seed=3, dtype="float32")))
    draws = torch.stack([rse_fast.Ensemble(model, 1, seed=s, dtype="float32").predict(x).probs for s in range(4)])
    assert (got - want).abs().mean() <= draws.std(0).mean() / math.sqrt(10)  # well within what ten other draws would make of it


def test_the_graph_keeps_bytes_between_layers_and_floats_where_they_are_needed(rng):
    model = NETS["plain"]()
    ensemble = int8(model, torch.rand(32, 3, 10, 10), draws=3, algorithm="direct")
    report = ensemble.quantization
    assert list(report.quantized) == ["0", "3", "7", "9"] and "no convolution" in report.kept["10.2"]
    assert str(report).startswith("int8: 4 of 5 layers") and f"{quantize.weight_bits()} bits" in str(report)
    seen = []
    graph = ensemble.prepared(torch.rand(2, 3, 10, 10)).runner.model
    layers = [m for m in graph.modules() if isinstance(m, quantize.QuantizedConv)]
    for layer in layers:
        layer.register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))
    ensemble.predict(torch.rand(2, 3, 10, 10))
    byte, real = torch.uint8, layers[-1].output_dtype
    assert seen == [(real, byte), (byte, byte), (byte, byte), (byte, real)]
    assert not any(isinstance(m, (nn.ReLU, nn.MaxPool2d, quantize.BytesMaxPool)) for m in graph.modules())
    assert [layer.pool for layer in layers].count(True) == 1


def test_layers_that_bytes_would_disturb_stay(rng, monkeypatch):
    model = NETS["plain"]()
    calibration = torch.rand(16, 3, 10, 10)
    monkeypatch.setattr(quantize, "LIMIT", 0.0)
    ensemble = int8(model, calibration, seed=1, draws=2)
    assert not ensemble.quantization.quantized
    assert all("of its own noise (limit 0.0)" in ensemble.quantization.kept[name] for name in noise_layers(model))
    x = torch.rand(3, 3, 10, 10)
    plain = rse_fast.Ensemble(model, 2, seed=1, dtype=ensemble.prepared(x).runner.dtype, algorithm="direct")
    assert torch.allclose(ensemble.predict(x).probs, plain.predict(x).probs, rtol=0, atol=1e-5)
    assert ensemble.rows(x) == plain.rows(x)  # a packed batch of bytes has more
    monkeypatch.undo()
    assert int8(NETS["plain"](), calibration, seed=1, draws=2).rows(x) == 2 * plain.rows(x)


@pytest.mark.skipif(not convolution.byte_forms(), reason="a processor without AVX-512 VNNI")
def test_which_form_runs_is_a_rule_of_the_layer(rng, monkeypatch):
    """Channels and the limit decide, and no measurement: what an image gets does not depend on how busy the machine was."""
    model, calibration, (two,) = NETS["wide"](), torch.rand(24, 3, 10, 10), convolution.byte_forms()

    def chosen(limit=0.5):
        monkeypatch.setattr(quantize, "LIMIT", limit)
        ensemble = int8(model, calibration, draws=2)
        return ensemble.quantization.quantized, ensemble.algorithms

    errors, found = chosen()
    assert found["3"] == (str(two), "in int8, a layer of 48 channels or more")
    assert found["0"].algorithm == "direct" and "is faster for layers of 48 channels or more alone" in found["0"].why
    direct = int8(model, calibration, draws=2, algorithm="direct").quantization.quantized["3"]
    assert direct < errors["3"]
    errors, found = chosen(math.sqrt(direct * errors["3"]))
    assert errors["3"] == direct and found["3"].algorithm == "direct" and f"the error of {two} would be" in found["3"].why
    monkeypatch.undo()
    ensemble = int8(model, calibration, draws=2, algorithm="winograd")
    assert "0" in ensemble.quantization.quantized
    assert ensemble.algorithms["0"] == (str(two), "in int8, as asked for")


def test_winograd_is_refused_in_int8_where_there_is_none(unit):
    if convolution.byte_forms():
        pytest.skip("it has it")
    with pytest.raises(ValueError, match="algorithm must be 'auto' or 'direct' here.*AVX-512 VNNI"):
        int8(NETS["plain"](), torch.rand(2, 3, 10, 10), algorithm="winograd")


def test_noise_switched_off_layers_stay_and_the_model_is_left_alone(rng):
    model = NETS["plain"]()
    before = copy.deepcopy(model.state_dict())
    layers = noise_layers(model)
    layers["3"].noise_enabled = False
    ensemble = int8(model, torch.rand(16, 3, 10, 10))
    assert "no noise" in ensemble.quantization.kept["3"]
    layers["3"].noise_enabled = True  # renews the snapshot
    assert "3" in ensemble.quantization.quantized
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(layers["3"]) is NoisyConv2d and layers["3"].noise_enabled


@algorithms()
def test_the_same_seed_gives_the_same_bits_and_chunks_change_nothing(algorithm, rng):
    model, x = NETS["residual"](), torch.rand(7, 3, 10, 10)
    calibration = torch.rand(16, 3, 10, 10)
    whole, parts = (int8(model, calibration, seed=2, max_rows=rows, algorithm=algorithm) for rows in (None, 6))
    a, b = whole.predict(x), parts.predict(x)
    assert torch.equal(a.probs, whole.predict(x).probs)
    assert (a.probs - b.probs).abs().max() < 1e-3 and torch.equal(a.votes.sum(1), b.votes.sum(1))


# --------------------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "calibration must give batches of images .* got None"),
        ({"calibration": []}, ValueError, "calibration must give at least one image, got none"),
        ({"calibration": torch.rand(0, 3, 10, 10)}, ValueError, "calibration must give at least one image, got none"),
        ({"calibration": torch.rand(3, 10, 10)}, ValueError, r"calibration must give batches \[N, C, H, W\] .* got \(3, 10, 10\)"),
        ({"calibration": [torch.rand(1, 3, 4, 4), torch.rand(1, 3, 5, 5)]}, ValueError, "of one image shape, got"),
        ({"calibration": torch.zeros(1, 3, 10, 10).byte()}, TypeError, "calibration must give floating-point tensors .* torch.uint8"),
        ({"calibration": torch.rand(1, 3, 10, 10, device="meta")}, TypeError, "calibration must give dense tensors with data, got .* meta"),
        ({"calibration": [torch.rand(1, 3, 10, 10).to_sparse()]}, TypeError, "calibration must give dense tensors .* got torch.sparse_coo"),
        ({"calibration": 4}, TypeError, "calibration must be an iterable of batches of images .* got int"),
        ({"calibration": {"train": torch.rand(1, 3, 10, 10)}}, TypeError, "calibration must be an iterable .* got dict"),
        ({"calibration": ["x"]}, TypeError, "calibration must give floating-point tensors .* got str"),
        ({"calibration": torch.full((1, 3, 10, 10), math.nan)}, ValueError, "calibration must give finite images"),
        ({"calibration": torch.rand(1, 3, 10, 10), "fuse": False}, ValueError, "fuse must be True for dtype 'int8'"),
        ({"calibration": torch.rand(1, 3, 10, 10), "dtype": "float32"}, ValueError, "calibration is for dtype 'int8' alone"),
    ],
)  # fmt: skip
def test_bad_calibration(options, error, message):
    with pytest.raises(error, match=message):
        rse_fast.Ensemble(NETS["plain"](), 2, **{"dtype": "int8", **options})


def test_calibration_of_another_shape_or_for_another_model(rng):
    ensemble = int8(NETS["plain"](), torch.rand(4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"calibration must have images of the shape of x, \(3, 10, 10\), got \(3, 8, 8\)"):
        ensemble.predict(torch.rand(2, 3, 10, 10))
    for channels in (1, 2, 4):
        ensemble = int8(NETS["plain"](), torch.rand(4, channels, 10, 10))
        with pytest.raises(
            ValueError, match=rf"^calibration must be \[N, C, H, W\] with C = 3 channels, got shape \(4, {channels}, 10, 10\)"
        ):
            ensemble.quantization  # noqa: B018
        with pytest.raises(
            ValueError, match=rf"^calibration must have images of the shape of x, \(3, 10, 10\), got \({channels}, 10, 10\)"
        ):
            ensemble.predict(torch.rand(1, 3, 10, 10))
        with pytest.raises(ValueError, match=rf"^x must be \[N, C, H, W\] with C = 3 channels, got shape \(1, {channels}, 10, 10\)"):
            ensemble.predict(torch.rand(1, channels, 10, 10))


@algorithms()
def test_a_gradient_is_refused_with_a_way_out(algorithm, rng):
    ensemble = int8(NETS["plain"](), torch.rand(8, 3, 10, 10), draws=2, algorithm=algorithm)
    x = torch.rand(1, 3, 10, 10, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradient: call it under torch.no_grad.*'float32' or 'bfloat16'"):
        ensemble(x)
    assert not ensemble(x.detach()).requires_grad and ensemble.predict(x).labels.shape == (1,)
    with torch.no_grad():
        assert ensemble(x).shape == (1, 5)


# --------------------------------------------------------------------------------------------------------------------------- real images
def test_trained_on_digits_int8_agrees_with_float32(rng):
    splits = data.digits()
    torch.manual_seed(0)
    net = rse_fast.convert(SmallNet(10, in_channels=1, width=16), 0.2, 0.1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
    for epoch in range(4):
        for images, labels in data.shuffled(splits.train, 64, seed=0, epoch=epoch):
            loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    images = splits.test.images.float() / 255
    floats = rse_fast.Ensemble(net, 10, seed=4, dtype="float32")
    want = floats.predict(images)
    sample_ids = torch.stack([torch.arange(100), torch.zeros(100, dtype=torch.int64)], 1)
    shares = floats.logits_at(images[:100], sample_ids, 10, torch.tensor(4)).softmax(-1)
    deviation = shares.std(0).mean().item() / 10  # of a mean of 100 draws
    right = (want.labels == splits.test.labels).float().mean().item()
    assert right > 0.85
    for algorithm in ("direct", "winograd") if convolution.byte_forms() else ("direct",):
        bytes_ = int8(net, splits.val.images.float() / 255, seed=4, algorithm=algorithm)
        assert len(bytes_.quantization.quantized) == 7
        got = bytes_.predict(images)
        accuracy, off = (got.labels == splits.test.labels).float().mean().item(), (got.probs - want.probs).abs().mean().item()
        print(f"{algorithm}: accuracy {right}, {accuracy}, mean difference {off:.2g}, standard error {deviation:.2g}")
        assert abs(accuracy - right) <= 0.004  # two of 540 images
        assert (got.labels == want.labels).float().mean() >= 0.995
        assert 0 < off < deviation
