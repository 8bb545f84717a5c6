"""The paper's networks: layer counts, parameter counts against arithmetic written out here, shapes, tracing and gradients."""

import pytest
import torch
from torch import nn

from rse_fast.models import VGG16, ModelA, ResNeXt29, SmallNet, SmallResNet, SmallVGG


def conv(c_in: int, c_out: int, k: int, bias: bool = False, groups: int = 1) -> int:
    return c_in // groups * c_out * k * k + (c_out if bias else 0)


def bn(*channels: int) -> int:
    return sum(2 * c for c in channels)


def vgg16_parameters() -> int:
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convs = sum(conv(a, b, 3, bias=True) for a, b in zip([3, *widths[:-1]], widths, strict=True))
    return convs + bn(*widths) + 512 * 10 + 10


def resnext29_parameters() -> int:
    total = conv(3, 64, 1) + bn(64)
    for c_in, inner, c_out in ((64, 128, 256), (256, 256, 512), (512, 512, 1024)):
        grouped = conv(inner, inner, 3, groups=2) + bn(inner)
        total += conv(c_in, inner, 1) + bn(inner) + grouped + conv(inner, c_out, 1) + bn(c_out)  # first block
        total += conv(c_in, c_out, 1) + bn(c_out)  # its shortcut
        total += 2 * (conv(c_out, inner, 1) + bn(inner) + grouped + conv(inner, c_out, 1) + bn(c_out))
    return total + 1024 * 10 + 10


def model_a_parameters() -> int:
    widths = [32, 64, 128, 128, 256, 256]
    return sum(conv(a, b, 3, bias=True) for a, b in zip([3, *widths[:-1]], widths, strict=True)) + 256 * 10 + 10


def small_net_parameters(in_channels: int = 3, width: int = 32) -> int:
    widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 4 * width]
    return sum(conv(a, b, 3) for a, b in zip([in_channels, *widths[:-1]], widths, strict=True)) + bn(*widths) + 4 * width * 10 + 10


def small_resnet_parameters() -> int:
    pairs = ((3, 32), (32, 48), (48, 48), (48, 96), (96, 96), (96, 192), (192, 192))
    return sum(conv(a, b, 3) + bn(b) for a, b in pairs) + 192 * 10 + 10


def small_vgg_parameters() -> int:
    pairs = ((3, 24), (24, 32), (32, 32), (32, 96), (96, 96), (96, 192), (192, 192))
    return sum(conv(a, b, 3) + bn(b) for a, b in pairs) + 192 * 10 + 10


CASES = [
    # class, image shape, convolutions, parameters by hand, parameters as the docstring says
    pytest.param(VGG16, (3, 32, 32), 13, vgg16_parameters(), 14_728_266, id="VGG16"),
    pytest.param(ResNeXt29, (3, 32, 32), 31, resnext29_parameters(), 9_128_778, id="ResNeXt29"),
    pytest.param(ModelA, (3, 96, 96), 6, model_a_parameters(), 1_128_650, id="ModelA"),
    pytest.param(SmallNet, (3, 32, 32), 7, small_net_parameters(), 436_458, id="SmallNet"),
    pytest.param(SmallResNet, (3, 32, 32), 7, small_resnet_parameters(), 660_842, id="SmallResNet"),
    pytest.param(SmallVGG, (3, 32, 32), 7, small_vgg_parameters(), 628_290, id="SmallVGG"),
]


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(("build", "shape", "convs", "by_hand", "documented"), CASES)
def test_layers_and_parameters(build, shape, convs, by_hand, documented):
    model = build()
    assert len(convolutions(model)) == convs
    assert sum(p.numel() for p in model.parameters()) == by_hand == documented
    assert f"{documented:,} parameters" in build.__doc__
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1


@pytest.mark.parametrize(("build", "shape", "convs", "by_hand", "documented"), CASES)
def test_logits_are_deterministic_and_one_row_per_image(build, shape, convs, by_hand, documented):
    model = build(num_classes=7).eval()
    images = torch.rand(3, *shape)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (3, 7)
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, model(images))  # no noise inside
        torch.testing.assert_close(model(images[1:2]), logits[1:2])


@pytest.mark.parametrize(("build", "shape", "convs", "by_hand", "documented"), CASES)
def test_fx_trace_computes_the_same(build, shape, convs, by_hand, documented):
    model = build().eval()
    traced = torch.fx.symbolic_trace(model)
    images = torch.rand(2, *shape)
    with torch.no_grad():
        assert torch.equal(traced(images), model(images))


@pytest.mark.parametrize(("build", "shape", "convs", "by_hand", "documented"), CASES)
def test_every_parameter_gets_a_finite_gradient(build, shape, convs, by_hand, documented):
    model = build()
    images = torch.rand(4, *shape, requires_grad=True)
    nn.functional.cross_entropy(model(images), torch.randint(10, (4,))).backward()
    for name, parameter in [("images", images), *model.named_parameters()]:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if parameter.dim() > 1:  # the bias of a convolution before BatchNorm has gradient 0
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("build", "in_channels", "size"),
    [
        (VGG16, 1, 32),
        (VGG16, 3, 64),
        (ResNeXt29, 3, 24),
        (ResNeXt29, 1, 8),
        (ModelA, 3, 128),
        (SmallNet, 1, 8),
        (SmallNet, 3, 4),
        (SmallNet, 3, 45),
        (SmallResNet, 1, 8),
        (SmallResNet, 3, 45),
        (SmallVGG, 1, 8),
        (SmallVGG, 3, 45),
    ],
)
def test_other_channels_and_sizes(build, in_channels, size):
    model = build(in_channels=in_channels).eval()
    with torch.no_grad():
        assert model(torch.rand(2, in_channels, size, size)).shape == (2, 10)


def test_vgg16_halves_the_map_five_times():
    sizes = [32]
    model = VGG16().eval()
    for module in model.features:
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    assert sizes == [32, 16, 8, 4, 2, 1]


def test_resnext29_has_cardinality_2_and_projections_where_the_shape_changes():
    model = ResNeXt29()
    grouped = [m for m in convolutions(model) if m.kernel_size == (3, 3)]
    assert [m.groups for m in grouped] == [2] * 9
    assert [m.in_channels for m in grouped] == [128] * 3 + [256] * 3 + [512] * 3
    shortcuts = [m for block in model.blocks for m in convolutions(block.shortcut)]
    assert [(m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in shortcuts] == [
        (64, 256, (1, 1), (1, 1)),
        (256, 512, (1, 1), (2, 2)),
        (512, 1024, (1, 1), (2, 2)),
    ]
    features = []
    model.blocks.register_forward_hook(lambda _, __, out: features.append(out.shape))
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 32, 32))
    assert features == [(1, 1024, 8, 8)]


def test_model_a_is_the_stl10_network():
    model = ModelA()
    assert [(m.out_channels, m.padding) for m in convolutions(model)] == [
        (c, (p, p)) for c, p in ((32, 1), (64, 1), (128, 1), (128, 1), (256, 0), (256, 0))
    ]
    assert not any(list(m.parameters()) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    features = []
    model.features.register_forward_hook(lambda _, __, out: features.append(out.shape))
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 96, 96))
    assert features == [(1, 256, 1, 1)]


def test_small_net_width():
    assert sum(p.numel() for p in SmallNet(in_channels=1, width=8).parameters()) == small_net_parameters(1, 8)
