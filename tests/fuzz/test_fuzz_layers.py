"""Layers, convert and Ensemble on any input: what a plain loop in float64 gives, or an error that names the argument."""

import math
import warnings

import numpy as np
import pytest
import torch
from fuzzing import BAD_SEEDS, NO_COUNTS, SEEDS, THREADS, Unchanged, cases, names, shapes, tensors
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rse_fast
from rse_fast import reference
from rse_fast.context import NoiseContext
from rse_fast.ensemble import Ensemble
from rse_fast.nn import GaussianNoise, NoisyConv1d, NoisyConv2d, NoisyConv3d, NoisyLinear

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:rse-fast:RuntimeWarning")]
WORD = 2**32

# What nobody may take for a batch of images.
NO_INPUTS = st.sampled_from([None, 1.0, [1.0], [[1.0]], "x", np.zeros((2, 3)), torch.tensor(1.0), torch.zeros(2, 3).to_sparse()])
LAYERS = {
    1: lambda: NoisyConv1d(3, 4, 3, padding=1, sigma=0.5),
    2: lambda: NoisyConv2d(3, 4, (3, 2), stride=2, padding=1, sigma=torch.tensor([0.0, 0.5, 2.0])),
    3: lambda: NoisyConv3d(3, 3, 2, groups=3, sigma=0.5),
    "circular": lambda: NoisyConv2d(3, 4, 3, padding=1, padding_mode="circular", sigma=0.5),
    "linear": lambda: NoisyLinear(3, 4, sigma=0.5),
    "noise": lambda: GaussianNoise(0.5),
    "noise on the last": lambda: GaussianNoise(torch.tensor([0.0, 0.5, 2.0]), channel_dim=-1),
}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d, "circular": nn.Conv2d, "linear": nn.Linear}


@cases(0.1)
@given(data=st.data())
def test_layers(data):
    """A layer in a context gives the plain layer's result on its input plus the contract's noise; what it refuses it says, or the plain
    layer refuses it in the same words."""
    kind = data.draw(st.sampled_from(list(LAYERS)))
    layer = LAYERS[kind]()
    layer.stream = data.draw(st.integers(0, 2**16 - 1))
    torch.set_num_threads(data.draw(THREADS))
    if data.draw(st.integers(0, 4)) == 0:
        x, images, draws = data.draw(NO_INPUTS | shapes(0, 6).flatmap(lambda shape: tensors(shape, torch.float32))), None, 1
    else:
        rank = data.draw(st.sampled_from([kind + 2] if isinstance(kind, int) else [4] if kind == "circular" else [2, 3, 4]))
        shape = [data.draw(st.integers(0, 6)) for _ in range(rank)]
        shape[rank - 1 if kind in ("linear", "noise on the last") else 1] = 3
        x = data.draw(
            tensors(tuple(shape), data.draw(st.sampled_from([torch.float32] * 4 + [torch.float64, torch.bfloat16])), special=False)
        )
        images, draws = shape[0], data.draw(st.integers(1, 3))
    seed, image_offset, draw_offset = (
        data.draw(st.integers(-(2**63), 2**63 - 1)),
        data.draw(st.integers(0, WORD - 9)),
        data.draw(st.integers(0, WORD - 9)),
    )
    context = NoiseContext(torch.tensor(seed), images or 0, draws, image_offset, draw_offset)
    try:
        with Unchanged(x) if images is not None else warnings.catch_warnings():
            if images is None:
                y = layer(x)
            else:
                with context, torch.no_grad():
                    y = layer(x)
    except (ValueError, TypeError) as error:
        assert any(names(error, name) for name in ("x", "weight", "sigma")), error
        # A right call is not refused: of a layer's own dtype, as large as a kernel.
        assert images is None or x.dtype != torch.float32 or min(x.shape[2:], default=3) < 3, error
        return
    except RuntimeError as error:  # torch's own layer, of a geometry that it does not take
        with pytest.raises(RuntimeError) as plain, torch.no_grad():
            super(type(layer), layer)._conv_forward(x.unsqueeze(0) if x.dim() == layer.weight.dim() - 1 else x, layer.weight, layer.bias)
        assert str(plain.value).split(":")[0].split("[")[0] == str(error).split(":")[0].split("[")[0]
        return
    if images is None:
        return
    moved = x.double().movedim(-1, 1) if kind in ("linear", "noise on the last") else x.double()
    channels, spatial = moved.shape[1], math.prod(moved.shape[2:])
    eps = reference.gaussian(seed, layer.stream, images, draws, channels, spatial, image_offset, draw_offset)
    eps = torch.from_numpy(eps.transpose(0, 2, 1).reshape(images * draws, channels, *moved.shape[2:]))
    sigma = layer.current_sigma().double()
    noisy = torch.cat([moved] * draws) + sigma.reshape(-1, *[1] * (moved.dim() - 2)) * eps
    noisy = noisy.movedim(1, -1) if kind in ("linear", "noise on the last") else noisy
    if kind in PLAIN:
        plain = PLAIN[kind].__new__(PLAIN[kind])
        plain.__dict__.update(
            {**layer.__dict__, "_parameters": {n: None if p is None else p.double() for n, p in layer._parameters.items()}}
        )
        with torch.no_grad():
            wanted = plain(noisy)
    else:
        wanted = noisy
    size = noisy.abs().amax().item() if noisy.numel() else 0.0
    weights = layer.weight.abs().sum(tuple(range(1, layer.weight.dim()))).max().item() if kind in PLAIN else 1.0
    bound = (torch.finfo(x.dtype).eps + 4e-6) * (size * (weights + 1) * 2 + 1)
    assert y.shape == wanted.shape and y.dtype == x.dtype
    assert not y.numel() or (y.double() - wanted).abs().max() <= bound


