"""What a model may return, and what may be given to `predict`."""

import copy
import dataclasses
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

import rse_fast
from rse_fast import outputs
from rse_fast.ensemble import Ensemble

Pair = namedtuple("Pair", ["aux", "logits"])
Unnamed = namedtuple("Unnamed", ["features", "scores"])


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    logits: torch.Tensor


@dataclasses.dataclass
class Alone:
    scores: torch.Tensor


class ModelOutput(OrderedDict):
    """As Hugging Face's: a mapping that is also indexed by number and by attribute."""

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Wrapped(nn.Module):
    """A small network whose logits ``form`` puts among other results."""

    def __init__(self, network, form):
        super().__init__()
        self.network, self.form = network, form

    def forward(self, x):
        z = self.network(x)
        return self.form(z * 0 - 7, z)


def network(classes=3):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )  # fmt: skip


class Viewed(nn.Module):
    """A network that cannot run on maps that are channels last."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 3)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


FORMS = {
    "dict": lambda other, z: {"aux": other, "logits": z},
    "out": lambda other, z: OrderedDict(out=z, aux=other),
    "one entry": lambda other, z: {"scores": z},
    "model output": lambda other, z: ModelOutput(loss=other, logits=z),
    "dataclass": Result,
    "dataclass of one": lambda other, z: Alone(z),
    "named tuple": Pair,
    "tuple": lambda other, z: (z, other),
    "list": lambda other, z: [z, other],
}
NAMED = {
    "name": (lambda other, z: {"a": other, "scores": z}, "scores"),
    "index": (lambda other, z: (other, z), 1),
    "last": (lambda other, z: (other, z), -1),
    "attribute": (Result, "logits"),
    "function": (lambda other, z: {"a": [other, z]}, lambda out: out["a"][1]),
    "over the obvious": (lambda other, z: {"logits": other, "main": z}, "main"),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("form, logits", [*((f, None) for f in FORMS.values()), *NAMED.values()], ids=[*FORMS, *NAMED])
def test_logits_are_found_wherever_they_are(rng, form, logits, fuse):
    plain = rse_fast.convert(network())
    x = torch.from_numpy(rng.random((5, 3, 8, 8), dtype=np.float32))
    wanted = Ensemble(plain, 4, seed=3, dtype="float32", fuse=fuse)
    ensemble = Ensemble(Wrapped(copy.deepcopy(plain), form), 4, seed=3, dtype="float32", fuse=fuse, logits=logits)
    expected, got = wanted.predict(x), ensemble.predict(x)
    # The noise of a layer is addressed by its index, which a wrapper does not change: the same computation.
    torch.testing.assert_close(got.probs, expected.probs, rtol=1e-6, atol=1e-6)
    assert torch.equal(got.votes, expected.votes)
    streamed = torch.cat([p.probs for p in ensemble.stream(x.split(2))])
    torch.testing.assert_close(streamed, expected.probs, rtol=1e-6, atol=1e-6)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, value in zip((wanted, ensemble), inputs, strict=True):
        module(value)[:, 1].sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-7)
    assert inputs[0].grad.abs().max() > 0


@pytest.mark.parametrize("body", [network, Viewed])
def test_the_fused_snapshot_of_a_wrapped_model_is_used(body, recwarn):
    ensemble = Ensemble(Wrapped(rse_fast.convert(body()), Result), 2, dtype="float32")
    assert ensemble.prepared(torch.rand(2, 3, 8, 8)).problem is None
    assert not recwarn.list


def test_a_choice_holds_for_a_certificate(rng):
    plain = rse_fast.convert(network())
    x = torch.from_numpy(rng.random((3, 3, 8, 8), dtype=np.float32))
    options = dict(n0=8, n=64, alpha=0.05, seed=5)
    wanted = rse_fast.certify(Ensemble(plain, dtype="float32"), x, **options)
    got = rse_fast.certify(Ensemble(Wrapped(copy.deepcopy(plain), NAMED["index"][0]), dtype="float32", logits=1), x, **options)
    assert torch.equal(got.votes, wanted.votes) and torch.equal(got.labels, wanted.labels)


def test_the_weights_get_their_gradient_through_a_choice():
    model = Wrapped(rse_fast.convert(network()), NAMED["index"][0])
    Ensemble(model, 3, seed=1, dtype="float32", logits=1)(torch.rand(2, 3, 8, 8))[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "form, logits, message",
    [
        (lambda other, z: {"a": other, "b": z}, None, "got dict with 'a', 'b'; Ensemble\\(model, logits="),
        (lambda other, z: {"a": other}, "logits", "logits='logits' is not in what the model returns, dict with 'a'"),
        (lambda other, z: (other, z), 2, "logits=2 is not in what the model returns, tuple of 2"),
        (lambda other, z: z, "scores", "logits='scores' is not in"),
        (lambda other, z: None, None, "got NoneType"),
        (lambda other, z: ("label", z), None, "got tuple of 2, and there str"),
        (Unnamed, None, "got Unnamed with 'features', 'scores'"),
        (lambda other, z: {"logits": (z, other)}, None, "got dict with 'logits', and there tuple of 2"),
        (lambda other, z: z.argmax(1), None, "got a tensor of torch.int64"),
        (lambda other, z: (z.long(), z), None, "got tuple of 2, and there a tensor of torch.int64"),
    ],
)
def test_what_is_not_obvious_is_an_error_that_says_what_was_got(form, logits, message, recwarn):
    ensemble = Ensemble(Wrapped(rse_fast.convert(network()), form), 2, logits=logits)
    with pytest.raises(TypeError, match=message):
        ensemble.predict(torch.rand(2, 3, 8, 8))
    assert not recwarn.list


@pytest.mark.parametrize("logits", [1.5, True, ["logits"]])
def test_a_choice_that_is_none_is_refused(logits):
    with pytest.raises(TypeError, match="logits must be None, a name, an index or a function"):
        Ensemble(rse_fast.convert(network()), logits=logits)


# ------------------------------------------------------------------------------------------------ models that are no classifiers
@pytest.mark.parametrize("form", [lambda other, z: z, lambda other, z: z[:, 0]], ids=["[N, 1]", "[N]"])
def test_one_logit_is_refused_with_the_line_that_mends_it(form):
    model = rse_fast.convert(Wrapped(network(1), form))
    with pytest.raises(ValueError, match="regression.*rse-fast has no mean") as error:
        Ensemble(model).predict(torch.rand(2, 3, 8, 8))
    line = str(error.value).partition("logits=")[2].partition(")).")[0] + ")"
    x = torch.rand(4, 3, 8, 8)
    ensemble = Ensemble(model, 1, seed=0, dtype="float32", logits=eval(line))  # what the message says to write
    found = ensemble.predict(x)
    one = Ensemble(model, 1, seed=0, dtype="float32", logits=lambda z: torch.stack([z.flatten(), -z.flatten()], 1)).predict(x)
    # sigmoid(z) is the softmax of (0, z); that of (z, -z) is sigmoid(2 z).
    z = torch.logit(found.probs[:, 1].double())
    torch.testing.assert_close(torch.logit(one.probs[:, 0].double()), 2 * z, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("form", [lambda other, z: z.sigmoid(), lambda other, z: (torch.sigmoid(z), z)])
@pytest.mark.parametrize("body", [network, Viewed])
def test_sigmoids_are_refused(form, fuse, body):
    with pytest.raises(ValueError, match="sigmoid.*rse-fast has no mean"):
        Ensemble(rse_fast.convert(Wrapped(body(), form)), fuse=fuse).predict(torch.rand(2, 3, 8, 8))


def test_the_loss_that_comes_first_is_not_taken_for_logits_in_silence():
    model, x = rse_fast.convert(Wrapped(network(), lambda other, z: (z.sum(), z))), torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"got shape \(\); if it returns them elsewhere, Ensemble\(model, logits=...\) says where"):
        Ensemble(model).predict(x)
    assert Ensemble(model, logits=1).predict(x).probs.shape == (2, 3)


@pytest.mark.filterwarnings("ignore:rse-fast. the model runs unfused")
def test_random_numbers_behind_a_view_are_noticed():
    model = rse_fast.convert(Wrapped(Viewed(), lambda other, z: z + torch.rand_like(z)))
    ensemble, x = Ensemble(model, 2, seed=0), torch.rand(2, 3, 8, 8)
    state = torch.get_rng_state()
    assert ensemble.prepared(x).once
    assert torch.equal(torch.get_rng_state(), state)  # the probes' draws are given back


def test_a_sigmoid_within_a_model_is_no_matter():
    model = rse_fast.convert(Wrapped(network(), lambda other, z: z * z.sigmoid()))
    assert Ensemble(model, 2).predict(torch.rand(2, 3, 8, 8)).probs.shape == (2, 3)


@pytest.mark.parametrize("task", ["regression", "multi_label_classification"])
def test_the_task_of_a_hugging_face_configuration_is_believed(task):
    model = nn.Sequential(rse_fast.convert(network()))
    model[0].config = type("Config", (), {"problem_type": task})()
    with pytest.raises(ValueError, match=f"{task}.*rse-fast has no mean"):
        Ensemble(model)
    assert Ensemble(model, logits=lambda z: z)
    model[0].config.problem_type = "single_label_classification"
    assert Ensemble(model)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1, 1, 1)], ids=str)
def test_other_shapes_are_refused(shape):
    model = rse_fast.convert(Wrapped(network(12), lambda other, z: z.unflatten(1, shape)))
    with pytest.raises(ValueError, match=r"logits \[N, K\], or \[N, K, H, W\] of pixels"):
        Ensemble(model).predict(torch.rand(2, 3, 8, 8))


# ------------------------------------------------------------------------------------------------------------------- of pixels
class Segments(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, classes, 1))

    def forward(self, x):
        return {"out": self.body(x), "aux": x}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("noisy", [True, False])
def test_pixels_are_classified(rng, fuse, noisy):
    model = rse_fast.convert(Segments())
    for module in model.modules():
        module.noise_enabled = noisy
    x = torch.from_numpy(rng.random((5, 3, 6, 7), dtype=np.float32))
    draws, seed = 6, int(rng.integers(2**62))
    ensemble = Ensemble(model, draws, seed=seed, dtype="float32", fuse=fuse, max_rows=7)
    # The reference: one draw at a time, in float64, of the live model.
    live = copy.deepcopy(model).eval()
    logits = []
    for draw in range(draws):
        with rse_fast.context.NoiseContext(torch.tensor(seed), 5, 1, 0, draw), torch.no_grad():
            logits.append(live(x)["out"].double())
    p = torch.stack(logits).softmax(2)
    mean, entropy = p.mean(0), lambda p: -torch.special.xlogy(p, p).sum(-3)
    found = ensemble.predict(x)
    torch.testing.assert_close(found.probs.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), entropy(mean), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mutual_information.double(), entropy(mean) - entropy(p).mean(0), rtol=1e-4, atol=2e-6)
    counts = nn.functional.one_hot(p.argmax(2), 4).sum(0).movedim(-1, 1)
    assert ((found.votes - counts).abs().sum() <= 2) and (found.votes.sum(1) == draws).all()  # near ties round either way
    assert (found.labels == found.probs.argmax(1)).all() and found.labels.shape == (5, 6, 7)
    assert (found.draws_used == draws).all()
    parts = list(ensemble.stream(x.split([2, 0, 3])))
    torch.testing.assert_close(torch.cat([part.probs for part in parts]), found.probs, rtol=1e-5, atol=1e-6)
    assert [part.labels.shape for part in parts] == [(2, 6, 7), (0, 6, 7), (3, 6, 7)]
    assert torch.equal(torch.cat([part.votes for part in parts]).sum(1), found.votes.sum(1))
    torch.testing.assert_close(ensemble(x).exp(), found.probs, rtol=1e-5, atol=1e-6)
    assert ensemble(x[:0]).shape == ensemble.predict(x[:0]).probs.shape == (0, 4, 6, 7)


def test_an_attack_gets_the_gradient_of_every_pixel(rng):
    model = rse_fast.convert(Segments())
    x = torch.from_numpy(rng.random((2, 3, 5, 5), dtype=np.float32))
    labels = torch.from_numpy(rng.integers(0, 4, (2, 5, 5)))
    ensemble, live = Ensemble(model, 3, seed=7, dtype="float32"), copy.deepcopy(model).eval()
    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    nn.functional.nll_loss(ensemble(inputs[0]), labels).backward()
    p = 0
    for draw in range(3):
        with rse_fast.context.NoiseContext(torch.tensor(7), 2, 1, 0, draw):
            p = p + live(inputs[1].float())["out"].double().softmax(1) / 3
    nn.functional.nll_loss(p.log(), labels).backward()
    torch.testing.assert_close(inputs[0].grad.double(), inputs[1].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_masked_array_is_refused_with_the_line_to_write(dtype):
    model, x = rse_fast.convert(Segments()), np.ma.masked_less(np.ones((2, 3, 6, 6), dtype), 1)
    with pytest.raises(TypeError, match=r"got a masked one; write x.filled\(value\)"):
        Ensemble(model).predict(x)


def test_early_exit_and_certificates_are_refused_for_pixels():
    model, x = rse_fast.convert(Segments()), torch.rand(2, 3, 6, 6)
    for call in (lambda e: e.predict(x), lambda e: list(e.stream([x]))):
        with pytest.raises(ValueError, match="early_exit must be None for a model that classifies pixels"):
            call(Ensemble(model, early_exit="exact"))
    with pytest.raises(ValueError, match="one label to be certified"):
        rse_fast.certify(Ensemble(rse_fast.convert(Segments().body)), x, n0=2, n=4)


def test_a_pixel_that_is_nan_has_no_label():
    model = rse_fast.convert(Segments().body)
    x = torch.rand(2, 3, 6, 6)
    x[1, :, 5, 5] = torch.nan
    with pytest.warns(RuntimeWarning, match="NaN for 1 of 2 images"):
        found = Ensemble(model, 2).predict(x)
    assert (found.labels[1, 4:, 4:] == -1).all() and (found.labels[1, :4, :4] >= 0).all() and (found.labels[0] >= 0).all()


# --------------------------------------------------------------------------------------------------------- arrays and pictures
def test_arrays_and_pictures_are_the_tensors_that_they_mean(rng):
    from PIL import Image

    ensemble = Ensemble(rse_fast.convert(network()), 2, seed=0, dtype="float32")
    pixels = rng.integers(0, 256, (4, 9, 8, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).movedim(-1, 1).float() / 255
    wanted = ensemble.predict(x)
    pictures = [Image.fromarray(image) for image in pixels]
    kept = pixels.copy(), x.numpy().copy()
    for array in kept:
        array.flags.writeable = False
    foreign = x.numpy().astype(">f4"), x.numpy().astype(np.longdouble)
    for same in (
        pixels,
        x.numpy(),
        x.double().numpy(),
        pixels[:, ::-1][:, ::-1],
        pictures,
        tuple(pictures),
        np.asfortranarray(pixels),
        *kept,
        *foreign,
    ):
        assert torch.equal(ensemble.predict(same).probs, wanted.probs)
    for first in (pixels[0], pictures[0]):
        assert torch.equal(ensemble.predict(first).probs, ensemble.predict(x[:1]).probs)
    streamed = torch.cat([p.probs for p in ensemble.stream([pixels[:1], x[1:].numpy()])])
    torch.testing.assert_close(streamed, wanted.probs)


class Rearranged(nn.Module):
    """Its first convolution takes 12 channels, made of an image's 3."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(12, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv(nn.functional.pixel_unshuffle(x, 2)).mean((2, 3)))


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


