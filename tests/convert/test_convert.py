"""convert, revert, describe, noise_off: what changes and what must not."""

import copy
import io
import pickle

import pytest
import torch
from module_state import assert_unchanged, fingerprint
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import rse_fast
from rse_fast import functional
from rse_fast.context import NoiseContext
from rse_fast.nn import NoisyConv1d, NoisyConv2d, NoisyConv3d, NoisyInput, NoisyLinear, noise_layers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]


# ------------------------------------------------------------------------------------------------------------------------ models
class GainConv(nn.Conv2d):
    """A subclass whose own forward takes more than the input."""

    def forward(self, input, gain=1.0, *, offset=0.0):
        return super().forward(input) * gain + offset


class StandardisedConv(nn.Conv2d):
    """A subclass that only replaces what happens inside the convolution."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class PaddedConv(GainConv):
    """A subclass of a subclass, which pads by itself."""

    def forward(self, input, *args, **kwargs):
        return super().forward(nn.functional.pad(input, (1, 1, 1, 1)), *args, **kwargs)


class DoubleLinear(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Block(nn.Module):
    """A residual block with a 1x1 shortcut. Defined out of order: the shortcut first."""

    def __init__(self, channels, out):
        super().__init__()
        self.shortcut = nn.Conv2d(channels, out, 1, stride=2, bias=False)
        self.conv1 = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, groups=2)

    def forward(self, x):
        return self.conv2(self.bn1(self.conv1(x)).relu()) + self.shortcut(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU())
        self.stages = nn.ModuleDict({"one": Block(4, 6), "two": nn.Sequential(Block(6, 8), nn.Identity())})
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.stages["two"](self.stages["one"](self.stem(x))).mean((2, 3)))


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(3, 4, 3),
    "no bias": lambda: nn.Conv2d(3, 4, 3, bias=False),
    "1x1": lambda: nn.Conv2d(3, 4, 1),
    "strided": lambda: nn.Conv2d(3, 4, 3, stride=(2, 1), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2),
    "depthwise": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "same": lambda: nn.Conv2d(3, 4, 3, padding="same"),
    "same, even kernel": lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)),
    "valid": lambda: nn.Conv2d(3, 4, 3, padding="valid"),
    "circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect", stride=2),
    "1-D": lambda: nn.Conv1d(3, 4, 3, padding=1, stride=2),
    "3-D": lambda: nn.Conv3d(3, 4, (1, 3, 2), padding=(0, 1, 1), groups=1),
    "own forward": lambda: GainConv(3, 4, 3),
    "own convolution": lambda: StandardisedConv(3, 4, 3),
    "own padding": lambda: PaddedConv(3, 4, 3),
}
NORMED = {  # name -> (make, take away)
    "weight_norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "spectral_norm": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "old weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
}


def an_input(layer, rows=2):
    spatial = (7, 9) if not hasattr(layer, "kernel_size") else (6, 7, 9)[-len(layer.kernel_size) :]
    return torch.randn(rows, 3, *spatial)


def sigmas(model):
    return {layer.name: round(layer.sigma, 6) for layer in rse_fast.describe(model).layers}


def scoped(model, x, seed):
    with NoiseContext(torch.tensor(seed), len(x)):
        return model(x)


# ------------------------------------------------------------------------------------------------------- what a converted layer is
@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_converted_layer_is_the_plain_one_of_a_noisy_input(make, rng):
    seed = int(rng.integers(2**62))
    # float64, where the two ways to the result differ by nothing worth mentioning
    model = nn.Sequential(make()).double()
    x = an_input(model[0]).double().requires_grad_()
    plain = copy.deepcopy(model)
    keys = {key: value.shape for key, value in model.state_dict().items()}
    clean = plain(x).detach()
    rse_fast.convert(model, 0.3)
    assert isinstance(model[0], NoisyInput) and isinstance(model[0], type(plain[0]))
    assert {key: value.shape for key, value in model.state_dict().items()} == keys

    expected = plain(functional.add_noise(x, model[0].sigma, seed=seed))
    got = scoped(model, x, seed)
    g = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, *plain.parameters()], g)
    grads = torch.autograd.grad(got, [x, *model.parameters()], g)
    terms = model[0].weight[0].numel() + g.numel()  # of the longest sum: the weight's gradient runs over all positions
    for a, b in zip([got, *grads], [expected, *wanted], strict=True):
        assert (a - b).abs().max() <= terms * torch.finfo(torch.float64).eps * b.abs().max()
    assert (got - clean).abs().max() > 0.01

    with rse_fast.noise_off(model):
        assert torch.equal(model(x), clean)


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("learnable", [False, True])
def test_revert_leaves_nothing_behind(make, learnable, rng):
    model = nn.Sequential(make(), nn.ReLU(), nn.Dropout())
    x = an_input(model[0])
    before, clean = fingerprint(model), model.eval()(x)
    model.train()
    assert rse_fast.convert(model, learnable=learnable) is model
    model(x)
    with rse_fast.noise_off(model):
        model(x)
    assert rse_fast.revert(model) is model
    assert_unchanged(model, before)
    assert torch.equal(model.eval()(x), clean)


def test_classes_of_exact_layers():
    model = nn.ModuleList([nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.Linear(1, 1), nn.ConvTranspose2d(1, 1, 1)])
    rse_fast.convert(model)
    assert [type(m) for m in model[:4]] == [NoisyConv1d, NoisyConv2d, NoisyConv3d, nn.Linear]
    assert isinstance(model[4], (rse_fast.nn.NoisyInput, nn.ConvTranspose2d)) and type(model[4]).__name__ == "NoisyConvTranspose2d"
    rse_fast.revert(model)
    rse_fast.convert(model, include=(nn.Linear,))
    assert [type(m) for m in model] == [nn.Conv1d, nn.Conv2d, nn.Conv3d, NoisyLinear, nn.ConvTranspose2d]


def test_extra_arguments_reach_the_subclass(rng):
    plain = PaddedConv(3, 4, 3)
    noisy = rse_fast.convert(copy.deepcopy(plain), 0.0, 0.0)
    x = torch.randn(2, 3, 5, 5)
    expected = plain(x, 3.0, offset=torch.ones(4, 1, 1))
    assert torch.equal(noisy(x, 3.0, offset=torch.ones(4, 1, 1)), expected)
    assert torch.equal(noisy(x, gain=3.0, offset=torch.ones(4, 1, 1)), expected)


@pytest.mark.parametrize("make", [CONVOLUTIONS["plain"], CONVOLUTIONS["reflect"], CONVOLUTIONS["own forward"]])
def test_input_may_be_passed_by_name(make, rng):
    plain = make()
    noisy = rse_fast.convert(copy.deepcopy(plain), 0.0)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(noisy(input=x), plain(input=x))
    linear = rse_fast.convert(nn.Linear(3, 4), 0.0, include=nn.Linear)
    assert torch.equal(linear(input=x[..., :3]), linear(x[..., :3]))


def test_linear_subclass_takes_features_as_channels(rng):
    seed = int(rng.integers(2**62))
    plain = DoubleLinear(6, 3).double()
    noisy = rse_fast.convert(copy.deepcopy(plain), 0.4, include=nn.Linear)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(scoped(noisy, x, seed), plain(functional.add_noise(x, noisy.sigma, seed=seed, channel_dim=-1)))


# ----------------------------------------------------------------------------------------------------- weight_norm, spectral_norm
@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("cls", [nn.Conv2d, GainConv])
def test_normed_weights_convert_and_revert(name, cls, rng):
    seed = int(rng.integers(2**62))
    norm, remove = NORMED[name]
    model = nn.Sequential(norm(cls(3, 4, 3))).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(()) + 0.5)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    keys, clean, name_before = list(model.state_dict()), model(x), type(model[0]).__name__
    attributes = set(vars(model[0]))

    rse_fast.convert(model, 0.3)
    assert list(model.state_dict()) == keys
    noisy = functional.add_noise(x, model[0].sigma, seed=seed)
    with rse_fast.noise_off(model):
        expected, off = model(noisy), model(x)
    assert torch.equal(off, clean)
    got = scoped(model, x, seed)
    assert (got - expected).abs().max() <= 27 * torch.finfo(torch.float64).eps * expected.abs().max()
    assert (got - clean).abs().max() > 0.01
    got.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    rse_fast.revert(model)
    assert torch.equal(model(x), clean)
    assert list(model.state_dict()) == keys and set(vars(model[0])) == attributes
    assert type(model[0]).__name__ == name_before and not isinstance(model[0], NoisyInput) and isinstance(model[0], cls)
    remove(model[0])
    assert type(model[0]) is cls
    assert (model(x) - clean).abs().max() <= 27 * torch.finfo(torch.float64).eps * clean.abs().max()


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("cls", [nn.Conv2d, GainConv])
def test_norm_taken_away_from_a_converted_layer(name, cls, rng):
    norm, remove = NORMED[name]
    model = nn.Sequential(norm(cls(3, 4, 3))).eval()
    rse_fast.convert(model, 0.3)
    remove(model[0])
    assert set(model.state_dict()) == {"0.bias", "0.weight"}
    assert list(noise_layers(model)) == ["0"] and not parametrize.is_parametrized(model[0])
    x = torch.randn(2, 3, 6, 6)
    assert not torch.equal(model(x), model(x))
    rse_fast.revert(model)
    assert type(model[0]) is cls
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("cls", [nn.Conv2d, GainConv])
def test_norm_put_on_a_converted_layer(name, cls, rng):
    norm, remove = NORMED[name]
    model = rse_fast.convert(nn.Sequential(cls(3, 4, 3)).eval(), 0.3)
    norm(model[0])
    x = torch.randn(2, 3, 6, 6)
    assert not torch.equal(model(x), model(x))
    with rse_fast.noise_off(model):
        clean = model(x)
    rse_fast.revert(model)
    assert torch.equal(model(x), clean)
    remove(model[0])
    assert type(model[0]) is cls


# -------------------------------------------------------------------------------------------------- nested, shared, single, hooks
def test_nested_model_keys_and_loading_both_ways(rng):
    plain, noisy = Net().eval(), rse_fast.convert(Net().eval())
    assert {k: v.shape for k, v in noisy.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert len(noise_layers(noisy)) == 7
    x = torch.rand(2, 3, 8, 8)
    noisy.load_state_dict(plain.state_dict(), strict=True)
    with rse_fast.noise_off(noisy):
        assert torch.equal(noisy(x), plain(x))
    other = rse_fast.convert(Net().eval())
    plain.load_state_dict(other.state_dict(), strict=True)
    with rse_fast.noise_off(other):
        assert torch.equal(other(x), plain(x))


def test_parameters_and_buffers_stay_the_same_objects():
    model = Net()
    before = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    rse_fast.convert(model)
    after = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers()) if not name.endswith("sigma")}
    assert after == before


def test_optimizer_made_before_convert_goes_on(rng):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rse_fast.convert(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.rand(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    # The bias in front of a BatchNorm has no gradient but rounding; all else must move.
    assert all(c for c, (name, _) in zip(changed, model.named_parameters(), strict=True) if name != "stem.0.bias")


def test_shared_layer_is_converted_once_and_gets_another_stream_at_its_second_call(rng):
    seed = int(rng.integers(2**62))
    conv = nn.Conv2d(3, 3, 1).double()
    model = nn.Sequential(conv, conv)
    plain = copy.deepcopy(conv)
    rse_fast.convert(model, 0.3)
    assert model[0] is model[1] and list(noise_layers(model)) == ["0"]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    sigma = model[0].sigma
    first = plain(functional.add_noise(x, sigma, seed=seed, stream=0))
    assert torch.equal(scoped(model, x, seed), plain(functional.add_noise(first, sigma, seed=seed, stream=1 << 16)))
    assert not torch.equal(scoped(model, x, seed), plain(functional.add_noise(first, sigma, seed=seed, stream=0)))
    rse_fast.revert(model)
    assert type(model[0]) is nn.Conv2d


def test_shared_layer_is_selected_by_any_of_its_names():
    def make():
        shared = nn.Conv2d(3, 3, 1)
        return nn.ModuleDict({"a": shared, "b": shared, "c": nn.Conv2d(3, 3, 1)})

    assert list(noise_layers(rse_fast.convert(make(), exclude="b"))) == ["c"]
    assert list(noise_layers(rse_fast.convert(make(), include="b"))) == ["a"]


@pytest.mark.parametrize("make", [*list(CONVOLUTIONS.values())[::5], lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3))])
def test_a_model_that_is_itself_one_convolution(make, rng):
    model = make()
    before, attributes = model.state_dict(), set(vars(model))
    assert rse_fast.convert(model, 0.4) is model
    (layer,) = rse_fast.describe(model).layers
    assert (layer.name, round(layer.sigma, 6)) == ("", 0.4)
    assert "(model)" in str(rse_fast.describe(model))
    x = an_input(model)
    assert not torch.equal(model(x), model(x))
    assert list(model.state_dict()) == list(before)
    rse_fast.revert(model)
    assert torch.equal(model(x), model(x)) and set(vars(model)) == attributes


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 3), lambda: GainConv(3, 4, 3)])
def test_hooks_are_kept_and_run(make, rng):
    model, calls = nn.Sequential(make()), []
    layer = model[0]
    layer.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    layer.register_forward_hook(lambda m, args, out: calls.append("forward"))
    layer.register_full_backward_hook(lambda m, g_in, g_out: calls.append("backward"))
    layer.register_state_dict_post_hook(lambda m, state, prefix, meta: calls.append("state"))
    layer.weight.register_hook(lambda g: calls.append("weight"))
    model.register_forward_hook(lambda m, args, out: out * 0 if isinstance(out, torch.Tensor) else out)
    for change in (rse_fast.convert, rse_fast.revert):
        change(model)
        assert not calls  # neither conversion nor tracing runs them
        out = model(torch.rand(2, 3, 5, 5, requires_grad=True))
        assert not out.any()
        out.sum().backward()
        model.state_dict()
        assert sorted(calls) == ["backward", "forward", "pre", "state", "weight"]
        calls.clear()


# ------------------------------------------------------------------------------------------------------------ copies and pickles
@pytest.mark.parametrize("learnable", [False, True])
def test_deepcopy_and_pickle_of_a_converted_model(learnable, rng):
    seed = int(rng.integers(2**62))
    model = nn.Sequential(Net().stem, GainConv(4, 4, 3), StandardisedConv(4, 4, 1), DoubleLinear(6, 3)).eval()
    rse_fast.convert(model, 0.3, 0.2, include=[nn.Conv2d, DoubleLinear], learnable=learnable)
    x = torch.rand(2, 3, 8, 8)
    expected = scoped(model, x, seed)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(scoped(other, x, seed), expected)
        assert rse_fast.describe(other) == rse_fast.describe(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        rse_fast.revert(other)
        assert type(other[1]) is GainConv
    assert torch.equal(scoped(model, x, seed), expected)  # a copy shares nothing


def test_deepcopy_of_a_parametrised_converted_layer(rng):
    seed = int(rng.integers(2**62))
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), parametrizations.spectral_norm(GainConv(4, 4, 3))).eval()
    rse_fast.convert(model)
    x = torch.rand(2, 3, 8, 8)
    other = copy.deepcopy(model)
    assert torch.equal(scoped(other, x, seed), scoped(model, x, seed))
    assert not torch.equal(scoped(other, x, seed), scoped(rse_fast.revert(other), x, seed))
    assert len(noise_layers(model)) == 2


def test_state_pickles_without_sigma(rng):
    model = rse_fast.convert(Net())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    Net().load_state_dict(state, strict=True)
    assert not [key for key in state if "sigma" in key]


# ----------------------------------------------------------------------------------------------------------- selection, learnable
@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, "stages.*", {"stem.0"}),
        (None, ["*.shortcut", "stem.*"], {"stages.one.conv1", "stages.one.conv2", "stages.two.0.conv1", "stages.two.0.conv2"}),
        ("stages.one.conv?", None, {"stages.one.conv1", "stages.one.conv2"}),
        (nn.Linear, None, {"head"}),
        ((nn.Linear, "stem.*"), None, {"stem.0", "head"}),
        ({nn.Conv2d}, (n for n in ["stages.*"]), {"stem.0"}),
        (nn.Conv2d, Block, {"stem.0", *(f"stages.{s}.{c}" for s in ("one", "two.0") for c in ("shortcut", "conv1", "conv2"))}),
        ("*", None, {"stem.0", "head", *(f"stages.{s}.{c}" for s in ("one", "two.0") for c in ("shortcut", "conv1", "conv2"))}),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    assert set(noise_layers(rse_fast.convert(Net(), include=include, exclude=exclude))) == expected


def test_types_select_subclasses():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), GainConv(3, 3, 1), PaddedConv(3, 3, 3))
    assert list(noise_layers(rse_fast.convert(copy.deepcopy(model), exclude=GainConv))) == ["0"]
    assert list(noise_layers(rse_fast.convert(model, include=GainConv))) == ["1", "2"]


def test_learnable_sigma_is_a_parameter_with_a_gradient(rng):
    model = rse_fast.convert(Net(), 0.3, 0.2, learnable=True)
    raw = [p for name, p in model.named_parameters() if name.endswith("sigma_raw")]
    assert len(raw) == 7
    assert sorted(set(sigmas(model).values())) == [0.2, 0.3]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.rand(4, 3, 8, 8)).square().sum().backward()
    before = [p.detach().clone() for p in raw]
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(raw, before, strict=True))
    plain = Net()
    model.load_state_dict(plain.state_dict(), strict=True)  # a plain model's checkpoint leaves sigma as it is
    assert all(not torch.equal(p, old) for p, old in zip(raw, before, strict=True))
    rse_fast.revert(model)
    plain.load_state_dict(model.state_dict(), strict=True)


# ------------------------------------------------------------------------------------------------------------- noise on and off
@pytest.mark.parametrize("training", [True, False])
def test_noise_is_on_in_train_and_eval(training, rng):
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())).train(training)
    x = torch.rand(2, 3, 5, 5)
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(7)
    first = model(x)
    torch.manual_seed(7)
    assert torch.equal(model(x), first)


def test_noise_off_nests_and_survives_exceptions(rng):
    model = rse_fast.convert(Net().eval())
    x = torch.rand(2, 3, 8, 8)
    model.stem[0].noise_enabled = False  # a switch of the user's own
    switches = [layer.noise_enabled for layer in noise_layers(model).values()]

    def noisy():
        return not torch.equal(model(x), model(x))

    assert noisy()
    with rse_fast.noise_off(model) as inside:
        assert inside is model and not noisy()
        with rse_fast.noise_off(model):
            assert not noisy()
        assert not noisy()
        with pytest.raises(KeyError), rse_fast.noise_off(model):
            raise KeyError
        assert not noisy()
    assert noisy() and [layer.noise_enabled for layer in noise_layers(model).values()] == switches
    with pytest.raises(KeyError), rse_fast.noise_off(model):
        raise KeyError
    assert noisy() and [layer.noise_enabled for layer in noise_layers(model).values()] == switches


# --------------------------------------------------------------------------------------------------------------------- describe
def test_describe_lists_what_convert_made():
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), GainConv(4, 4, 3), nn.Conv1d(4, 4, 3).double()), 0.5, 0.125)
    found = rse_fast.describe(model)
    assert [(d.name, d.type, d.sigma, d.stream) for d in found.layers] == [
        ("0", "NoisyConv2d", 0.5, 0),
        ("2", "NoisyGainConv", 0.125, 1),
        ("3", "NoisyConv1d", 0.125, 2),
    ]
    assert found.layers[0].backend in ("cpu", "torch") and found.layers[2].backend == "torch"  # no library computes in float64
    lines = str(found).splitlines()
    assert lines[0].split() == ["stream", "name", "type", "sigma", "backend"]
    assert [line.split() for line in lines[1:]] == [[str(d.stream), d.name, d.type, f"{d.sigma:.4g}", d.backend] for d in found.layers]


def test_describe_shows_sigmas_per_channel():
    model = nn.Sequential(NoisyConv2d(3, 4, 3, sigma=torch.tensor([0.1, 0.25, 0.2])), rse_fast.nn.GaussianNoise(0.5))
    first, second = rse_fast.describe(model).layers
    assert first.sigma == pytest.approx([0.1, 0.25, 0.2]) and (second.type, second.sigma) == ("GaussianNoise", 0.5)
    assert "0.1 .. 0.25 (3 channels)" in str(rse_fast.describe(model))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformers_fast_path_does_not_skip_the_noise(rng):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    before = fingerprint(model)
    x, padded = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[3], [5], [4]])
    with torch.no_grad():
        plain = [model(x), model(x, src_key_padding_mask=padded)]
        with pytest.raises(ValueError, match=r"its out_proj without calling it, got 'layers.0.self_attn.out_proj'"):
            rse_fast.convert(model, 0.3, 0.3, include=nn.Linear)
        assert_unchanged(model, before)
        rse_fast.convert(model, 0.3, 0.3, include=nn.Linear, exclude="*out_proj")
        for kwargs in ({}, {"src_key_padding_mask": padded}):
            y = model(x, **kwargs)
            assert not torch.equal(y, model(x, **kwargs)) and y.shape == x.shape
            twin = copy.deepcopy(model)
            assert not torch.equal(twin(x, **kwargs), twin(x, **kwargs))
        rse_fast.revert(model)
        assert all(torch.equal(a, b) for a, b in zip(plain, [model(x), model(x, src_key_padding_mask=padded)], strict=True))
    assert_unchanged(model, before)
