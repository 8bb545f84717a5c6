"""Which layer `convert` takes for the first: the one executed first, found without leaving a trace in the model."""

import pytest
import torch
from module_state import assert_unchanged, fingerprint
from torch import nn

import rse_fast


def sigmas(model):
    return {layer.name: round(layer.sigma, 6) for layer in rse_fast.describe(model).layers}


class Block(nn.Module):
    """A residual block whose shortcut is defined first and called last."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv2(self.conv1(x).relu()) + self.shortcut(x)


class OutOfOrder(nn.Module):
    """Defined late, early; called early, late. What stands between is up to ``forward``."""

    def __init__(self):
        super().__init__()
        self.late = nn.Conv2d(4, 4, 3)
        self.unused = nn.Conv2d(5, 5, 3)
        self.early = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.late(self.early(x).relu())


class DataDependent(OutOfOrder):
    """Cannot be traced; on a device without data it gets as far as the first layer."""

    def forward(self, x):
        y = self.early(x)
        return self.late(y) if y.sum() > 0 else y


class Unpacks(OutOfOrder):
    def forward(self, *inputs):
        (x,) = inputs
        return super().forward(x)


class NormFirst(DataDependent):
    """Runs only with the channels that the layer defined last wants."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return super().forward(self.norm(x))


class Unknowable(OutOfOrder):
    """Looks at the data before anything else."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class TwoInputs(DataDependent):
    def forward(self, x, y):
        return super().forward(x) + y


class Uncopyable(OutOfOrder):
    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


class Nested(nn.Module):
    """The first layer sits in one of torch.nn's own modules."""

    def __init__(self):
        super().__init__()
        self.late = nn.Linear(8, 8)
        self.early = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)

    def forward(self, x):
        return self.late(self.early(x))


@pytest.mark.parametrize("cls", [OutOfOrder, DataDependent, Unpacks, NormFirst])
def test_first_layer_is_the_one_called_first(cls):
    assert sigmas(rse_fast.convert(cls(), 0.5, 0.25)) == {"late": 0.25, "unused": 0.25, "early": 0.5}


@pytest.mark.parametrize("cls", [Unknowable, TwoInputs, Uncopyable])
def test_first_layer_is_the_first_defined_where_nothing_tells(cls):
    assert sigmas(rse_fast.convert(cls(), 0.5, 0.25)) == {"late": 0.5, "unused": 0.25, "early": 0.25}


def test_first_layer_among_those_selected():
    assert sigmas(rse_fast.convert(OutOfOrder(), 0.5, 0.25, exclude="early")) == {"late": 0.5, "unused": 0.25}


def test_first_layer_in_a_block_whose_shortcut_is_defined_first():
    found = sigmas(rse_fast.convert(Block(), 0.5, 0.25))
    assert found == {"shortcut": 0.25, "conv1": 0.5, "conv2": 0.25}


def test_first_layer_inside_a_container_of_torch():
    found = sigmas(rse_fast.convert(Nested(), 0.5, 0.25, include=nn.Linear, exclude="*out_proj"))
    assert found["late"] == 0.25 and found["early.linear1"] == 0.5


class Keeper(nn.Module):
    """A forward with side effects of every kind."""

    def __init__(self, traceable):
        super().__init__()
        self.late, self.norm, self.early = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
        self.traceable, self.calls, self.seen, self.last = traceable, 0, [], None

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.seen.append(x)
        x = self.norm(x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).to(x) + torch.rand(1).to(x))
        if not self.traceable and x.device.type != "meta" and x.sum() > 1e9:
            return x
        return self.late(self.early(x))


@pytest.mark.parametrize("traceable", [True, False])
def test_finding_the_first_layer_leaves_no_trace(traceable, rng):
    model, hooked = Keeper(traceable), []
    model.norm.register_forward_pre_hook(lambda m, args: hooked.append(args))
    model.early.register_forward_pre_hook(lambda m, args: hooked.append(args))
    before, rng_state = fingerprint(model), torch.get_rng_state()
    rse_fast.convert(model, 0.5, 0.25)
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert sigmas(model)["early"] == 0.5
    assert not hooked and not model.seen
    rse_fast.revert(model)
    assert_unchanged(model, before)


class Tool:
    def record(self, module, args, out):
        raise AssertionError("a run that nobody asked for")

    def __deepcopy__(self, memo):
        raise AssertionError("a tool must not be copied")


def test_a_hook_whose_owner_cannot_be_copied_hides_no_order():
    model = OutOfOrder().eval()
    model.late.register_forward_hook(Tool().record)
    rse_fast.convert(model)
    assert sigmas(model) == {"late": 0.1, "unused": 0.1, "early": 0.2}


def test_a_tensor_that_the_meta_device_does_not_have_hides_no_order():
    model = OutOfOrder().eval()
    model.kept = [torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8)]
    rse_fast.convert(model)
    assert sigmas(model) == {"late": 0.1, "unused": 0.1, "early": 0.2}