@pytest.mark.parametrize("body", [Rearranged, dense])
def test_arrays_for_models_whose_first_convolution_does_not_tell_the_channels(rng, body):
    ensemble = Ensemble(rse_fast.convert(body(), include=(nn.Conv2d, nn.Linear)), 2, seed=0, dtype="float32")
    pixels = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).movedim(-1, 1).float() / 255
    for same in (pixels, x.numpy()):
        assert torch.equal(ensemble.predict(same).probs, ensemble.predict(x).probs)
    with pytest.raises(ValueError, match="channels lie elsewhere, write torch.from_numpy"):
        ensemble.predict(pixels.transpose(0, 3, 1, 2))


def test_grey_images_without_a_dimension_for_their_channel():
    grey = Ensemble(rse_fast.convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2))), 2)
    with pytest.raises(ValueError, match=r"write x\[None, None\]"):
        grey.predict(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=r"write x\[:, None\]"):
        grey.predict(torch.zeros(5, 8, 8))


def test_grey_pictures_are_for_models_of_one_channel(rng):
    from PIL import Image

    picture = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    assert Ensemble(rse_fast.convert(grey), 2).predict([picture, picture]).probs.shape == (2, 2)
    with pytest.raises(ValueError, match=r"mode 'RGB' for this model, got 'L'; write image.convert\('RGB'\)"):
        Ensemble(rse_fast.convert(network())).predict(picture)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 8, 8, 3), np.float32), "write x.transpose"),
        (np.zeros((2, 3, 8, 8), np.uint8), "write torch.from_numpy\\(x\\).float\\(\\) / 255"),
        (np.zeros((2, 3, 8, 3), np.uint8), "channels first or last"),
        (np.zeros((3,), np.float32), "write x\\[None\\]"),
        (np.zeros((2, 8), np.uint8), "must be \\[B, H, W, C\\].*write x\\[:, :, None\\]"),
        (np.zeros((8, 8, 3), np.float32), "write torch.as_tensor\\(x\\).movedim\\(-1, 0\\)\\[None\\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "write x.float\\(\\) / 255"),
        (np.zeros((2, 3, 8, 8), np.int64), "floats or of uint8"),
        ([np.zeros((8, 8, 3), np.uint8)], "got list of ndarray; write numpy.stack\\(x\\)"),
        ([torch.zeros(3, 8, 8)], "got list of Tensor; write torch.stack\\(x\\)"),
        ([], "got list of nothing"),
        ("image.png", "got str"),
    ],
    ids=str,
)
def test_what_could_mean_two_things_is_an_error_with_the_line_to_write(array, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Ensemble(rse_fast.convert(network())).predict(array)


def test_pictures_of_several_sizes_are_an_error():
    from PIL import Image

    with pytest.raises(ValueError, match="one size; write image.resize"):
        Ensemble(rse_fast.convert(network())).predict([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))])


def test_take_does_not_hide_an_error_of_the_users_function():
    def wrong(found):
        return found["nothing"]

    with pytest.raises(KeyError, match="nothing"):
        outputs.take({}, wrong)
