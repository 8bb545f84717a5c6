"""The layers: construction, noise in both modes, seeds, sigma through every conversion, state, and the scope."""

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rse_fast
from rse_fast import functional
from rse_fast.context import NoiseContext
from rse_fast.nn import GaussianNoise, NoisyConv1d, NoisyConv2d, NoisyConv3d, NoisyLinear, number_layers

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = [  # class, plain class, arguments, options, shape of one sample
    (NoisyConv1d, nn.Conv1d, (3, 4, 3), {"padding": 1}, (3, 9)),
    (NoisyConv2d, nn.Conv2d, (3, 4, 3), {}, (3, 8, 7)),
    (NoisyConv2d, nn.Conv2d, (4, 6, (3, 2)), {"stride": (2, 1), "dilation": (1, 2), "groups": 2, "bias": False}, (4, 9, 8)),
    (NoisyConv2d, nn.Conv2d, (3, 4, (2, 3)), {"padding": "same"}, (3, 8, 7)),
    (NoisyConv2d, nn.Conv2d, (3, 4, 3), {"padding": "valid"}, (3, 8, 7)),
    (NoisyConv2d, nn.Conv2d, (3, 4, 3), {"padding": (1, 2), "padding_mode": "circular"}, (3, 8, 7)),
    (NoisyConv2d, nn.Conv2d, (3, 4, 3), {"padding": 1, "padding_mode": "reflect"}, (3, 8, 7)),
    (NoisyConv3d, nn.Conv3d, (2, 3, 2), {"padding": 1}, (2, 4, 5, 6)),
    (NoisyLinear, nn.Linear, (7, 5), {}, (7,)),
    (NoisyLinear, nn.Linear, (7, 5), {"bias": False}, (4, 7)),
]
IDS = [f"{cls.__name__} {args} {options}" for cls, _, args, options, _ in LAYERS]
ignore = "ignore:Using padding='same' with even kernel"  # said by the plain layer
every_layer = pytest.mark.parametrize(("cls", "plain_cls", "args", "options", "shape"), LAYERS, ids=IDS)


def ambient_noise(x, sigma, channel_dim=1):
    """The noisy input of a layer whose seed is the next that torch's generator gives."""
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    return functional.add_noise(x, sigma, seed=seed, channel_dim=channel_dim)


# ------------------------------------------------------------------------------------------------------------------- what they compute
@pytest.mark.filterwarnings(ignore)
@every_layer
def test_a_layer_is_the_plain_one_of_a_noisy_input(cls, plain_cls, args, options, shape, rng):
    layer, plain = cls(*args, sigma=0.3, **options), plain_cls(*args, **options)
    assert isinstance(layer, plain_cls) and layer.sigma == torch.tensor(0.3)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, *shape)
    for sigma in (0.3, torch.rand(args[0])):
        layer.sigma = torch.as_tensor(sigma)
        for mode in (layer.train, layer.eval):
            mode()
            torch.manual_seed(5)
            y = layer(x)
            torch.manual_seed(5)
            assert torch.equal(y, plain(ambient_noise(x, sigma, layer.channel_dim)))
            assert not torch.equal(layer(x), y)  # fresh noise at every call
            torch.manual_seed(5)
            assert torch.equal(layer(x), y)


@pytest.mark.filterwarnings(ignore)
@every_layer
def test_the_switch_gives_the_plain_layer_bit_for_bit(cls, plain_cls, args, options, shape, rng):
    layer, plain = cls(*args, sigma=0.3, **options), plain_cls(*args, **options)
    layer.load_state_dict(plain.state_dict())
    layer.noise_enabled = False
    inputs = (torch.randn(3, *shape), torch.randn(shape), torch.randn(0, *shape))
    state = torch.get_rng_state()
    for x in inputs:
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(torch.get_rng_state(), state)  # and no seed is drawn
    layer.noise_enabled = True
    assert not torch.equal(layer(inputs[0]), plain(inputs[0]))


