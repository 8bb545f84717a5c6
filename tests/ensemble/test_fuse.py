"""The snapshot that a fused ensemble runs: the same function as the model, whatever stands next to what, in fewer operations."""

import copy
import operator

import pytest
import torch
from small_nets import NETS, Head, lively
from torch import nn
from torch.nn.utils import parametrizations

import rse_fast
from rse_fast.attributes import detached
from rse_fast.context import NoiseContext
from rse_fast.ensemble import fuse
from rse_fast.ensemble.fused_conv import Activation, FusedConv
from rse_fast.models import VGG16, ModelA, ResNeXt29
from rse_fast.nn import GaussianNoise, NoisyConv2d, noise_layers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]
IMAGES, DRAWS = 2, 3
PACKED = (IMAGES * DRAWS, 3, 10, 10)


@pytest.fixture
def seed(rng):
    return torch.tensor(int(rng.integers(2**62)))


def run(model, x, seed):
    with NoiseContext(seed, IMAGES, DRAWS):
        return model(x)


def kinds(model):
    """How many layers of a kind the graph of a snapshot calls: ReLUs merged into the noise of their one reader, those whose clean values go
    to other readers as well, and those that the convolution before them does."""
    modules = [model.get_submodule(node.target) for node in model.graph.nodes if node.op == "call_module"]
    calls = [node for node in model.graph.nodes if node.op in ("call_function", "call_method")]
    return {
        "norms": sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules),
        "relus": sum(isinstance(m, nn.ReLU) for m in modules) + sum("relu" in str(node.target) for node in calls),
        "merged": sum(isinstance(m, FusedConv) and m.activation is not None and not m.clean_output for m in modules),
        "shared": sum(isinstance(m, FusedConv) and m.clean_output for m in modules),
        "rectified": sum(isinstance(m, FusedConv) and m.rectified for m in modules),
    }


def assert_same_function(model, seed, shape=(IMAGES, 3, 10, 10), traced=True):
    """The snapshot in float64, where nothing hides a difference, value and gradient; and in float32, where packed weights run."""
    model = model.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.rand(shape)
    double = copy.deepcopy(model, detached(model)).double()
    exact, problem = fuse.snapshot(double, torch.float64)
    assert (problem is None) is traced, problem
    wide = x.double().requires_grad_()
    expected, found = run(double, wide.clone(), seed), run(exact, wide.clone(), seed)
    g = torch.randn_like(expected)
    largest = expected.abs().max().item()
    # Folding rounds each weight once more; ten thousand sums of a hundred terms are more than any of these networks has.
    tolerance = 1e6 * torch.finfo(torch.float64).eps
    assert (found - expected).abs().max() <= tolerance * largest
    wanted, got = torch.autograd.grad(expected, wide, g)[0], torch.autograd.grad(found, wide, g)[0]
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()

    narrow, _ = fuse.snapshot(model, torch.float32)
    with torch.no_grad():
        for _ in range(2):  # the second time with the weights in the vendor's order
            found = run(narrow, x.clone(), seed)
            # The float32 sums have some hundred terms in up to ten layers; normals are within 1e-6.
            assert (found - expected).abs().max() <= 1e4 * torch.finfo(torch.float32).eps * largest
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    return exact


def net(*layers, sigma=0.3, convert=True):
    model = nn.Sequential(*layers)
    return lively(rse_fast.convert(model, sigma, sigma) if convert else model)


def conv(channels, out=6, **options):
    return nn.Conv2d(channels, out, 3, **options)


# ------------------------------------------------------------------------------------------------------------------- whole networks
@pytest.mark.parametrize("name", NETS)
def test_small_networks(name, seed):
    model = NETS[name]()
    snapshot = assert_same_function(model, seed, shape=PACKED, traced=name != "not traceable")
    assert not any(p.requires_grad for p in snapshot.parameters())
    streams = sorted(layer.stream for layer in noise_layers(snapshot).values())
    assert streams == sorted(layer.stream for layer in noise_layers(model).values())


def test_what_is_left_of_a_plain_network(seed):
    # Three convolutions with BatchNorm or ReLU behind them, of which two are read by noisy convolutions (one through a pool).
    snapshot = assert_same_function(NETS["plain"](), seed)
    assert kinds(snapshot) == {"norms": 0, "relus": 0, "merged": 3, "shared": 0, "rectified": 0}


