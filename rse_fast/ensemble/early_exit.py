"""When the draws of an image suffice: its label can change no more, or is known at a stated confidence.

A criterion is made once for an ensemble (`make`). It keeps no data itself: what it knows of a set of images is a `State`, one row an
image, whose rows may stand at different numbers of draws and can be dropped (`State.select`) and joined (`cat`). Every criterion has

    start(images, device) -> State      of images without draws
    update(state, p) -> State, decided  p float32 [draws, images, K], the softmax of the next draws of each image;
                                        decided bool [draws, images]: after that draw, the class with the largest sum is the label
    needed(state) -> int64 [images]     fewest further draws before `update` can call an image decided, >= 1

Draws are judged one by one, in order, so what is decided after a draw does not depend on how the draws were grouped into calls. An image
of which all draws are taken is finished whatever `update` says; that is the caller's business, as is which class wins a tie.
A state holds a few numbers a class; `update` needs for a moment what `p` has, times four (`Exact`) or forty (`Betting`).
"""

import math
import numbers
from dataclasses import dataclass

import torch

# The largest bet and how often it is halved. Below 1, so that a capital stays positive whatever a draw brings.
MAX_BET = 0.98
BETS = 6


@dataclass(frozen=True)
class State:
    """sums float64 [A, K] of softmax over the draws seen; used int64 [A], how many they were."""

    sums: torch.Tensor
    used: torch.Tensor

    def select(self, rows: torch.Tensor):
        """The state of some images: ``rows`` is an index or a mask over A, or a slice."""
        return type(self)(*(tensor[rows] for tensor in vars(self).values()))


def cat(states: list[State]) -> State:
    """Joins states of one criterion, in order."""
    return type(states[0])(*(torch.cat(tensors) for tensors in zip(*(vars(s).values() for s in states), strict=True)))


