"""Images of a shape that the model does not take: every entry says what they must be, before anything runs."""

import math
import re

import pytest
import torch
from small_nets import NETS
from torch import nn

import rse_fast
from rse_fast.ensemble import Ensemble
from rse_fast.ensemble.unfit import unfit

ENTRIES = {
    "rows": lambda ensemble, x: ensemble.rows(x),
    "predict": lambda ensemble, x: ensemble.predict(x),
    "forward": lambda ensemble, x: ensemble(x),
    "stream": lambda ensemble, x: list(ensemble.stream([x])),
    "certify": lambda ensemble, x: rse_fast.certify(ensemble, x, n0=1, n=20),
}
NAMES = {"stream": "batch"}  # what each knows the images as, where that is not x
BATCH = r"must be \[N, C, H, W\] with C = 3 channels, got shape "


def image_network():
    return rse_fast.convert(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    ).eval()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 8), (2, 3, 8, 8, 8), (2, 1, 8, 8), (2, 4, 8, 8), (0, 4, 8, 8)])
@pytest.mark.parametrize("entry", ["rows", "predict", "forward", "stream"])
def test_a_wrong_rank_or_number_of_channels_is_told(entry, shape, fuse, recwarn):
    with pytest.raises(ValueError, match=f"^{NAMES.get(entry, 'x')} {BATCH}{re.escape(str(shape))}$"):
        ENTRIES[entry](Ensemble(image_network(), 3, fuse=fuse), torch.rand(shape))
    assert not recwarn.list


@pytest.mark.parametrize("shape, advice", [((3, 8, 9), r"x\[None\] for one image"), ((2, 8, 9, 3), r"x\.movedim\(-1, 1\) if its channels")])
def test_a_likely_mistake_comes_with_the_line_to_write(shape, advice):
    with pytest.raises(ValueError, match=f"^x {BATCH}.*; write {advice}"):
        Ensemble(image_network(), 3).predict(torch.rand(shape))


def test_the_layer_behind_that_gets_a_wrong_size_is_named(tmp_path):
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)))
    wrong = torch.rand(2, 3, 9, 8)
    text = r" of shape \(2, 3, 9, 8\) does not fit the model: its layer '2' must get \[N, ..., F\] with F = 144 features, got \[N, 168\]$"
    for name, entry in ENTRIES.items():
        with pytest.raises(ValueError, match=f"^{NAMES.get(name, 'x')}{text}"):
            entry(Ensemble(model, 3), wrong)
    with pytest.raises(ValueError, match="^example" + text):
        rse_fast.export(Ensemble(model, 3), wrong, tmp_path / "model.pt2")
    assert not any(tmp_path.iterdir())
    assert Ensemble(model, 3).predict(torch.rand(2, 3, 8, 8)).labels.shape == (2,)


def test_a_normalisation_that_gets_other_channels_is_told():
    wrapped = rse_fast.with_input_noise(image_network(), 0.1, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    first = nn.Sequential(nn.BatchNorm2d(3), *image_network()).eval()
    for model, rest in ((wrapped, "H, W"), (first, r"\.\.\.")):
        with pytest.raises(ValueError, match=rf"^x must be \[N, C, {rest}\] with C = 3 channels, got shape \(2, 4, 8, 8\)$"):
            Ensemble(model, 3).predict(torch.rand(2, 4, 8, 8))
        assert Ensemble(model, 3).predict(torch.rand(2, 3, 8, 8)).labels.shape == (2,)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3), (2, 3, 3, 8, 8), (3, 8, 8), (2, 8, 8, 3)])