@cases(0.02)
@given(data=st.data())
def test_convert_refuses_before_it_changes_anything(data):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(4, 2)))
    call = {"init_sigma": data.draw(st.sampled_from([0, 0.2, 1, np.float32(0.5), 3e38])), "inner_sigma": 0.1}
    call["include"] = data.draw(st.sampled_from([None, "1.*", nn.Conv2d, [nn.Linear, "0"], (nn.Conv2d, nn.Linear), "*"]))
    call["learnable"] = data.draw(st.sampled_from([False, False, True, "layer", "channel"]))
    numbers = st.sampled_from([-1, math.nan, math.inf, "1", None, True, [0.1], 1j, 10**400, torch.tensor(-1.0)])
    globs = st.sampled_from([1, [1], "", [], (), "nothing*", int, [None], nn.Module, b"1"])
    bad = {"init_sigma": numbers, "inner_sigma": numbers, "include": globs, "exclude": globs}
    bad["learnable"] = st.sampled_from(["x", 2, [], "", None])
    name = data.draw(st.sampled_from([None, "model", *bad]))
    target = model
    if name == "model":
        target = data.draw(st.sampled_from([None, 1, nn.Conv2d, "model", [model], nn.Sequential(), nn.ReLU()]))
    elif name is not None:
        call[name] = data.draw(bad[name])
    kinds = [type(m) for m in model.modules()]
    try:
        converted = rse_fast.convert(target, **call)
    except (ValueError, TypeError) as error:
        assert name is not None or 0 in call.values() and call["learnable"], error
        assert any(names(error, argument) for argument in (name, "model", "init_sigma") if argument), error
        assert [type(m) for m in model.modules()] == kinds
        return
    if name == "exclude":  # whatever matches nothing
        assert all(isinstance(part, (str, type)) for part in np.atleast_1d(np.array(call["exclude"], dtype=object)))
        return
    assert name is None or name == "include" and call["include"] in ("nothing*", nn.Module) or call[name] == [], (name, call[name])
    assert converted is target and [type(m) for m in model.modules()] != kinds


# ----------------------------------------------------------------------------------------------------------------------- ensemble
class Net(nn.Sequential):
    """Two noisy convolutions and a head, for images [N, 2, 5, 4]; 3 classes."""

    def __init__(self):
        super().__init__(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(8, 3))


MODELS = {}


def ensemble(**options):
    """One ensemble for each choice of options: the choice is what takes long."""
    key = tuple(options.items())
    if key not in MODELS:
        torch.manual_seed(len(MODELS))
        MODELS[key] = Ensemble(rse_fast.convert(Net(), 0.4, 0.3), draws=4, **options)
    return MODELS[key]


def plain_loop(model, x, seed, image_offset, draws):
    """Softmax of each draw, float64 [draws, B, K], with the reference's noise."""
    first, _, second, _, head = model
    rows = []
    for d in range(draws):
        y = x.double()
        for stream, layer in enumerate((first, second)):
            images, channels, *sides = y.shape
            eps = reference.gaussian(seed, stream, images, 1, channels, math.prod(sides), image_offset, d)
            y = y + layer.sigma.double() * torch.from_numpy(eps.transpose(0, 2, 1).reshape(y.shape))
            y = torch.conv2d(y, layer.weight.double(), layer.bias.double(), layer.stride, layer.padding)
            y = y.relu() if layer is first else y
        rows.append((y.flatten(1) @ head.weight.double().T + head.bias.double()).softmax(-1))
    return torch.stack(rows)


CALLS = ("forward", "predict", "stream")


