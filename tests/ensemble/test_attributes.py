"""Attributes of an Ensemble: which may be set after it was made, with what checks, and from when on they hold."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from small_nets import NETS
from torch import nn

from rse_fast import Ensemble

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def seed(rng):
    return int(rng.integers(2**64, dtype=np.uint64))


def images(rows):
    return torch.rand(rows, 3, 10, 10)


WRONG_LATER = {
    "draws": (0, -1, 2**32 + 1, 2.5, "3", None, True, torch.tensor(True)), "max_rows": (0, -4, 1.5, "all", False),
    "seed": (1.5, "7", True), "early_exit": (0.3, 1, "always", math.nan, True), "temperature": (0, -1.0, math.nan, "hot", True),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_LATER)
def test_what_is_set_later_is_checked_as_in_the_constructor(name, seed):
    ensemble, x = Ensemble(NETS["plain"](), 4, seed=seed, dtype="float32", max_rows=6, temperature=2.0), images(3)
    before, kept = ensemble.predict(x), getattr(ensemble, name)
    for wrong in WRONG_LATER[name]:
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
            setattr(ensemble, name, wrong)
    assert getattr(ensemble, name) == kept and torch.equal(ensemble.predict(x).probs, before.probs)


@pytest.mark.parametrize("fuse", [True, False])
def test_what_is_set_later_takes_effect_at_the_next_call(fuse, seed):
    model, x = NETS["plain"](), images(5)
    ensemble = Ensemble(model, 4, seed=seed + 1, fuse=fuse, dtype="float32")
    ensemble(x)
    for name, value in (("draws", 7), ("seed", seed), ("max_rows", 3), ("temperature", 1.7), ("early_exit", "exact")):
        setattr(ensemble, name, value)
    fresh = Ensemble(model, 7, seed=seed, fuse=fuse, dtype="float32", max_rows=3, temperature=1.7, early_exit="exact")
    assert ensemble.rows(x) == 3 and torch.equal(ensemble(x), fresh(x))
    found, wanted = ensemble.predict(x), fresh.predict(x)
    assert found.seed == seed and torch.equal(found.probs, wanted.probs) and torch.equal(found.draws_used, wanted.draws_used)
    for restored in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.equal(restored(x), fresh(x))


def test_what_a_snapshot_is_made_by_cannot_be_set_later(seed):
    ensemble, x = Ensemble(NETS["plain"](), 4, seed=seed, dtype="float32"), images(2)
    before = ensemble.predict(x).probs
    for name, value in (("dtype", "bfloat16"), ("fuse", False), ("backend", "torch"), ("algorithm", "direct"), ("calibration", [x]),
                        ("cuda_graphs", False), ("logits", 0), ("model", NETS["residual"]())):  # fmt: skip
        with pytest.raises(AttributeError, match=rf"^{name} of an Ensemble is fixed.*Ensemble\(model, {name}=...\)"):
            setattr(ensemble, name, value)
    assert torch.equal(ensemble.predict(x).probs, before)


def test_backward_is_that_of_its_forward_whatever_was_set_in_between(seed):
    model, x = NETS["smooth"](), images(3)
    weights = list(model.parameters())

    def gradients(change):
        ensemble = Ensemble(model, 3, seed=seed, dtype="float32", temperature=2.0)
        loss = nn.functional.nll_loss(ensemble(x), torch.arange(3))
        change(ensemble)
        return torch.autograd.grad(loss, weights)

    def change(ensemble):
        ensemble.draws, ensemble.seed, ensemble.temperature, ensemble.max_rows = 5, seed + 1, 0.5, 2

    for found, wanted in zip(gradients(change), gradients(lambda ensemble: None), strict=True):
        torch.testing.assert_close(found, wanted)