@pytest.mark.parametrize("behind", ["convolution", "any number of channels"])
def test_a_normalisation_makes_no_channels(shape, behind, tmp_path):
    """torch's subtraction would give a grey picture three channels, and a network behind it an answer."""
    network = image_network() if behind == "convolution" else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    model, x = rse_fast.with_input_noise(network.eval(), 0.1, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)), torch.rand(shape)
    text = r" must be \[N, C, H, W\] with C = 3 channels.*, got shape " + re.escape(str(shape))
    kept = Ensemble(model, 3)
    kept.predict(torch.rand(2, 3, 8, 8))
    calls = [kept, Ensemble(model, 3), Ensemble(model, 3).predict, Ensemble(model, 3, fuse=False), lambda x: rse_fast.certify(kept, x, n=9)]
    for call in calls if len(shape) == 3 else [model, *calls]:  # one image without a batch dimension is no mistake there
        with pytest.raises(ValueError, match="^x" + text):
            call(x)
    with pytest.raises(ValueError, match="^example" + text):
        rse_fast.export(kept, x, tmp_path / "model.pt2")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_image_that_is_too_small_is_refused_exactly_where_torch_refuses_it(rank, rng):
    """Random kernels, paddings and dilations, and images whose size is next to the least one."""
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    for size in (2, 3):
        assert (unfit(convolution(2, 2, 3), torch.Size((1, 2, *[size] * rank))) is None) == (size == 3)
    for _ in range(30):
        kernel, dilation = (tuple(rng.integers(low, high, rank).tolist()) for low, high in ((1, 6), (1, 4)))
        padding = rng.choice(["numbers", "same", "valid"])
        padding = tuple(rng.integers(0, 3, rank).tolist()) if padding == "numbers" else str(padding)
        layer = convolution(2, 2, kernel, padding=padding, dilation=dilation)
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        pads = {"valid": [0] * rank, "same": [r // 2 for r in reach]}.get(padding, padding)
        size = [max(1, r - 2 * p + int(rng.integers(-1, 2))) for r, p in zip(reach, pads, strict=True)]
        x = torch.rand(1, 2, *size)
        try:
            layer(x)
            fits = True
        except RuntimeError:
            fits = False
        problem = unfit(layer, x.shape)
        assert (problem is None) == fits, (layer, size, problem)
        assert fits or "pixels" in problem


@pytest.mark.parametrize("name", NETS)
def test_images_that_fit_are_never_refused(name):
    assert unfit(NETS[name](), torch.Size((2, 3, 10, 10))) is None


def test_neither_the_model_nor_its_hooks_notice():
    model, seen = image_network(), []
    model[0].register_forward_hook(lambda *call: seen.append(call))
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    assert unfit(model, torch.Size((2, 4, 8, 8))) and unfit(model, torch.Size((2, 3, 8, 8))) is None
    assert not seen and before == [len(m._forward_pre_hooks) for m in model.modules()]


WRONG = {
    "channels": lambda e, entry: entry(e, torch.rand(2, 1, 8, 8)),
    "rank": lambda e, entry: entry(e, torch.rand(3, 8, 8)),
    "too small": lambda e, entry: entry(e, torch.rand(2, 3, 2, 8)),
    "no pixels": lambda e, entry: entry(e, torch.rand(2, 3, 0, 8)),
    "no images": lambda e, entry: entry(e, torch.rand(0, 1, 8, 8)),
    "wants a gradient": lambda e, entry: entry(e, torch.rand(2, 1, 8, 8, requires_grad=True)),
    "bytes": lambda e, entry: entry(e, torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
    "no data": lambda e, entry: entry(e, torch.rand(2, 3, 8, 8, device="meta")),
    "sparse": lambda e, entry: entry(e, torch.rand(2, 3, 8, 8).to_sparse()),
    "NaN seed": lambda e, entry: e.predict(torch.rand(2, 3, 8, 8), seed=torch.tensor(math.nan)),
    "seed without data": lambda e, entry: e.predict(torch.rand(2, 3, 8, 8), seed=torch.tensor(1, device="meta")),
    "offset": lambda e, entry: e.predict(torch.rand(2, 3, 8, 8), image_offset=2**32),
    "no draws": lambda e, entry: e.stream([torch.rand(2, 3, 8, 8)], draws=0),
    "draws": lambda e, entry: setattr(e, "draws", 0),
    "fixed": lambda e, entry: setattr(e, "dtype", "float16"),
    "export": lambda e, entry: rse_fast.export(e, torch.rand(2, 1, 8, 8), "never.pt2"),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_refused_leaves_what_was_made_ready(wrong, fuse, rng):
    """The next call is as quick as the one before: nothing is made anew."""
    ensemble, x = Ensemble(image_network(), 3, seed=int(rng.integers(2**62)), fuse=fuse), torch.rand(2, 3, 8, 8)
    ready, before = ensemble.prepared(x), ensemble.predict(x).probs
    for entry in ENTRIES.values():
        with pytest.raises((ValueError, TypeError, AttributeError)):
            WRONG[wrong](ensemble, entry)
    assert ensemble.prepared(x) is ready and torch.equal(ensemble.predict(x).probs, before)