def test_residual_blocks(seed):
    snapshot = assert_same_function(NETS["residual"](), seed)
    assert kinds(snapshot)["norms"] == 0
    # Inside a block one ReLU stands between two convolutions; the sum's ReLU is read by the next block's two convolutions, or the head.
    assert kinds(snapshot) == {"norms": 0, "relus": 0, "merged": 4, "shared": 0, "rectified": 1}


def test_shortcuts_added_in_place_do_not_hinder(seed):
    model = lively(rse_fast.convert(Net(added_to_a_shortcut)))
    assert kinds(assert_same_function(model, seed)) == {"norms": 0, "relus": 0, "merged": 1, "shared": 0, "rectified": 0}


@pytest.mark.parametrize(("cls", "merged", "rectified", "alone"), [(VGG16, 12, 1, 12), (ResNeXt29, 24, 7, 18), (ModelA, 5, 1, 5)])
def test_networks_of_the_paper(cls, merged, rectified, alone):
    # The ReLU in front of the head is the last convolution's. In ResNeXt29 an identity shortcut reads two ReLUs a stage as well.
    snapshot, problem = fuse.snapshot(rse_fast.convert(cls()).eval(), torch.float32)
    assert problem is None and kinds(snapshot) == {"norms": 0, "relus": 0, "merged": merged, "shared": 0, "rectified": rectified}
    assert sum(m.alone for m in snapshot.modules() if isinstance(m, Activation)) == alone