@cases(0.06)
@given(data=st.data())
def test_ensembles(data):
    options = {"fuse": data.draw(st.booleans()), "max_rows": data.draw(st.sampled_from([None, 1, 2, 7, 1000]))}
    options |= {"early_exit": data.draw(st.sampled_from([None, None, "exact", 0.9])), "dtype": "float32"}
    options["backend"] = data.draw(st.sampled_from(["auto", "torch"]))
    found = ensemble(**options)
    call, torch_threads = data.draw(st.sampled_from(CALLS)), data.draw(THREADS)
    torch.set_num_threads(torch_threads)
    batch = data.draw(st.integers(0, 4))
    x = data.draw(tensors((batch, 2, 5, 4), data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])), special=False))
    if nan := batch and data.draw(st.integers(0, 4)) == 0:
        x = x.clone(memory_format=torch.contiguous_format)
        x[0, 0, 0, 0] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    seed = data.draw(SEEDS)
    image_offset = data.draw(st.integers(0, 9) | st.integers(WORD - 20, WORD - batch)) if call == "predict" else 0
    with torch.no_grad(), Unchanged(x):
        if call == "predict":
            prediction = found.predict(x, seed=seed, image_offset=image_offset)
        else:
            found.seed = int(seed) % 2**64
            prediction = found(x) if call == "forward" else list(found.stream([x[:1], x[1:]]))
    wanted = plain_loop(found.model, x.float(), int(seed), image_offset, found.draws)
    if call == "forward":
        probs, used = prediction.exp(), torch.full((batch,), found.draws)
    else:
        parts = [prediction] if call == "predict" else prediction
        probs, used = (
            torch.cat([p.probs for p in parts] or [torch.zeros(0, 3)]),
            torch.cat([p.draws_used for p in parts] or [torch.zeros(0)]),
        )
        labels = torch.cat([p.labels for p in parts] or [torch.zeros(0)])
        assert torch.equal(labels[~probs.isnan().any(-1)], probs.argmax(-1)[~probs.isnan().any(-1)])
        assert (labels[probs.isnan().any(-1)] == -1).all()
    assert probs.shape == (batch, 3)
    for i in range(batch):
        mean = wanted[: int(used[i]), i].mean(0)
        if i == 0 and nan and not mean.isfinite().all():
            continue  # infinite logits are numbers without bound, and softmax has none of them
        assert (probs[i].double() - mean).abs().max() <= 2e-4, (i, probs[i], mean)


@cases(0.03)
@given(data=st.data())
def test_ensembles_refuse_what_they_cannot_take(data):
    bad = {
        "x": NO_INPUTS | st.sampled_from([torch.zeros(3), torch.zeros(2, 2, 5, 4).int(), torch.zeros(1, 2, 0, 4), torch.zeros(1, 0, 5, 4)]),
        "seed": BAD_SEEDS.filter(lambda seed: seed is not None),
        "image_offset": NO_COUNTS | st.sampled_from([-1, WORD, 2**70]),
    }
    found = ensemble(fuse=True, max_rows=None, early_exit=data.draw(st.sampled_from([None, "exact"])), dtype="float32", backend="auto")
    name = data.draw(st.sampled_from(sorted(bad)))
    value = data.draw(bad[name])
    runs = [(name, lambda: found.predict(**{"x": torch.zeros(1, 2, 5, 4), name: value}))]
    if name == "x":
        runs += [("x", lambda: found(value)), ("batch", lambda: list(found.stream([value])))]
        if not isinstance(value, np.ndarray):  # an array of floats may be a batch: only the model knows that its rank is wrong
            runs.append(("x", lambda: found.rows(value)))
    for called, run in runs:
        with pytest.raises((ValueError, TypeError)) as caught:
            run()
        assert names(caught.value, called), caught.value
    wrong = {
        "draws": NO_COUNTS | st.sampled_from([0, -1, WORD + 1]),
        "seed": BAD_SEEDS.filter(lambda seed: seed is not None),
        "max_rows": NO_COUNTS.filter(lambda value: value is not None) | st.sampled_from([0, -1]),
        "dtype": st.sampled_from([None, "float", torch.float64, torch.int8, 1, ["float32"]]),
        "backend": st.sampled_from([None, 1, "cuda", ["cpu"]]),
        "early_exit": st.sampled_from(["x", 0, 0.5, 1.0, True, math.nan, -1, [0.9], "0.9"]),
        "algorithm": st.sampled_from([None, 1, "fft", ["auto"]]),
        "cuda_graphs": st.sampled_from(["x", 2, [], 0.5]),
    }
    name = data.draw(st.sampled_from(sorted(wrong)))
    value = data.draw(wrong[name])
    with pytest.raises((ValueError, TypeError)) as caught:
        Ensemble(found.model, **{name: value})
    assert names(caught.value, name), caught.value