@every_layer
def test_inputs_without_a_batch_and_empty_batches(cls, plain_cls, args, options, shape, rng):
    layer, x = cls(*args, sigma=torch.rand(args[0]), **options), torch.randn(shape)
    if len(shape) > 1 and cls is NoisyLinear:
        return  # its first dimension is the batch, whatever it is
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert torch.equal(y, layer(x[None])[0])
    assert layer(torch.randn(0, *shape)).shape == (0, *y.shape)


def test_gaussian_noise(rng):
    for channel_dim, channels in ((1, 5), (-1, 6), (2, 4)):
        for sigma in (0.3, torch.rand(channels)):
            layer = GaussianNoise(sigma, channel_dim=channel_dim)
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                for x in (torch.randn(2, 5, 4, 6, dtype=dtype), torch.randn(2, 4, 6, 5, dtype=dtype).permute(0, 3, 1, 2)):
                    y = layer.eval()(x)
                    assert y.dtype == dtype and y.shape == x.shape
                    assert y.stride() == x.stride() or channel_dim != 1
                    assert (y != x).any()
    assert not list(layer.parameters()) and not layer.state_dict()
    layer.noise_enabled = False
    assert layer(x) is x


def test_representation_names_sigma(rng):
    assert repr(NoisyConv2d(3, 4, 3, sigma=0.25)) == "NoisyConv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), sigma=0.25)"
    assert repr(NoisyLinear(2, 3, sigma=torch.tensor([0.25, 1.5]))).endswith("bias=True, sigma=[0.25 .. 1.5])")
    assert repr(GaussianNoise(0.5)) == "GaussianNoise(sigma=0.5, channel_dim=1)"


def test_bad_sigma_is_refused_at_construction():
    for bad in (-0.1, float("nan"), torch.tensor([0.1, -1.0]), torch.tensor(1), "0.1", None, True):
        for make in (lambda s: NoisyConv2d(2, 3, 3, sigma=s), lambda s: NoisyLinear(2, 3, sigma=s), GaussianNoise):
            with pytest.raises((ValueError, TypeError), match="^sigma must be "):
                make(bad)


# ------------------------------------------------------------------------------------------------------------------- sigma and state
SIGMA = 0.1234567  # not a bfloat16, nor a float16


@pytest.mark.parametrize("learnable", (False, True))
def test_sigma_stays_float32_through_every_conversion(learnable, rng):
    layer = rse_fast.convert(nn.Conv2d(3, 4, 3), SIGMA, SIGMA, learnable=learnable)
    expected = layer.current_sigma().detach().clone()
    assert abs(expected - SIGMA) < 1e-7
    x = torch.randn(2, 3, 8, 8)
    for convert, dtype in (
        (layer.half, torch.float16),
        (layer.bfloat16, torch.bfloat16),
        (layer.double, torch.float64),
        (lambda: layer.to(torch.bfloat16), torch.bfloat16),
        (lambda: layer.to("cpu", torch.float32), torch.float32),
        (lambda: layer.to(memory_format=torch.channels_last), torch.float32),
    ):
        convert()
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.current_sigma().detach(), expected) and layer.current_sigma().dtype == torch.float32
        layer.zero_grad()
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert layer.weight.grad.dtype == dtype
        if learnable:
            assert layer.sigma_raw.grad.dtype == torch.float32 and layer.sigma_raw.grad.isfinite()
        layer.zero_grad()
    if not learnable:
        assert layer.to("meta").sigma.device.type == "meta"


