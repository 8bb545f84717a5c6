"""How many cases a fuzz test runs, and the strategies that several of them share: tensors in any memory layout, numbers of any kind.

Every test has a share of `TOTAL` cases: a few hundred in `make test`, 20,000 in `make fuzz`.
"""

import os
import re

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

TOTAL = int(os.environ.get("RSE_FAST_FUZZ_CASES") or 500)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-40, 6e-8, -1e-30, 300.0, -6e4, 1e30)
NOT_FINITE = (float("inf"), float("-inf"), float("nan"), 3.4028234663852886e38)


def cases(share: float):
    """The decorator of a test that takes ``share`` of all cases."""
    wanted = max(1, round(share * TOTAL))
    slow = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much)
    return settings(
        max_examples=wanted, deadline=None, database=None, print_blob=True, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=slow,
    )  # fmt: skip


class Unchanged:
    """``with Unchanged(tensor, ...)``: what the tensors' memory holds is the same bytes afterwards, and torch's generator has not moved."""

    def __init__(self, *values):
        self.tensors = [v for v in values if isinstance(v, torch.Tensor) and v.layout == torch.strided and not v.is_meta]

    def __enter__(self):
        self.before = [_bytes(t).clone() for t in self.tensors]
        self.state = torch.get_rng_state()

    def __exit__(self, *error):
        if error[0] is None:
            assert all(map(torch.equal, self.before, map(_bytes, self.tensors))), "an input was changed"
            assert torch.equal(self.state, torch.get_rng_state()), "torch's generator was used"


def _bytes(tensor):
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return whole


def names(error: BaseException, argument: str) -> bool:
    """Whether the error's text names the argument as a word."""
    return re.search(rf"\b{re.escape(argument)}\b", str(error)) is not None


# --------------------------------------------------------------------------------------------------------------------- strategies
def shapes(least: int, most: int, largest: int = 3000, sides=(0, 1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 17, 33)) -> st.SearchStrategy:
    """Shapes of ``least`` to ``most`` dimensions and at most ``largest`` elements."""
    sizes = st.lists(st.sampled_from(sides), min_size=least, max_size=most)
    return sizes.map(tuple).filter(lambda shape: np.prod(shape, dtype=np.int64) <= largest)


@st.composite
def tensors(draw, shape, dtype, special=True):
    """A tensor of that shape and dtype: contiguous, channels last, transposed, expanded, a part of a larger one, or overlapping itself."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["contiguous", "channels last", "transposed", "expanded", "offset", "steps", "overlapping", "negative"]))
    values = rng.standard_normal(shape) * 2.0 ** draw(st.integers(-3, 2))
    if special and values.size and draw(st.booleans()):
        chosen = SPECIAL + (NOT_FINITE if draw(st.booleans()) else ())
        places = rng.integers(values.size, size=1 + values.size // 5)
        values.reshape(-1)[places] = rng.choice(chosen, len(places))
    value = torch.from_numpy(np.asarray(values)).to(dtype)
    rank = len(shape)
    if kind == "channels last" and rank >= 3:
        return value.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "transposed" and rank >= 2:
        a, b = draw(st.integers(0, rank - 1)), draw(st.integers(0, rank - 1))
        return value.transpose(a, b).contiguous().transpose(a, b)
    if kind == "expanded" and rank >= 1:
        d = draw(st.integers(0, rank - 1))
        return value.narrow(d, 0, min(1, shape[d])).expand(shape)
    if kind == "offset" and rank >= 1:
        room = torch.full([n + 2 for n in shape], 7.0, dtype=dtype)
        part = room[tuple(slice(1, n + 1) for n in shape)]
        part.copy_(value)
        return part
    if kind == "steps" and rank >= 1:
        room = torch.full([2 * n for n in shape], 7.0, dtype=dtype)
        part = room[tuple(slice(None, None, 2) for _ in shape)]
        part.copy_(value)
        return part
    if kind == "overlapping" and rank >= 1 and value.numel():
        flat = value.reshape(-1)
        strides = [draw(st.sampled_from([0, 1, 1, 2])) for _ in shape]
        reach = sum(s * (n - 1) for s, n in zip(strides, shape, strict=True))
        flat = flat.repeat(reach // max(len(flat), 1) + 1)
        return flat.as_strided(shape, strides)
    if kind == "negative" and rank >= 1:
        return torch._neg_view(-value)
    return value


class Index:
    """An integer as other libraries have them."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def integers(values: st.SearchStrategy) -> st.SearchStrategy:
    """The same integers in any form that Python calls an integer."""
    forms = (int, int, np.int64, Index, torch.tensor)
    return st.tuples(values, st.sampled_from(forms)).map(lambda pair: pair[1](pair[0]) if -(2**63) <= pair[0] < 2**63 else pair[0])


SEEDS = st.one_of(
    st.integers(0, 2**32),
    st.sampled_from([0, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30, -(10**30)]),
    integers(st.integers(-(2**63), 2**63 - 1)),
)
BAD_SEEDS = st.sampled_from(
    [True, False, 1.5, "1", None, [1], torch.tensor(True), torch.tensor([1, 2]), torch.tensor(1.0), np.bool_(True), np.float64(1)]
)
NO_COUNTS = st.sampled_from(
    [True, 1.0, "2", None, [1], torch.tensor(True), torch.tensor([1, 2]), np.float32(1), np.bool_(True), float("nan")]
)
THREADS = st.sampled_from([1, 1, 1, 2, 3, 5])