class Dense(nn.Module):
    """Two layers of a DenseNet, whose BatchNorm reads what others read as well, and a stem with a pool that overlaps."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0, self.pool = conv(3, 8, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), conv(8, 4, padding=1)
        self.bn2, self.conv2, self.down = nn.BatchNorm2d(12), conv(12, 4, padding=1), nn.MaxPool2d(2)
        self.bn3, self.head = nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 6, 1), Head(6))

    def forward(self, x):
        x = self.pool(self.bn0(self.stem(x)).relu())
        x = torch.cat([x, self.conv1(self.bn1(x).relu())], 1)
        return self.head(self.down(self.bn3(self.conv2(self.bn2(x).relu())).relu()))


class Inverted(nn.Module):
    """A block of MobileNetV2 with plain ReLUs: expansion, depthwise convolution, linear projection, shortcut without a ReLU."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(6), conv(6, padding=1), nn.BatchNorm2d(6), conv(6, padding=1)

    def forward(self, x):
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv(6, padding=1), conv(6, padding=1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


LIKE = {  # layers, and what is left of them
    # The stem's ReLU is read behind a pool that overlaps, by a BatchNorm and the concatenation; the other norms go into the noise.
    "DenseNet": (lambda: [Dense()], {"norms": 0, "relus": 0, "merged": 3, "shared": 0, "rectified": 1}),
    "MobileNet": (
        lambda: [conv(3), Inverted(), nn.ReLU(), Inverted(), Head(6)], {"norms": 0, "relus": 0, "merged": 4, "shared": 0, "rectified": 1},
    ),
    "pre-activation ResNet": (
        lambda: [conv(3), PreActivation(), PreActivation(), Head(6)], {"norms": 0, "relus": 0, "merged": 4, "shared": 0, "rectified": 0},
    ),
    "ResNet's stem": (
        lambda: [conv(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Residual(), Head(6)],
        {"norms": 0, "relus": 0, "merged": 1, "shared": 1, "rectified": 0},
    ),
    "pooled ResNet": (
        lambda: [conv(3), nn.ReLU(), nn.MaxPool2d(2), Residual(), Head(6)],
        {"norms": 0, "relus": 0, "merged": 1, "shared": 1, "rectified": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE)
def test_graphs_of_other_families(name, seed):
    layers, expected = LIKE[name]
    model = lively(rse_fast.convert(nn.Sequential(*layers()), 0.3, 0.2), x=torch.rand(16, 3, 12, 12))
    assert kinds(assert_same_function(model, seed, (IMAGES, 3, 11, 12))) == expected


# -------------------------------------------------------------------------------------------------------------- BatchNorm and conv
NORMS = {
    "affine": (lambda: [conv(3), nn.BatchNorm2d(6)], 0),
    "no bias": (lambda: [conv(3, bias=False), nn.BatchNorm2d(6)], 0),
    "not affine": (lambda: [conv(3), nn.BatchNorm2d(6, affine=False)], 0),
    "large eps": (lambda: [conv(3), nn.BatchNorm2d(6, eps=0.5)], 0),
    "grouped, strided, dilated": (lambda: [conv(3), conv(6, groups=3, stride=2, dilation=2, padding=3), nn.BatchNorm2d(6)], 0),
    "same padding": (lambda: [conv(3, padding="same"), nn.BatchNorm2d(6)], 0),
    "circular padding": (lambda: [conv(3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6)], 0),
    "twice": (lambda: [conv(3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)], 0),
    "in front": (lambda: [nn.BatchNorm2d(3), conv(3)], 1),
    "behind a ReLU": (lambda: [conv(3), nn.ReLU(), nn.BatchNorm2d(6)], 1),
    "parametrised": (lambda: [parametrizations.weight_norm(conv(3)), nn.BatchNorm2d(6)], 1),
    "weight_norm of old": (lambda: [nn.utils.weight_norm(conv(3)), nn.BatchNorm2d(6)], 1),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_next_to_convolutions(name, seed):
    layers, left = NORMS[name]
    snapshot = assert_same_function(net(*layers(), Head(6)), seed)
    assert kinds(snapshot)["norms"] == left


def test_norm_of_the_batch_itself_is_kept(seed):
    snapshot = assert_same_function(net(conv(3), nn.BatchNorm2d(6, track_running_stats=False), Head(6)), seed)
    assert kinds(snapshot)["norms"] == 1


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions(dimensions, seed):
    kind, norm = (nn.Conv1d, nn.BatchNorm1d) if dimensions == 1 else (nn.Conv3d, nn.BatchNorm3d)
    model = rse_fast.convert(nn.Sequential(kind(3, 4, 3), norm(4), nn.ReLU(), kind(4, 4, 3)))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    snapshot = assert_same_function(model, seed, shape=(IMAGES, 3, *[8] * dimensions))
    assert kinds(snapshot)["norms"] == 0


def test_plain_convolutions_are_folded_too(seed):
    model = net(conv(3), nn.BatchNorm2d(6), nn.ReLU(), NoisyConv2d(6, 6, 3, sigma=0.3), Head(6), convert=False)
    assert kinds(assert_same_function(model, seed)) == {"norms": 0, "relus": 0, "merged": 1, "shared": 0, "rectified": 0}


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_computed_weight_with_a_history(norm, seed):
    """After a step of training, the weight that hooks have computed belongs to a graph, and torch does not copy such a tensor."""
    model = rse_fast.convert(nn.Sequential(norm(conv(3)), nn.BatchNorm2d(6), Head(6)))
    model(torch.rand(PACKED)).sum().backward()
    assert not model[0].weight.is_leaf
    assert_same_function(model, seed)


# -------------------------------------------------------------------------------------------------------------- ReLU and noise
RELUS = {
    "module": (lambda: [conv(3), nn.ReLU(), conv(6)], 1),
    "in place": (lambda: [conv(3), nn.ReLU(inplace=True), conv(6)], 1),
    "max-pool behind": (lambda: [conv(3), nn.ReLU(), nn.MaxPool2d(2, padding=1), conv(6)], 1),
    "max-pool in front": (lambda: [conv(3), nn.MaxPool2d(3, stride=1), nn.ReLU(), conv(6)], 1),
    "average behind": (lambda: [conv(3), nn.ReLU(), nn.AvgPool2d(2), conv(6)], 0),
    "circular padding": (lambda: [conv(3), nn.ReLU(), conv(6, padding=1, padding_mode="circular")], 0),
    "same padding": (lambda: [conv(3), nn.ReLU(), conv(6, padding="same")], 0),
    "first of all": (lambda: [nn.ReLU(), conv(3)], 0),
    "twice": (lambda: [conv(3), nn.ReLU(), nn.ReLU(), conv(6)], 1),
    "noise in between": (lambda: [conv(3), nn.ReLU(), GaussianNoise(0.2), nn.Conv2d(6, 6, 3)], 0),
    "ReLU6": (lambda: [conv(3), nn.ReLU6(), conv(6)], 0),
    "parametrised": (lambda: [conv(3), nn.ReLU(), parametrizations.weight_norm(conv(6))], 0),
}


@pytest.mark.parametrize("name", RELUS)
def test_relus_next_to_noise(name, seed):
    layers, merged = RELUS[name]
    layers = layers()
    noise = [m for m in layers if isinstance(m, GaussianNoise)]
    if noise:
        layers[0] = NoisyConv2d(3, 6, 3, sigma=0.3)
    snapshot = assert_same_function(net(*layers, Head(6), convert=not noise), seed)
    assert kinds(snapshot)["merged"] == merged


def test_a_merged_layer_with_its_noise_off(seed):
    model = net(conv(3), nn.ReLU(), conv(6), nn.ReLU(), conv(6), Head(6))
    model[2].noise_enabled = False
    assert kinds(assert_same_function(model, seed))["merged"] == 2


# ---------------------------------------------------------------------------------------------------- what a forward may do besides
class Net(nn.Module):
    """conv, bn, conv2, bn2, relu, relu_conv, pool, drop, head: for a forward of one's own. "relu_conv" has a name that others may want."""

    def __init__(self, run):
        super().__init__()
        self.conv, self.bn, self.relu = conv(3), nn.BatchNorm2d(6), nn.ReLU()
        self.conv2, self.bn2, self.relu_conv = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.relu_conv2, self.pool, self.drop, self.head = nn.Conv2d(6, 6, 1), nn.MaxPool2d(2), nn.Dropout(), Head(6)
        self.run = run

    def forward(self, x):
        return self.head(self.run(self, x))


def functional_relu(m, x):
    return m.conv2(nn.functional.relu(m.bn(m.conv(x)), inplace=True))


def method_relu(m, x):
    return m.conv2(m.conv(x).relu()) + m.conv2(m.conv(x * 2).relu_())


def relu_by_keyword(m, x):
    return m.conv2(nn.functional.relu(input=m.bn(m.conv(x))))


def norm_by_keyword(m, x):
    return m.bn2(input=m.conv2(m.bn(m.conv(x))))


def convolution_by_keyword(m, x):
    return m.bn2(m.conv2(input=m.relu(m.bn(m.conv(input=x)))))


def two_read_the_convolution(m, x):
    y = m.conv(x)
    return m.bn(y) + y


def two_read_the_norm(m, x):
    y = m.bn(m.conv(x))
    return m.conv2(y) + y


def two_read_the_relu(m, x):
    y = m.relu(m.bn(m.conv(x)))
    return m.conv2(y) + y


def two_noisy_read_the_relu(m, x):
    y = m.relu(m.bn(m.conv(x)))
    return m.conv2(y) + m.relu_conv(y)


def two_read_what_an_inplace_relu_overwrites(m, x):
    y = m.bn(m.conv(x))
    return m.conv2(y.relu_()) + y


def an_alias_is_overwritten(m, x):
    y = m.bn(m.conv(x))
    return m.conv2(m.drop(y).relu_()) + y


def a_view_is_overwritten(m, x):
    y = m.bn(m.conv(x))
    return m.conv2(nn.functional.relu(y.view(y.shape), inplace=True)) + y


def pool_and_convolution_read_the_relu(m, x):
    y = m.relu(m.bn(m.conv(x)))
    return m.conv2(m.pool(y)) + m.relu_conv(m.pool(y)) + m.conv2(y)[..., ::2, ::2]


def one_convolution_two_norms(m, x):
    return m.bn(m.conv(x)) + m.bn2(m.conv(x * 0.5))


def two_convolutions_one_norm(m, x):
    return m.bn(m.relu_conv(m.bn(m.conv(x))))


def a_weight_is_read_besides(m, x):
    return m.bn(m.conv(x)) * nn.functional.conv2d(x, m.conv.weight).sigmoid()


def a_norms_weight_is_read_besides(m, x):
    return m.bn(m.conv(x)) * m.bn.weight.view(1, -1, 1, 1)


def names_are_taken(m, x):
    return m.relu_conv2(m.relu_conv(m.relu(m.conv2(m.relu(m.conv(x))))))


def the_relu_is_overwritten_later(m, x):
    y = m.relu(m.bn(m.conv(x)))
    y.mul_(2)
    return m.conv2(y) + y


def what_the_norm_reads_is_overwritten_later(m, x):
    y = m.conv(x)
    z = m.relu(m.bn(y))
    y.mul_(2)
    return m.conv2(z) + y


def constants_are_made(m, x):
    return m.bn(m.conv(x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1).to(x.dtype) + x.new_zeros(x.shape[0], 1, 1, 1)))


def added_in_place(m, x):
    y = m.bn(m.conv(x))
    y += m.bn2(m.conv2(y * 2))
    return m.relu_conv(y.relu_())


def added_to_a_shortcut(m, x):
    shortcut = m.bn(m.conv(x))
    y = m.bn2(m.conv2(shortcut))
    y += shortcut
    return m.relu_conv(m.relu(y)) + shortcut


def added_to_what_was_there(m, x):
    y = m.bn(m.conv(x))
    return m.relu_conv(m.relu(y + m.bn2(m.conv2(y))))


def added_to_what_comes_later(m, x):
    y = m.conv(x)
    return m.conv2(y) + m.relu_conv(y)


def added_to_every_pixel(m, x):
    y = m.conv(x)
    z = m.relu_conv(y)
    return m.conv2(y) + m.relu_conv2(nn.functional.adaptive_avg_pool2d(z, 1)) + m.conv2(z)


def added_to_itself(m, x):
    y = m.conv2(m.conv(x))
    return y + y


def what_was_there_is_overwritten(m, x):
    y = m.conv(x)
    z = m.relu_conv(y)
    u = m.conv2(y * 2)
    z.mul_(2)
    return u + z


def a_sum_is_read_after_the_next_one(m, x):
    y = m.conv(x)
    z = m.relu_conv(y)
    u = m.relu(m.conv2(z) + y)
    return m.relu_conv2(u) + z + u + y


def the_input_of_a_convolution_is_added_to_it(m, x):
    y = m.relu(m.conv(x))
    return m.conv2(y) + y


def what_is_added_is_looked_at_besides(m, x):
    y = m.relu(m.conv(x))
    z = m.conv2(m.relu_conv(y)) + y
    return z * y.mean((2, 3), keepdim=True)


ADDITIONS = [
    added_to_what_was_there, added_to_what_comes_later, added_to_every_pixel, added_to_itself, what_was_there_is_overwritten,
    a_sum_is_read_after_the_next_one, the_input_of_a_convolution_is_added_to_it, what_is_added_is_looked_at_besides,
]  # fmt: skip
FORWARDS = [
    *ADDITIONS, added_in_place, added_to_a_shortcut, functional_relu, method_relu, relu_by_keyword, norm_by_keyword, convolution_by_keyword,
    two_read_the_convolution, two_read_the_norm, two_read_the_relu, two_noisy_read_the_relu, two_read_what_an_inplace_relu_overwrites,
    an_alias_is_overwritten, a_view_is_overwritten, pool_and_convolution_read_the_relu, one_convolution_two_norms,
    two_convolutions_one_norm, a_weight_is_read_besides, a_norms_weight_is_read_besides, names_are_taken, constants_are_made,
]  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS)
def test_forwards(forward, seed):
    model = Net(forward)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    assert_same_function(rse_fast.convert(model, 0.3, 0.2), seed, shape=PACKED)


@pytest.mark.parametrize("forward", ADDITIONS)
@pytest.mark.parametrize("off", [True, False])
def test_additions_on_large_maps(forward, off, seed):
    """Of 1.3 MB: their noisy inputs share memory, and a sum may take that of what is added, whether or not a layer makes a noisy copy."""
    model = rse_fast.convert(Net(forward), 0.3, 0.2)
    model.conv2.noise_enabled = not off
    assert_same_function(model, seed, shape=(IMAGES * DRAWS, 3, 100, 100))


def test_an_addition_is_made_with_the_convolution():
    for forward, left in ((added_to_what_was_there, 0), (added_to_what_comes_later, 0), (added_to_itself, 1), (added_to_a_shortcut, 0)):
        snapshot, _ = fuse.snapshot(rse_fast.convert(Net(forward)).eval(), torch.float32)
        assert sum(node.target in (operator.add, operator.iadd) for node in snapshot.graph.nodes) == left, forward


@pytest.mark.parametrize("forward", [the_relu_is_overwritten_later, what_the_norm_reads_is_overwritten_later])
def test_memory_that_is_written_to_later(forward, seed):
    # No gradient flows through such a forward, but it predicts.
    model = lively(rse_fast.convert(Net(forward), 0.3, 0.2)).double()
    model.bn.running_mean.normal_()
    snapshot, problem = fuse.snapshot(model, torch.float64)
    assert problem is None
    with torch.no_grad():
        x = torch.rand(PACKED, dtype=torch.float64)
        expected, found = run(model, x, seed), run(snapshot, x, seed)
    assert (found - expected).abs().max() <= 1e6 * torch.finfo(torch.float64).eps * expected.abs().max()


def test_parameters_shared_by_two_convolutions(seed):
    model = nn.Sequential(conv(3), nn.BatchNorm2d(6), conv(6), nn.BatchNorm2d(6), conv(6), Head(6))
    model[4].weight = model[2].weight
    assert_same_function(lively(rse_fast.convert(model)), seed)


# -------------------------------------------------------------------------------------------------------------------------- hooks
def square(module, args, output):
    return output * output


def triple(module, args):
    return (args[0] * 3,)


@pytest.mark.parametrize("place", ["conv", "bn", "relu", "conv2", "head", ""])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_change_what_flows(place, before, seed):
    model = lively(rse_fast.convert(Net(functional_relu if place != "relu" else lambda m, x: m.conv2(m.relu(m.conv(x))))))
    plain = run(model.eval(), x := torch.rand(IMAGES, 3, 10, 10), seed)
    module = model.get_submodule(place)
    module.register_forward_pre_hook(triple) if before else module.register_forward_hook(square)
    assert not torch.equal(run(model, x, seed), plain)
    assert_same_function(model, seed)


def test_what_a_hook_has_seen_stays_as_it_was(seed):
    """Noise goes over a convolution's result in place, but not over one that somebody may hold."""
    model, seen = net(conv(3), conv(6), nn.ReLU(), conv(6), Head(6)).eval(), []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append((output, output.clone())))
    snapshot, _ = fuse.snapshot(model, torch.float32)
    with torch.no_grad():
        run(snapshot, torch.rand(PACKED), seed)
    assert seen and all(torch.equal(held, then) for held, then in seen)


def test_backward_hooks_see_their_gradient(seed):
    model, seen = lively(rse_fast.convert(Net(functional_relu))).eval(), []
    model.conv2.register_full_backward_hook(lambda module, g_in, g_out: seen.append(g_out[0].shape))
    snapshot, _ = fuse.snapshot(model, torch.float32)
    run(snapshot, torch.rand(IMAGES, 3, 10, 10, requires_grad=True), seed).sum().backward()
    assert seen == [(IMAGES * DRAWS, 6, 8, 8)]


# ------------------------------------------------------------------------------------------------------------------ single layers
def test_a_model_of_one_noisy_layer(seed):
    model = rse_fast.convert(nn.Linear(4, 5), include=nn.Linear)
    assert_same_function(model, seed, shape=(IMAGES, 4))
    assert_same_function(rse_fast.convert(conv(3)), seed)


def test_a_snapshot_of_a_narrow_model_is_folded_in_float32(seed):
    model = net(conv(3), nn.BatchNorm2d(6), Head(6)).eval().bfloat16()
    snapshot, _ = fuse.snapshot(model, torch.float32)
    x = torch.rand(IMAGES, 3, 10, 10)
    expected = run(copy.deepcopy(model).float(), x, seed)
    assert (run(snapshot, x, seed) - expected).abs().max() <= 1e4 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_snapshots_share_nothing_with_the_model(seed):
    model = NETS["plain"]()
    snapshot, _ = fuse.snapshot(model, torch.float32)
    mine = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not mine & {t.data_ptr() for t in (*snapshot.parameters(), *snapshot.buffers())}
    x = torch.rand(IMAGES, 3, 10, 10)
    before = run(snapshot, x, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(snapshot, x, seed), before)


def test_a_hook_on_a_container_is_called_with_tensors_each_time(seed):
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model, seen = rse_fast.convert(nn.Sequential(stem, nn.Conv2d(4, 5, 8), nn.Flatten())), []
    model.eval()[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    ensemble = rse_fast.Ensemble(model, 3, seed=int(seed), dtype="float32")
    ensemble.predict(torch.rand(2, 3, 10, 10))
    for _ in range(2):
        seen.clear()
        ensemble.predict(torch.rand(2, 3, 10, 10))
        assert [type(output) for output in seen] == [torch.Tensor] and seen[0].shape == (6, 4, 8, 8)