@pytest.mark.parametrize("learnable", (False, True))
def test_copies_and_pickles(learnable, rng):
    layer = rse_fast.convert(nn.Conv2d(3, 4, 3), 0.3, 0.3, learnable=learnable)
    x = torch.randn(2, 3, 8, 8)

    def run(module):
        torch.manual_seed(3)
        return module(x)

    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert type(other) is type(layer) and torch.equal(run(other), run(layer))
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in layer.parameters()}
    state = pickle.loads(pickle.dumps(layer.state_dict()))
    fresh = rse_fast.convert(nn.Conv2d(3, 4, 3), 0.3, 0.3, learnable=learnable)
    fresh.load_state_dict(state)
    assert torch.equal(run(fresh), run(layer))


def test_state_dicts_go_both_ways(rng):
    noisy, plain = NoisyConv2d(3, 4, 3, sigma=0.3), nn.Conv2d(3, 4, 3)
    assert list(noisy.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(noisy.state_dict())
    assert torch.equal(plain.weight, noisy.weight)
    noisy.load_state_dict(nn.Conv2d(3, 4, 3).state_dict())
    assert noisy.sigma == torch.tensor(0.3)
    learnable = rse_fast.convert(nn.Conv2d(3, 4, 3), 0.3, 0.3, learnable=True)
    assert set(learnable.state_dict()) == {"weight", "bias", "sigma_raw"}
    before = learnable.current_sigma().detach().clone()
    learnable.load_state_dict(plain.state_dict())  # strict: a plain checkpoint leaves sigma as it is
    assert torch.equal(learnable.weight, plain.weight) and torch.equal(learnable.current_sigma(), before)
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        learnable.load_state_dict({"bias": plain.bias})
    with pytest.raises(RuntimeError, match="Unexpected key.*sigma_raw"):
        plain.load_state_dict(learnable.state_dict())


def test_learnable_sigma_starts_where_asked_and_stays_positive(rng):
    for sigma in (1e-6, 1e-3, 0.1, 1.0, 30.0):
        layer = rse_fast.convert(nn.Conv2d(3, 4, 3), sigma, sigma, learnable=True)
        # softplus of its inverse: each rounds once, and the inverse's rounding counts |raw| times
        assert abs(layer.current_sigma().item() - sigma) <= sigma * 2.0**-23 * (2 + layer.sigma_raw.abs().item())
    layer = rse_fast.convert(nn.Conv2d(3, 4, 3), 0.05, 0.05, learnable=True)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(20):
        optimiser.zero_grad()
        layer.current_sigma().backward()  # pushes sigma down only
        optimiser.step()
    assert 0 < layer.current_sigma() < 0.05
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="sigma"):
            rse_fast.convert(nn.Conv2d(3, 4, 3), bad, bad, learnable=True)


def test_gradient_of_learnable_sigma_against_finite_differences(rng):
    layer = rse_fast.convert(nn.Conv2d(3, 4, 3), 0.2, 0.2, learnable=True).double()
    x, seed = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor(5)

    def loss():
        with NoiseContext(seed, images=2, draws=3):
            return layer(x).sin().sum()

    loss().backward()
    raw, slopes = layer.sigma_raw.data.clone(), []
    for step in (2.0**-8, 2.0**-9):
        ends = []
        for shift in (-step, step):
            layer.sigma_raw.data = raw + shift
            ends.append((loss().item(), layer.current_sigma().item()))  # the float32 sigma that the layer really used
        (low, s_low), (high, s_high) = ends
        slopes.append((high - low) / (s_high - s_low) * torch.sigmoid(raw).item())
    # The error of a central difference falls with the square of the step: that of the second is a third of their difference.
    error = abs(slopes[0] - slopes[1]) + 2.0**-22 * abs(slopes[1])  # sigmoid and the gradient are float32
    assert abs(layer.sigma_raw.grad.item() - slopes[1]) <= error < 0.01 * abs(slopes[1]) + 0.01