def make(early_exit: None | str | float, draws: int, classes: int, rounding: float = 2**-4) -> "Exact | Betting | None":
    """The criterion that ``early_exit`` names: None, "exact", or a confidence in (0.5, 1).

    draws: of the full ensemble, >= 1; classes: >= 1; rounding: of `Exact`. Raises ValueError naming the argument.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws!r}")
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes!r}")
    if not 0 <= rounding < 1:
        raise ValueError(f"rounding must be in [0, 1), got {rounding!r}")
    if early_exit is None:
        return None
    if isinstance(early_exit, str) and early_exit == "exact":
        return Exact(draws, classes, rounding)
    if isinstance(early_exit, numbers.Real) and 0.5 < early_exit < 1:
        return Betting(float(early_exit), classes)
    raise ValueError(f'early_exit must be None, "exact" or a confidence in (0.5, 1), got {early_exit!r}')


@dataclass(frozen=True)
class Exact:
    """Decided when no outcome of the remaining draws can change the label of the full ensemble.

    After t of n draws the leader is ahead of every other class by at least D in summed softmax. A draw changes a lead by at most 1, so
    D > n - t settles it in exact arithmetic. The label shall also be that of a full ensemble computed separately, in packed batches of
    another size, where every value may be rounded otherwise. With u = 2^-24, v = 2^-53, D must therefore exceed n - t by

    - ``rounding`` for each draw seen: the largest difference that another batch makes to a logit. A draw's lead, p_a - p_b, changes by no
      more than its logits do: with d = p_a - p_b >= 0 its derivatives add up in magnitude to
      p_a (1 - d) + p_b (1 + d) + (1 - p_a - p_b) d = 2 p_a (1 - d) <= (1 + d) (1 - d) <= 1. The default, 2^-4, is one unit in the last
      place of a bfloat16 logit in [8, 16) and lengthens the shortest run by 3 %; float32 logits that size differ by about 1e-5.
    - 4 e n, where e = (2 K + 32) u bounds the error of one softmax value computed in float32 as exp(log_softmax): K u for the sum over
      classes, less than (K + 16) u for the logarithm and the exponentials. Four values enter for each draw seen (two classes, two
      computations), and a value of a remaining draw is at most 1 + e. The remaining 16 u are for the float64 sums of both computations
      and the division by n, which may round two different sums to one mean: no more than 8 n^2 v <= 64 n u for n <= 2^32.
    """

    draws: int
    classes: int
    rounding: float

    def start(self, images: int, device: torch.device | str) -> State:
        sums = torch.zeros(images, self.classes, dtype=torch.float64, device=device)
        return State(sums, torch.zeros(images, dtype=torch.int64, device=device))

    def update(self, state: State, p: torch.Tensor) -> tuple[State, torch.Tensor]:
        sums = _running(state.sums, p)  # [1 + draws, images, K]
        used = state.used + torch.arange(1, len(p) + 1, device=p.device)[:, None]
        decided = self._lead(sums[1:]) > self.draws - used + self._slack(used)
        return State(sums[-1].clone(), state.used + len(p)), decided

    def needed(self, state: State) -> torch.Tensor:
        # After r more draws of the leader alone: lead + r > draws - used - r + slack(used + r).
        short = self.draws - state.used + self._slack(state.used) - self._lead(state.sums)
        return (short / (2 - self.rounding)).nan_to_num(0, self.draws, 0).ceil().long().clamp_min(1)

    def _slack(self, used):
        return used * self.rounding + 4 * self.draws * (2 * self.classes + 32) * 2**-24

    def _lead(self, sums):
        """Of the largest sum over the next one, [...] of [..., K]; infinite for a single class."""
        if self.classes == 1:
            return torch.full_like(sums[..., 0], math.inf)
        first, second = sums.topk(2, -1).values.unbind(-1)
        return first - second


@dataclass(frozen=True)
class Bets(State):
    """capital float64 [A, BETS, K], of each bet against each class; rejected bool [A, K]."""

    capital: torch.Tensor
    rejected: torch.Tensor


@dataclass(frozen=True)
class Betting:
    """Decided when, at ``confidence``, the label is the class with the largest expected softmax, that of infinitely many draws.

    The draws of an image are independent with one distribution; let mu_k be the expectation of the softmax of class k. For every class k
    a gambler bets that k is not the best class. He starts with capital 1. Before each draw he picks a class a by what he has seen until
    then: the one with the largest sum so far (he sits out the first draw). The draw multiplies his capital by 1 + b (p_a - p_k), with b
    in (0, 1). If mu_k is in fact the largest, the expected factor is 1 + b (mu_a - mu_k) <= 1 **whichever class he picks**. So his
    capital is a nonnegative supermartingale, a mixture of capitals over several b is one too, and the probability that it ever reaches
    1/delta is at most delta (Ville). Class k is rejected from the moment its gambler's capital reaches 1/delta. The image is decided
    when every class but the one with the largest sum is rejected.

    A wrong decision implies that the truly best class was rejected. That is one event with one gambler, so the probability of a wrong
    decision **at any time** is at most delta = 1 - confidence: over all draws, however many, for any rule of stopping and any grouping
    into rounds; there is no union over classes, and a change of leader costs nothing. If several classes are equally best, any of them
    is right, and the same holds with one of them. Images are treated separately: the probability is per image.

    The bets are 0.98, 0.49, ... 0.03. Nearly every profile of interest wants the largest (a confident image needs
    1 + ceil(log(12 / (7 delta)) / log(1.98)) draws, 12 for 0.999); a small lead m with large variance s^2 wants b = m / s^2 or so, and
    needs many draws anyway. So the shares 7/6 / ((i + 1)(i + 2)) fall slowly; they add up to 1.

    Source: betting as in Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting, JRSS B 86 (2024) 1-27, Ville's
    inequality (1939).
    """

    confidence: float
    classes: int

    def start(self, images: int, device: torch.device | str) -> Bets:
        i = torch.arange(BETS, dtype=torch.float64, device=device)
        share = (BETS + 1) / BETS / ((i + 1) * (i + 2))
        return Bets(
            sums=torch.zeros(images, self.classes, dtype=torch.float64, device=device),
            used=torch.zeros(images, dtype=torch.int64, device=device),
            capital=share[:, None].repeat(images, 1, self.classes),
            rejected=torch.zeros(images, self.classes, dtype=torch.bool, device=device),
        )

    def update(self, state: Bets, p: torch.Tensor) -> tuple[Bets, torch.Tensor]:
        sums = _running(state.sums, p)  # [1 + draws, images, K]
        p = p.double()
        gain = p.gather(-1, sums[:-1].argmax(-1, keepdim=True)) - p  # of the leader before each draw
        gain[:1].masked_fill_((state.used == 0)[:, None], 0)
        bets = MAX_BET * 0.5 ** torch.arange(BETS, dtype=torch.float64, device=p.device)
        # Plain products: a capital that overflows stays infinite, long after its class was rejected; one that underflows stays 0, which
        # errs on the safe side.
        factors = (bets[:, None] * gain[:, :, None]).add_(1)
        capital = torch.cat([state.capital[None], factors]).cumprod_(0)  # [1 + draws, images, BETS, K]
        reached = capital[1:].sum(2) >= 1 / (1 - self.confidence)
        rejected = torch.cat([state.rejected[None], reached]).cumsum(0) > 0  # [1 + draws, images, K]
        top = torch.nn.functional.one_hot(sums[1:].argmax(-1), self.classes).bool()
        decided = (rejected[1:] | top).all(-1) & sums[1:].isfinite().all(-1)
        return Bets(sums[-1].clone(), state.used + len(p), capital[-1].clone(), rejected[-1].clone()), decided

    def needed(self, state: Bets) -> torch.Tensor:
        # Every draw multiplies a capital by at most 1 + MAX_BET; one class, the label, need not be rejected.
        factor = 1 / (1 - self.confidence) / state.capital.sum(1)
        draws = (factor.log() / math.log1p(MAX_BET)).masked_fill(state.rejected, 0).nan_to_num(0, 2.0**31, 0)
        draws = draws.topk(min(2, self.classes), -1).values[:, -1] if self.classes > 1 else torch.zeros_like(draws[:, 0])
        return (draws.ceil().long() + (state.used == 0)).clamp_min(1)


def _running(sums, p):
    """float64 [1 + draws, ...]: ``sums``, and what they are after each draw of ``p``."""
    return torch.cat([sums[None], p.double()]).cumsum(0)
