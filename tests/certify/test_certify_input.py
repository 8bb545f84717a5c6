"""What stands between the image and the noise: models that can be certified, and those that must be refused."""

import math
import pickle
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn

import rse_fast
from rse_fast.certifiable import input_noise
from rse_fast.nn import GaussianNoise, NoisyConv2d, NoisyLinear, number_layers

pytestmark = pytest.mark.usefixtures("one_thread")


class Calls(nn.Module):
    """A model whose forward is ``function(self, x)``, with layers by name."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


class PaddedConv(nn.Conv2d):
    """A subclass that pads by itself."""

    def forward(self, input):
        return super().forward(nn.functional.pad(input, (1, 1, 1, 1), mode="reflect"))


def conv(**options):
    return NoisyConv2d(3, 4, 3, sigma=0.3, **options)


def gaussian():
    return GaussianNoise(0.3)


FINE = {
    "convolution": lambda: nn.Sequential(conv(), nn.Flatten()),
    "same padding": lambda: nn.Sequential(conv(padding="same", dilation=2)),
    "uneven padding": lambda: nn.Sequential(NoisyConv2d(3, 4, 2, sigma=0.3, padding="same")),
    "reflect padding behind the noise": lambda: nn.Sequential(conv(padding=1, padding_mode="reflect")),
    "subclass that pads behind the noise": lambda: rse_fast.convert(nn.Sequential(PaddedConv(3, 4, 3)), 0.3),
    "noise in front": lambda: nn.Sequential(gaussian(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
    "flattened": lambda: nn.Sequential(nn.Flatten(), NoisyLinear(192, 4, sigma=0.3)),
    "channels at the end": lambda: Calls(
        lambda m, x: m.linear(x.permute(0, 2, 3, 1).reshape(len(x), -1, 3)), linear=NoisyLinear(3, 4, sigma=0.3)
    ),
    "identities": lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.5), conv(), nn.ReLU(), conv_inner()),
    "contiguous, cast, cloned": lambda: Calls(
        lambda m, x: m.conv(x.float().clone().contiguous(memory_format=torch.channels_last).double().float()), conv=conv()
    ),
    "in-place behind the noise": lambda: Calls(lambda m, x: m.noise(x).sub_(0.5).flatten(1), noise=gaussian()),
    "decides by the noisy image": lambda: Calls(lambda m, x: y if (y := m.conv(x)).sum() > 0 else -y, conv=conv()),
    "another layer first, on something else": lambda: Calls(
        lambda m, x: m.conv(x).mean((2, 3)) + m.other(m.other.weight[:1]), other=NoisyLinear(4, 4, sigma=0.1), conv=conv()
    ),
    "shared": lambda: Calls(lambda m, x: m.conv(m.conv(x)), conv=NoisyConv2d(3, 3, 3, sigma=0.3)),
}


def conv_inner():
    return NoisyConv2d(4, 4, 3, sigma=0.1)


def on_a_thread(function, x):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(x)))
    thread.start()
    thread.join()
    return float(found[0])


def past_torch(read):
    """A model whose logits depend on what ``read`` gets of the clean image, which no mode of torch sees."""
    return Calls(lambda m, x: m.conv(x) * (1 + read(x)), conv=conv())


OTHER = "other logits for another image"
REFUSED = {  # and what the message names
    "taken out of torch as a list": (lambda: Calls(lambda m, x: m.conv(x) * x.tolist()[0][0][0][0], conv=conv()), "tolist"),
    "taken out of torch as an array": (lambda: Calls(lambda m, x: m.conv(x) * float(x.numpy().sum()), conv=conv()), "numpy"),
    "read as an array": (lambda: Calls(lambda m, x: m.conv(x) * float(np.asarray(x.view(-1))[0]), conv=conv()), "__array__"),
    "by DLPack": (lambda: past_torch(lambda x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x)).mean()), OTHER),
    "as text": (lambda: past_torch(lambda x: float(re.search(r"\[(.*?),", repr(x))[1].strip("["))), OTHER),
    "on another thread": (lambda: past_torch(lambda x: on_a_thread(torch.mean, x)), OTHER),
    "pickled": (lambda: past_torch(lambda x: pickle.loads(pickle.dumps(x)).mean()), "untyped_storage"),
    "plain convolution first": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), conv()), "convolution"),
    "BatchNorm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), conv()), "batch_norm"),
    "normalised": (lambda: Calls(lambda m, x: m.conv((x - 0.5) / 0.25), conv=conv()), "sub"),
    "scaled": (lambda: Calls(lambda m, x: m.conv(2 * x), conv=conv()), "mul"),
    "scaled in place": (lambda: Calls(lambda m, x: m.conv(x.mul_(2)), conv=conv()), "mul_"),
    "clamped": (lambda: Calls(lambda m, x: m.conv(x.clamp(0, 1)), conv=conv()), "clamp"),
    "zero padding": (lambda: nn.Sequential(nn.ZeroPad2d(1), conv()), "pad"),
    "reflect padding": (lambda: nn.Sequential(nn.ReflectionPad2d(1), conv()), "reflection_pad"),
    "resized": (lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv()), "upsample"),
    "average": (lambda: nn.Sequential(nn.AvgPool2d(2), conv()), "avg_pool"),
    "in half": (lambda: Calls(lambda m, x: m.conv(x.half().float()), conv=conv()), "_to_copy"),
    "expanded": (lambda: Calls(lambda m, x: m.conv(x[:, :1].expand(-1, 3, -1, -1)), conv=conv()), "slice"),
    "bypass": (lambda: Calls(lambda m, x: m.noise(x) + x, noise=gaussian()), "add"),
    "bypass through a view": (lambda: Calls(lambda m, x: m.noise(x).flatten(1) + x.flatten(1), noise=gaussian()), "add"),
    "late bypass": (lambda: Calls(lambda m, x: m.conv(x).mean((2, 3)) + x.mean(), conv=conv()), "mean"),
    "decides by the clean image": (lambda: Calls(lambda m, x: m.conv(x) if x.sum() > 0 else -m.conv(x), conv=conv()), "sum"),
    "two noisy readers": (lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv()), r"2 noisy calls reading it \(a, b\)"),
    "one reader twice": (lambda: Calls(lambda m, x: m.a(x) + m.a(x), a=conv()), r"2 noisy calls reading it \(a\)"),
    "never read": (lambda: Calls(lambda m, x: m.a(m.a.weight[:1]), a=NoisyLinear(4, 4)), "0 noisy calls"),
    "sigma per channel": (lambda: rse_fast.nn.NoisyConv2d(3, 4, 3, sigma=torch.tensor([0.1, 0.2, 0.3])), "3, one a channel"),
    "learnable": (lambda: rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.3, learnable=True), "learnable one, which nothing bounds"),
    "zero": (lambda: rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), 0.0, 0.1), "sigma 0"),
}


class Batch(nn.Module):
    """What a row of it gives depends on the batch."""

    def __init__(self, how):
        super().__init__()
        self.noise, self.how = gaussian(), how

    def forward(self, x):
        x = self.noise(x).flatten(1)[:, :4]
        return self.how(x)


def standardised(x):
    return (x - x.mean(0)) / x.std(0, unbiased=False).add(0.1)


def masked(x, value):
    return torch.cat([x[:, :3], torch.full_like(x[:, 3:], value)], 1)


SHARED = {
    "statistics of the batch": (standardised, "beside another image"),
    # The size of a class that never wins must not hide what happens to the others.
    "statistics of the batch, a class masked by -inf": (lambda x: masked(standardised(x), -math.inf), "beside another image"),
    "statistics of the batch, a class masked by a number": (lambda x: masked(standardised(x), -1e4), "beside another image"),
    "a random number for some, a class masked": (
        lambda x: masked(x + torch.rand(()) * x.new_tensor([1.0, 0, 0, 0]), -math.inf),
        "random numbers of its own",
    ),
    "a random number for all": (lambda x: x + torch.rand(()) * x.new_tensor([1.0, 0, 0, 0]), "random numbers of its own"),
}


@pytest.mark.parametrize("name", SHARED)
def test_rows_that_are_not_independent_are_refused(name, rng):
    how, what = SHARED[name]
    with pytest.raises(ValueError, match=what):
        rse_fast.certify(rse_fast.Ensemble(Batch(how), seed=1), torch.rand(3, 3, 8, 8), n0=5, n=100)
    rse_fast.certify(rse_fast.Ensemble(Batch(lambda x: x / x.norm(dim=1, keepdim=True)), seed=1), torch.rand(3, 3, 8, 8), n0=5, n=100)


@pytest.mark.parametrize("share", [0.13, 0.03])  # the second is less than what rounding may be
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_share_of_the_batch_in_the_logits_is_refused_in_every_dtype(dtype, share):
    model = Batch(lambda x: x + share * x.mean(0))
    with pytest.raises(ValueError, match="beside another image"):
        rse_fast.certify(rse_fast.Ensemble(model, dtype=dtype), torch.rand(3, 3, 8, 8), n0=5, n=100)


def attention(x, tokens):
    """Over ``tokens`` of x [N, 4], [batch, heads, tokens, features], as a transformer in eval mode calls it."""
    tokens = tokens(x)
    return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.0).reshape(x.shape)


@pytest.mark.parametrize("fuse", [True, False])
def test_attention_is_certified_where_it_is_within_an_image(fuse, rng):
    """Torch says of every attention that it may draw random numbers, for the dropout in it."""
    x = torch.rand(3, 3, 8, 8)
    within, across = Batch(lambda x: attention(x, lambda x: x.view(-1, 1, 4, 1))), Batch(lambda x: attention(x, lambda x: x[None, None]))
    assert rse_fast.certify(rse_fast.Ensemble(within, fuse=fuse), x, n0=5, n=100).votes.sum() == 3 * 100
    with pytest.raises(ValueError, match="beside another image"):
        rse_fast.certify(rse_fast.Ensemble(across, fuse=fuse), x, n0=5, n=100)


def test_rows_are_compared_with_another_image_also_where_the_first_is_grey():
    for grey in (0.0, 0.5, 1.0):
        with pytest.raises(ValueError, match="beside another image"):
            rse_fast.certify(rse_fast.Ensemble(Batch(SHARED["statistics of the batch"][0])), torch.full((2, 3, 8, 8), grey), n0=5, n=100)


@pytest.mark.parametrize("name", FINE)
def test_models_with_noise_at_the_input(name, rng):
    model = FINE[name]()
    number_layers(model)
    model.train()
    x, state = torch.rand(2, 3, 8, 8), torch.get_rng_state()
    found = input_noise(model, x)
    assert float(found.sigma) == pytest.approx(0.3)
    assert torch.equal(state, torch.get_rng_state()) and all(m.training for m in model.modules())


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name, rng):
    make, what = REFUSED[name]
    model = make().eval()
    number_layers(model)
    x = torch.rand(2, 3, 8, 8)
    before = x.clone()
    with pytest.raises(ValueError, match=f"to be certified.*{what}"):
        input_noise(model, x)
    assert torch.equal(x, before)


def test_noise_that_is_switched_off(rng):
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten()), 0.3, 0.1)
    ensemble, x = rse_fast.Ensemble(model), torch.rand(1, 3, 8, 8)
    model[0].noise_enabled = False
    with pytest.raises(ValueError, match=r"input noise on to be certified, got the noise at the input \(0\) switched off"):
        rse_fast.certify(ensemble, x)
    model[0].noise_enabled, model[1].noise_enabled = True, False  # inner noise is not what the radius is made of
    assert rse_fast.certify(ensemble, x, n=20).sigma == pytest.approx(0.3)


def test_a_learned_sigma_can_be_fixed(rng):
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.3, learnable=True)
    with pytest.raises(ValueError, match=r"requires_grad_\(False\) fixes it"):
        input_noise(model, torch.rand(1, 3, 8, 8))
    model[0].sigma_raw.requires_grad_(False)
    assert input_noise(model, torch.rand(1, 3, 8, 8)) is model[0]


class Tool:
    """Records what passes through a layer, and holds what cannot be copied."""

    def __init__(self):
        self.lock, self.seen = threading.Lock(), []

    def record(self, module, args, out):
        self.seen.append(out.shape)


def test_a_tool_that_cannot_be_copied_is_no_hindrance():
    model = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
    x, ensemble = torch.rand(1, 3, 8, 8), rse_fast.Ensemble(model, 3)
    number_layers(model)
    expected, tool = rse_fast.certify(ensemble, x, n0=5, n=20, seed=1), Tool()
    model[1].register_forward_hook(tool.record)
    assert torch.equal(rse_fast.certify(ensemble, x, n0=5, n=20, seed=1).votes, expected.votes) and tool.seen


def test_a_hook_that_reads_the_image_is_refused():
    model = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
    number_layers(model)
    images = []
    model.register_forward_pre_hook(lambda module, args: images.append(args[0].mean()))
    model.register_forward_hook(lambda module, args, out: out + images[-1])
    with pytest.raises(ValueError, match="reading it"):
        input_noise(model, torch.rand(1, 3, 8, 8))