# ------------------------------------------------------------------------------------------------------------------------------ training
@pytest.mark.usefixtures("gradients_of_small_inputs")
@pytest.mark.parametrize("reentrant", (True, False))
@every_layer
def test_activation_checkpointing_gives_the_same_gradients(cls, plain_cls, args, options, shape, reentrant, rng):
    first, second = cls(*args, sigma=0.3, **options), GaussianNoise(0.2)
    x = torch.randn(3, *shape, requires_grad=True)
    leaves = (x, *first.parameters())

    def gradients(run):
        torch.manual_seed(9)
        return torch.autograd.grad(run(x).sin().sum(), leaves) if not reentrant else backward(run)

    def backward(run):  # the reentrant form knows .backward() only
        for leaf in leaves:
            leaf.grad = None
        run(x).sin().sum().backward()
        return [leaf.grad.clone() for leaf in leaves]

    def model(x):
        return second(first(x))

    expected = gradients(model)
    replayed = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(expected, replayed, strict=True))


def test_a_small_network_holds_what_the_plain_one_holds(rng):
    def network(conv):
        return nn.Sequential(
            conv(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.MaxPool2d(2), conv(16, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10),
        )  # fmt: skip

    def held(model, x):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        return sum(storage.nbytes() for storage in storages.values())

    x = torch.randn(8, 3, 16, 16)
    assert held(network(NoisyConv2d), x) <= held(network(nn.Conv2d), x) + 3 * 12  # a sigma and a seed a layer


# ---------------------------------------------------------------------------------------------------------------- NoiseContext
@pytest.fixture
def model():
    layers = nn.Sequential(NoisyConv2d(3, 4, 3, padding=1), nn.ReLU(), GaussianNoise(0.2), nn.Flatten(), NoisyLinear(4 * 25, 5))
    number_layers(layers)
    return layers


def test_a_scope_gives_each_layer_its_stream(model, rng):
    x, seed = torch.randn(2, 3, 5, 5), torch.tensor(77)
    state = torch.get_rng_state()
    with NoiseContext(seed, images=2, draws=3, image_offset=4, draw_offset=5):
        y = model(x)
    assert torch.equal(torch.get_rng_state(), state)
    address = {"seed": 77, "images": 2, "draws": 3, "image_offset": 4, "draw_offset": 5}
    conv, noise, linear = model[0], model[2], model[4]
    h = functional.noisy_conv2d(x, conv.weight, conv.bias, conv.sigma, padding=1, stream=0, **address).relu()
    h = functional.add_noise(h, noise.sigma, stream=1, **address).flatten(1)
    assert torch.equal(y, functional.noisy_linear(h, linear.weight, linear.bias, linear.sigma, stream=2, **address))
    assert [conv.stream, noise.stream, linear.stream] == [0, 1, 2] and y.shape == (6, 5)


def test_a_scope_takes_places_and_a_backend(model, library, rng):
    x, sample_ids = torch.randn(2, 3, 5, 5), torch.tensor([[9, 1], [3, 6]])
    results = {}
    for backend in ("cpu", "torch"):
        with NoiseContext(torch.tensor(77), images=2, draws=2, sample_ids=sample_ids, backend=backend):
            results[backend] = model(x).detach()
    for i, (image, draw) in enumerate(sample_ids.tolist()):
        with NoiseContext(torch.tensor(77), images=1, draws=2, image_offset=image, draw_offset=draw):
            assert torch.allclose(model(x[i : i + 1]), results["cpu"][i::2], atol=1e-5)
    assert torch.allclose(results["cpu"], results["torch"], atol=1e-5) and not torch.equal(results["cpu"], results["torch"])


def test_a_layer_called_twice_in_a_scope_gets_other_noise(rng):
    layer, x = GaussianNoise(1.0), torch.zeros(2, 3, 5)
    with NoiseContext(torch.tensor(1), images=2):
        first, second = layer(x), layer(x)
    with NoiseContext(torch.tensor(1), images=2):
        assert torch.equal(layer(x), first) and torch.equal(layer(x), second)
    assert torch.equal(second, functional.add_noise(x, 1.0, seed=1, stream=1 << 16)) and not torch.equal(first, second)


def test_scopes_nest_and_end_with_exceptions(rng):
    layer, x = GaussianNoise(1.0), torch.zeros(2, 3, 5)
    one, two = (functional.add_noise(x, 1.0, seed=seed) for seed in (1, 2))
    with NoiseContext(torch.tensor(1), images=2):
        with pytest.raises(KeyError), NoiseContext(torch.tensor(2), images=2):
            assert torch.equal(layer(x), two)
            raise KeyError
        assert torch.equal(layer(x), one)
    assert not torch.equal(layer(x), layer(x))  # the generator's seeds again


def test_threads_do_not_disturb_each_other(model, rng):
    x = torch.randn(2, 3, 5, 5)

    def run(seed):
        with torch.no_grad(), NoiseContext(torch.tensor(seed), images=2, draws=2):
            return model(x)

    expected, barrier, wrong = [run(seed) for seed in range(4)], threading.Barrier(4), []

    def work(seed):
        torch.set_num_threads(1)  # a setting of the thread
        barrier.wait()
        wrong.extend(seed for _ in range(50) if not torch.equal(run(seed), expected[seed]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_rows_that_are_no_batch_are_an_error(rng):
    layer = GaussianNoise(1.0)
    with NoiseContext(torch.tensor(1), images=4, draws=3):
        for rows in (4, 12):
            assert layer(torch.zeros(rows, 3)).shape == (12, 3)
        for rows in (1, 3, 8, 24):
            with pytest.raises(ValueError, match=f"layer .GaussianNoise. got {rows} rows where 4 images in 3 draws are under way"):
                layer(torch.zeros(rows, 3))


def test_a_scope_silences_the_first_call_of_one_layer(rng):
    model = nn.Sequential(NoisyLinear(4, 4, sigma=0.3), NoisyLinear(4, 4, sigma=0.2))
    number_layers(model)
    x, seed = torch.randn(3, 4), torch.tensor(int(rng.integers(2**62)))
    with NoiseContext(seed, 3, noiseless_stream=0):
        y = model[0](x)
        again, other = model[0](x), model[1](x)
    assert torch.equal(y, nn.functional.linear(x, model[0].weight, model[0].bias))
    with NoiseContext(seed, 3):
        model[0](x)
        assert torch.equal(again, model[0](x)) and torch.equal(other, model[1](x))
    assert not torch.equal(again, y)


@pytest.mark.usefixtures("gradients_of_small_inputs")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointing_inside_a_scope_is_refused_and_around_it_works(model, reentrant, rng):
    x, seed = torch.randn(2, 3, 5, 5), torch.tensor(4)

    def run(x, inside=False):
        with NoiseContext(seed, 2):
            return checkpoint(model, x, use_reentrant=reentrant) if inside else model(x)

    leaves = (x.requires_grad_(), *model.parameters())
    expected = run(x)
    expected.sum().backward()
    gradients = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    y = checkpoint(run, x, use_reentrant=reentrant)
    y.sum().backward()
    assert torch.equal(y, expected) and all(torch.equal(leaf.grad, g) for leaf, g in zip(leaves, gradients, strict=True))
    with pytest.raises(ValueError, match="must not checkpoint activations inside an ensemble"):
        run(x, inside=True)
    with torch.no_grad():
        assert torch.equal(run(x, inside=True), expected)
    model.requires_grad_(False)
    assert torch.equal(run(x.detach(), inside=True), expected)  # no gradient is wanted


# ------------------------------------------------------------------------------------------------------ sigma where weights come late
LATE = {
    "to_empty": lambda m, state: m.to_empty(device="cpu"),
    "meta, to_empty": lambda m, state: m.to("meta").to_empty(device="cpu"),
    "meta, to_empty, load": lambda m, state: m.to("meta").to_empty(device="cpu").load_state_dict(state, strict=False),
    "meta, half, to_empty": lambda m, state: m.to("meta").half().to_empty(device="cpu").float(),
    "load, assigned": lambda m, state: m.load_state_dict(state, strict=False, assign=True),
    "meta, load, assigned": lambda m, state: m.to("meta").load_state_dict(state, strict=False, assign=True),
    "a copy of a meta module": lambda m, state: copy.deepcopy(m.to("meta")).to_empty(device="cpu"),
}


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("kind", ["fixed", "learnable", "per channel", "plain checkpoint"])
def test_sigma_survives_late_initialisation(late, kind, rng):
    """No state dict has a fixed sigma, and a plain model's has none at all."""
    sigma = torch.rand(3) + 0.1 if kind == "per channel" else float(rng.uniform(0.1, 1))
    model = nn.Sequential(NoisyConv2d(3, 4, 1, sigma=sigma), NoisyLinear(2, 2, sigma=0.3), GaussianNoise(0.7))
    if kind in ("learnable", "plain checkpoint"):
        model[0] = nn.Conv2d(3, 4, 1)
        model[0].__class__ = NoisyConv2d
        model[0].init_noise(sigma, learnable=True)
    state = {k: v.clone() for k, v in model.state_dict().items() if kind != "plain checkpoint" or "sigma" not in k}
    expected = [layer.current_sigma().detach().clone() for layer in model]
    got = LATE[late](model, state)
    got = got if isinstance(got, nn.Module) else model
    assert all(torch.equal(layer.current_sigma(), e) for layer, e in zip(got, expected, strict=True))
    assert all(layer.current_sigma().dtype == torch.float32 for layer in got)
    assert all("_remembered_sigma" not in vars(layer) for layer in got)
    got[2].set_sigma(0.1)
    assert got.float()[2].sigma == torch.tensor(0.1)


@pytest.mark.parametrize("learnable", [False, True, "channel"])
def test_sigma_may_be_set_and_told_on_the_meta_device(learnable):
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), 0.25, 0.125, learnable=learnable).to("meta")
    rse_fast.set_sigma(model, 0.5, 0.75)
    expected = [0.5, 0.75] if learnable != "channel" else [[0.5] * 3, [0.75] * 4]
    for _ in range(2):
        assert np.allclose(np.hstack([layer.sigma for layer in rse_fast.describe(model).layers]), np.hstack(expected))
        assert "sigma=0.5" in repr(model) or "sigma=[0.5" in repr(model)
        model.to_empty(device="cpu")


def test_sigma_that_was_never_there_is_told():
    file = io.BytesIO()
    torch.save(rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 1)), 0.25), file)
    file.seek(0)
    model = torch.load(file, map_location="meta", weights_only=False)
    assert "sigma unknown" in repr(model)
    for call in (rse_fast.describe, lambda m: copy.deepcopy(m).to_empty(device="cpu")):
        with pytest.raises(ValueError, match="sigma must have a value, got a tensor on the meta device"):
            call(model)
    assert rse_fast.set_sigma(model, 0.5).to_empty(device="cpu")[0].sigma == 0.5


