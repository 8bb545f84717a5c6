"""Convolutions that get no noise, or get it and are not called: said by convert, by describe, and by an Ensemble."""

import copy
import dataclasses
import functools
import types
import warnings

import pytest
import torch
from module_state import assert_unchanged, fingerprint
from torch import nn
from torch.nn.functional import conv2d

import rse_fast
from rse_fast import Ensemble
from rse_fast.context import NoiseContext

pytestmark = pytest.mark.usefixtures("one_thread")


class OwnConv(nn.Module):
    """A convolution by another name, as deformable and conditional ones are."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 1, 1))

    def forward(self, x):
        return conv2d(x, self.weight)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.read, self.unused = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))
        self.own, self.weight = OwnConv(4), nn.Parameter(torch.randn(5, 4, 1, 1))

    def forward(self, x):
        x = conv2d(self.first(x).relu(), self.read.weight, self.read.bias, padding=1)
        return conv2d(self.own(x), self.weight).mean((2, 3))


def quiet_convert(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rse_fast.convert(model.eval(), **options)


def test_convert_names_what_it_leaves_out(recwarn):
    rse_fast.convert(Net())
    (warning,) = recwarn
    text = str(warning.message)
    assert warning.category is RuntimeWarning and warning.filename == __file__
    for part in ("'own' (OwnConv)", "'read' (its weight is read", "'weight' (a weight that forward", "exclude=('own', 'read', 'weight')"):
        assert part in text
    assert "first" not in text
    recwarn.clear()
    rse_fast.convert(Net(), exclude=("own", "read", "weight"))
    rse_fast.convert(Net(), include="first")
    rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1))))
    assert not recwarn


def test_describe_tells_which_layers_are_called():
    model = quiet_convert(Net())
    before = fingerprint(model)
    described = rse_fast.describe(model)
    assert {d.name: d.calls for d in described.layers} == {
        "first": "", "read": "reads the weight without calling it", "unused": "never called"
    }  # fmt: skip
    assert "never called" in str(described).splitlines()[3] and "calls" in str(described).splitlines()[0]
    assert "calls" not in str(rse_fast.describe(rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3)))))
    assert_unchanged(model, before)


@pytest.mark.parametrize("fuse", [True, False])
def test_an_ensemble_says_which_layers_are_never_called(fuse):
    x = torch.rand(2, 3, 8, 8)
    ensemble = Ensemble(quiet_convert(Net()), 3, fuse=fuse)
    with pytest.warns(RuntimeWarning, match="never calls the noisy layers 'read', 'unused'"):
        ensemble.predict(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble.refresh()
        ensemble.predict(x)  # once an ensemble
        Ensemble(quiet_convert(Net(), exclude=["read", "unused"]), 3, fuse=fuse).predict(x)


def test_an_ensemble_says_which_layers_have_vanished():
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    model = rse_fast.convert(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    x = torch.rand(2, 3, 8, 8)
    changed = copy.deepcopy(model)
    changed[1] = nn.Conv2d(4, 4, 3)
    with pytest.warns(RuntimeWarning, match="'1' had noise when the model was converted"):
        Ensemble(changed, 3).predict(x)
    for i in range(3):
        changed[i] = nn.Conv2d(3 if i == 0 else 4, 4, 3)
    with pytest.raises(ValueError, match="got none any more: '0', '1', '2' had noise"):
        Ensemble(changed, 3)
    reverted = rse_fast.revert(copy.deepcopy(model))
    assert not any("_converted_layers" in vars(m) for m in reverted.modules())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("learnable", [False, "channel"])
def test_transposed_convolutions_get_noise(dimensions, learnable, rng):
    kind = getattr(nn, f"ConvTranspose{dimensions}d")
    model = nn.Sequential(kind(6, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(), kind(4, 3, 2))
    state, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.rand(2, 6, *[5] * dimensions)
    expected = model(x)
    rse_fast.convert(model, 0.3, 0.2, learnable=learnable)
    assert [d.type for d in rse_fast.describe(model).layers] == [f"NoisyConvTranspose{dimensions}d"] * 2
    seed = torch.tensor(int(rng.integers(2**62)))
    with NoiseContext(seed, 2):
        got = model[0](x)
    noisy = rse_fast.functional.add_noise(x, 0.3, seed=seed)
    plain = kind(6, 4, 3, stride=2, padding=1, groups=2)
    plain.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith("0.")})
    assert (got - plain(noisy)).abs().max() <= 1e-5
    assert model[0](x, output_size=[10] * dimensions).shape[2:] == (10,) * dimensions
    copied = copy.deepcopy(model)
    assert type(copied[0]) is type(model[0])
    assert torch.equal(rse_fast.revert(model)(x), expected) and type(model[0]) is kind


def test_a_network_with_transposed_convolutions_in_an_ensemble(rng):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model, x = rse_fast.convert(net.eval()), torch.rand(3, 3, 8, 8)
    fused, live = (Ensemble(model, 4, seed=3, fuse=fuse, dtype="float32").predict(x).probs for fuse in (True, False))
    assert (fused - live).abs().max() <= 1e-5


def test_a_weight_of_forwards_own_before_the_first_layer_is_named():
    """The first layer's channels are then not those of the images."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.conv = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.conv(nn.functional.conv2d(x, self.kernel)).mean((2, 3))

    with pytest.warns(RuntimeWarning, match="gives no noise to 'kernel'"):
        rse_fast.convert(Own())


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_a_scripted_convolution_is_named_and_runs(rng):
    torch.manual_seed(int(rng.integers(2**31)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.Conv2d(4, 4, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.warns(RuntimeWarning, match=r"gives no noise to '1' \(Conv2d\)"):
        rse_fast.convert(model)
    x = torch.rand(2, 3, 8, 8)
    for fuse in (True, False):
        ensemble = Ensemble(model, 3, seed=1, fuse=fuse, dtype="float32")
        old = ensemble.predict(x).probs
        model[1].weight.detach().mul_(2)
        expected = Ensemble(model, 3, seed=1, fuse=False, dtype="float32").predict(x).probs
        assert torch.allclose(ensemble.predict(x).probs, expected, atol=1e-5) and (old - expected).abs().max() > 1e-3


class Two(nn.Module):
    """Two convolutions; ``way`` says how forward calls the second."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second, self.way = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), way
        self.bound, self.peer = self.second.forward, [self]

    def forward(self, x):
        return self.way(self, self.first(x)).mean((2, 3))


def unfolded(net, x):
    columns = nn.functional.unfold(x, 3).transpose(1, 2) @ net.second.weight.reshape(4, -1).t()
    return columns.transpose(1, 2).unflatten(2, (x.shape[2] - 2, x.shape[3] - 2))


HAVE_NOISE = {
    "forward": lambda net, x: net.second.forward(x),
    "class": lambda net, x: type(net.second).forward(net.second, x),
    "partial": lambda net, x: functools.partial(net.second.forward)(x),
}
HAVE_NONE = {
    "arithmetic": lambda net, x: conv2d(x, net.second.weight * 2, net.second.bias),
    "chain": lambda net, x: conv2d(x, (net.second.weight - net.second.weight.mean((1, 2, 3), keepdim=True)).flip(2, 3)),
    "plain class": lambda net, x: nn.Conv2d.forward(net.second, x),
    "bound before": lambda net, x: net.bound(x),
    "unfold": unfolded,
}


def is_noisy(net):
    with NoiseContext(torch.tensor(1), 1) as context:
        net(torch.rand(1, 3, 8, 8))
    return net.second in context.calls


@pytest.mark.parametrize("way", HAVE_NOISE)
def test_a_layer_whose_forward_is_called_in_another_way_is_called(way, recwarn):
    net = rse_fast.convert(Two(HAVE_NOISE[way]).eval())
    assert is_noisy(net) and not recwarn
    assert [d.calls for d in rse_fast.describe(net).layers] == ["", ""]


def test_a_forward_that_was_kept_after_convert_is_a_call():
    net = quiet_convert(Two(HAVE_NONE["bound before"]))
    net.bound = net.second.forward
    assert is_noisy(net) and [d.calls for d in rse_fast.describe(net).layers] == ["", ""]


@pytest.mark.parametrize("way", HAVE_NONE)
def test_a_weight_that_is_read_past_its_layer_is_named(way):
    with pytest.warns(RuntimeWarning, match="no noise to 'second' .its weight is read"):
        net = rse_fast.convert(Two(HAVE_NONE[way]).eval())
    assert not is_noisy(net)
    assert [d.calls for d in rse_fast.describe(net).layers] == ["", "reads the weight without calling it"]


def test_a_forward_of_a_layers_own_is_told():
    net = rse_fast.convert(Two(lambda net, x: net.second(x)).eval())
    net.second.forward = lambda x: nn.functional.relu(x)
    assert [d.calls for d in rse_fast.describe(net).layers] == ["", "a forward of its own"]
    plain = nn.Conv2d(4, 4, 1)
    net.second.forward = lambda x: plain(x)  # a run on the meta device meets its data, and fails
    assert rse_fast.describe(net).layers[1].calls == "a forward of its own"


def test_convolutions_in_plain_lists_are_named(recwarn):
    def listed():
        net = Two(lambda net, x: net.kept["deep"][1](net.convs[0](x)))
        net.convs = [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]  # the second is not called
        net.kept = {"deep": (None, nn.Sequential(nn.Conv2d(4, 4, 1)))}
        net.again = [net.first]
        return net.eval()

    rse_fast.convert(listed(), exclude="second")
    (warning,) = recwarn
    text = str(warning.message)
    assert "'convs.0' (Conv2d in a plain attribute, which nn.ModuleList" in text and "exclude=('convs.0', 'kept.deep.1.0')" in text
    recwarn.clear()
    rse_fast.convert(listed(), exclude=("second", "convs.0", "kept.deep.1.0"))
    assert not recwarn


class Helper:  # no module
    def __init__(self):
        self.conv, self.shift = nn.Conv2d(4, 4, 1), torch.zeros(4, 1, 1)

    def __call__(self, x):
        return self.conv(x) + self.shift


def test_a_convolution_in_an_object_of_the_users_is_named():
    net = Two(lambda net, x: net.second(net.helper(x)))
    net.helper = Helper()
    net.helper.owner = net
    with pytest.warns(RuntimeWarning, match=r"no noise to 'helper.conv' \(Conv2d in a plain attribute"):
        rse_fast.convert(net.eval())
    assert net.helper.conv.weight.device.type == "cpu"


@pytest.mark.parametrize("holder", [lambda t: [t], lambda t: types.SimpleNamespace(t=[t])], ids=["list", "namespace"])
def test_tensors_in_containers_do_not_hide_what_forward_calls(holder):
    net = Two(lambda net, x: nn.functional.conv2d(x + (net.held[0] if isinstance(net.held, list) else net.held.t[0]), net.second.weight))
    net.held = holder(torch.ones(4, 1, 1))
    with pytest.warns(RuntimeWarning, match="no noise to 'second' .its weight is read"):
        rse_fast.convert(net.eval())


class Untold:  # whose package nobody knows
    __module__ = None


class Closed:  # answers whatever is asked of it
    __slots__ = ()

    def __getattr__(self, name):
        if name in ("__deepcopy__", "__reduce_ex__", "__setstate__"):
            raise AttributeError(name)
        return lambda: name


@dataclasses.dataclass
class Broken:
    size: int = 1

    def __getattribute__(self, name):
        if name == "size":
            raise RuntimeError("not yet known")
        return super().__getattribute__(name)


@pytest.mark.parametrize("kind", [Untold, Closed, Broken])
def test_objects_that_cannot_be_looked_into_are_passed_over(kind):
    net = Two(lambda net, x: net.second(x))
    net.held = kind()
    rse_fast.convert(net.eval())
    ensemble, x = rse_fast.Ensemble(net, 2), torch.rand(1, 3, 8, 8)
    assert torch.equal(ensemble.predict(x, seed=1).probs, ensemble.predict(x, seed=1).probs)