def test_a_learnable_sigma_stays_where_tensors_are_swapped(monkeypatch):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 1)), 0.25, learnable=True)
    assert abs(model.to("meta").to_empty(device="cpu")[0].current_sigma().item() - 0.25) < 1e-6


def test_sigma_of_layers_made_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(NoisyConv2d(3, 4, 1, sigma=0.3), GaussianNoise(0.7))
    assert model[0].sigma.is_meta and model[1].sigma.is_meta
    model.to_empty(device="cpu")
    assert [layer.sigma.item() for layer in model] == [torch.tensor(v).item() for v in (0.3, 0.7)]


def test_sigma_without_data_says_so():
    noise = GaussianNoise(0.7).to("meta")
    with pytest.raises(ValueError, match="sigma must have data, got a tensor on the meta device"):
        noise(torch.rand(2, 3))


NO_BATCHES = [
    ([1.0], TypeError, "x must be a tensor, got list"), (None, TypeError, "x must be a tensor, got NoneType"),
    (torch.tensor(1.0), ValueError, r"x must have at least 2 dimensions, got shape \(\)"),
    (torch.zeros(2, 3).to_sparse(), TypeError, "x must be a dense tensor, got layout torch.sparse_coo"),
]  # fmt: skip


@pytest.mark.parametrize("value, error, message", NO_BATCHES)
def test_a_layer_says_what_is_no_batch(value, error, message):
    for layer in (NoisyConv2d(3, 4, 1), NoisyLinear(3, 4), GaussianNoise(0.1), GaussianNoise(0.1, channel_dim=-1)):
        with pytest.raises(error, match=message):
            layer(value)


def test_a_layer_names_weights_of_another_dtype():
    for layer, shape in ((NoisyConv2d(3, 4, 1), (2, 3, 5, 5)), (NoisyLinear(3, 4), (2, 3))):
        with pytest.raises(TypeError, match="weight must be float64 as x is, got float32"):
            layer(torch.zeros(shape).double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.zeros(shape)).dtype == torch.bfloat16


def transposed(sigma=0.1):
    return rse_fast.convert(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, padding=2)), sigma)[0]


MAKE = {
    "convolution": lambda: NoisyConv2d(4, 6, 3), "padded by pixels": lambda: NoisyConv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "transposed": transposed, "linear": lambda: NoisyLinear(4, 6),
}  # fmt: skip
CONVOLUTIONS, ALL = ("convolution", "padded by pixels", "transposed"), tuple(MAKE)
X = torch.zeros(2, 4, 8, 8)


def parameter(name, change):
    """Sets a parameter of a layer to what ``change`` makes of it."""
    return lambda layer: setattr(layer, name, nn.Parameter(change(getattr(layer, name).data)))


def sparse_weight(layer):
    value = layer.weight.data.to_sparse()
    del layer.weight
    layer.weight = value


REFUSED = [  # layers, what is done to one, what is done to images [2, 4, 8, 8] or features [2, 4], the error
    (ALL, None, lambda x: x.double(), TypeError, "weight must be float64 as x is, got float32"),
    (ALL, None, lambda x: x.long(), TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
    (ALL, None, lambda x: torch.nested.nested_tensor([x[0], x[0]]), TypeError, "x must be a dense tensor, got a nested one"),
    (ALL, None, lambda x: x.to_mkldnn(), TypeError, "x must be a dense tensor, got layout torch._mkldnn"),
    (ALL, parameter("weight", torch.Tensor.double), None, TypeError, "weight must be float32 as x is, got float64"),
    (ALL, parameter("bias", torch.Tensor.double), None, TypeError, "bias must be float32 as x is, got float64"),
    (ALL, parameter("bias", lambda b: b[:3]), None, ValueError, r"bias must be None or a tensor \[6\], got torch.float32 of shape \(3,\)"),
    (ALL, parameter("weight", lambda w: w.to("meta")), None, ValueError, "weight must have data, got .* on the meta device for x on cpu"),
    (ALL, parameter("bias", lambda b: b.to("meta")), None, ValueError, "bias must have data, got a tensor on the meta device for x on cpu"),
    (("linear",), sparse_weight, None, TypeError, "weight must be a dense tensor, got layout torch.sparse_coo"),
    (("linear",), parameter("weight", lambda w: w[:, :3]), None, ValueError, r"x must have weight.shape\[1\] = 3 features .* \(2, 4\)"),
    (("linear",), None, lambda x: x[..., :3], ValueError, r"x must have weight.shape\[1\] = 4 features .* got shape \(2, 3\)"),
    (CONVOLUTIONS, sparse_weight, None, TypeError, "weight must be a dense tensor, got layout torch.sparse_coo"),
    (CONVOLUTIONS[:2], None, lambda x: x[:, :3], ValueError, r"x must have .* = 4 channels, got shape \(2, 3, 8, 8\)"),
    (CONVOLUTIONS[:2], parameter("weight", lambda w: w[:, :1]), None, ValueError, r"x must have .* = 1 channels, got shape \(2, 4, 8, 8\)"),
    (CONVOLUTIONS[:2], {"groups": 3}, None, ValueError, r"x must have weight.shape\[1\] \* groups = 4 \* 3 = 12 channels, got shape"),
    (CONVOLUTIONS[:2], {"groups": 4}, None, ValueError, "groups must divide the 6 output channels of weight, got 4"),
    (CONVOLUTIONS[:2], {"dilation": (9, 9)}, None, ValueError, r"x must be as large as the kernel's reach \[19, 19\] less its padding"),
    (CONVOLUTIONS, {"stride": (0, 0)}, None, ValueError, r"stride must be an integer >= 1 or 2 of them, got \(0, 0\)"),
    (CONVOLUTIONS, {"dilation": (0, 1)}, None, ValueError, r"dilation must be an integer >= 1 or 2 of them, got \(0, 1\)"),
    (("convolution", "transposed"), {"padding": (-1, 0)}, None, ValueError, r"padding must be an integer >= 0 or 2 of them, got \(-1, 0\)"),
    (("convolution",), None, lambda x: x[:, :, :2], ValueError, r"x must be as large as .* reach \[3, 3\] .* got shape \(2, 4, 2, 8\)"),
    (("convolution",), None, lambda x: x[0, :3], ValueError, r"x must have 4 dimensions, got shape \(3, 8, 8\)"),
    (("padded by pixels",), None, lambda x: x[:, :, :2], ValueError, r"x must be larger than its padding \[2, 2\] of mode 'reflect', got"),
    (("transposed",), None, lambda x: x[:, :3], ValueError, r"x must have weight.shape\[0\] = 4 channels, got shape \(2, 3, 8, 8\)"),
    (("transposed",), None, lambda x: x[:, :, :1], ValueError, r"x must be large enough .* got shape \(2, 4, 1, 8\) for one of \[-1, 6\]"),
    (("transposed",), {"groups": 3}, None, ValueError, "groups must divide the 4 input channels of weight, got 3"),
]  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("names", "spoil", "change", "error", "message"), REFUSED, ids=[f"{i} {r[4][:40]}" for i, r in enumerate(REFUSED)])
def test_what_torch_would_not_take_is_named(names, spoil, change, error, message, grad):
    for name in names:
        layer, x = MAKE[name](), X if name != "linear" else X[:, :, 0, 0]
        for key, value in (spoil if isinstance(spoil, dict) else {}).items():
            setattr(layer, key, value)
        if callable(spoil):
            spoil(layer)
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            layer(x if change is None else change(x))


def test_the_reason_that_torch_gives_is_kept_where_the_arguments_are_right(monkeypatch):
    """Memory that ran out, or a forward of somebody's own, is nobody's wrong argument."""

    class Own(nn.Conv2d):
        def forward(self, x):
            raise RuntimeError("of my own")

    own = rse_fast.convert(nn.Sequential(Own(4, 6, 3)))[0]
    with pytest.raises(RuntimeError, match="of my own"):
        own(X[:, :, :1])
    full = MAKE["padded by pixels"]()
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        full(X)


def test_one_sample_for_a_transposed_convolution_has_the_sigma_of_its_channels(rng):
    """A sigma a channel on one sample [C, H, W] without a batch dimension; as many lines as channels."""
    layer = transposed()
    layer.sigma = torch.tensor([0.0, 0.0, 1.0, 0.0])
    layer.weight.data[2] = 0  # what the one noisy channel goes to
    x = torch.randn(4, 4, 5)
    torch.testing.assert_close(layer(x), nn.functional.conv_transpose2d(x, layer.weight, layer.bias, padding=2))
