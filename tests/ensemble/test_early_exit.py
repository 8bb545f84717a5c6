"""Early exit: exactness against the worst remaining draws, miscoverage of the betting criterion by simulation, states and grouping."""

import math

import pytest
import torch
from scipy import stats

from rse_fast.ensemble import early_exit

pytestmark = pytest.mark.usefixtures("rng", "one_thread")


def softmax_draws(draws: int, images: int, classes: int, spread: float = 3.0, noise: float = 1.0) -> torch.Tensor:
    """float32 [draws, images, classes], images from clear to undecided."""
    means = spread * torch.randn(images, classes)
    return (means + noise * torch.randn(draws, images, classes)).softmax(-1)


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, classes).float()


def run(criterion, p: torch.Tensor, sizes: list[int] | None = None):
    """The final state, and decided [draws, images], of draws fed in rounds of the given sizes."""
    state, decided = criterion.start(p.shape[1], p.device), []
    for part in p.split(sizes or [1] * len(p)):
        state, now = criterion.update(state, part)
        decided.append(now)
    return state, torch.cat(decided)


def first_exit(decided: torch.Tensor) -> torch.Tensor:
    """Draws at the first decision, the number of draws + 1 where there is none; int64 [images]."""
    return torch.where(decided.any(0), decided.int().argmax(0) + 1, len(decided) + 1)


# make


def test_make():
    assert early_exit.make(None, 10, 3) is None
    assert isinstance(early_exit.make("exact", 10, 3), early_exit.Exact)
    assert early_exit.make(0.99, 10, 3) == early_exit.Betting(0.99, 3)


@pytest.mark.parametrize("bad", [0.5, 1.0, 1, 0, True, False, -0.9, 99.9, math.nan, "Exact", "", [0.9], 0.9j, torch.zeros(2)])
def test_make_refuses_early_exit(bad):
    with pytest.raises(ValueError, match=r"early_exit must be None, \"exact\" or a confidence in \(0\.5, 1\), got"):
        early_exit.make(bad, 10, 3)


@pytest.mark.parametrize(
    "name, arguments", [("draws", (0, 3)), ("classes", (10, 0)), ("rounding", (10, 3, -0.1)), ("rounding", (10, 3, 1))]
)
def test_make_refuses_the_rest(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must be .* got"):
        early_exit.make("exact", *arguments)


# exact


def hard_for_exact(draws: int, images: int, classes: int) -> torch.Tensor:
    """Logits [draws, images, K]. A third of the images have saturated draws, so that leads are whole numbers and often exactly equal to
    the draws that remain; a third has one favourite class; a third has none."""
    logits = 2 * torch.randn(draws, images, classes)
    third = images // 3
    winner = torch.where(torch.rand(draws, third) < 0.7, 0, torch.randint(classes, (draws, third)))
    logits[:, :third] = 200 * one_hot(winner, classes)
    logits[:, third : 2 * third, 0] += 6 * torch.rand(third)
    return logits[..., torch.randperm(classes)]


@pytest.mark.parametrize(
    "draws, classes", [(1, 2), (1, 10), (2, 2), (2, 3), (3, 10), (10, 2), (10, 3), (10, 10), (10, 300), (57, 2), (57, 10)]
)
def test_exact_label_survives_the_worst_remaining_draws(draws, classes):
    """Each decided image is finished with every remaining draw on one rival, the second or the third, after the draws it has seen were
    computed again with logits moved against the leader by ``rounding``, and in another order of summation."""
    images, rounding = 90, 2**-4
    logits = hard_for_exact(draws, images, classes)
    _, decided = run(early_exit.make("exact", draws, classes, rounding), logits.softmax(-1), [draws])
    assert decided[-1].any()
    for used in range(1, draws + 1):
        label, *rivals = logits[:used].softmax(-1).sum(0, dtype=torch.float64).topk(min(3, classes), -1).indices.unbind(-1)
        for rival in rivals:
            moved = logits[:used] + rounding * (one_hot(rival, classes) - one_hot(label, classes))
            rest = (1 + 2**-23) * one_hot(rival, classes)  # a softmax value that was rounded up
            mean = (moved.softmax(-1).double().flip(0).sum(0) + (draws - used) * rest.double()) / draws
            assert not ((mean.argmax(-1) != label) & decided[used - 1]).any(), used


@pytest.mark.parametrize("draws", [1, 2, 9, 10, 100])
def test_exact_decides_as_soon_as_it_may(draws):
    """Whatever is not decided could still change, but for the slack; and certain images need just over half of the draws."""
    criterion = early_exit.make("exact", draws, 10, rounding=2**-12)
    p = softmax_draws(draws, 60, 10)
    _, decided = run(criterion, p)
    leads = p.double().cumsum(0).topk(2, -1).values
    remaining = draws - torch.arange(1, draws + 1)[:, None]
    spare = leads[..., 0] - leads[..., 1] - remaining
    assert (spare[~decided] < 2 * draws * 2**-12).all()
    _, certain = run(criterion, one_hot(torch.full((draws, 1), 7), 10))
    assert first_exit(certain).item() == draws // 2 + 1


def test_exact_never_decides_a_tie():
    """A lead equal to the draws that remain allows a tie at the end."""
    p = one_hot(torch.tensor([[0], [0], [0], [1]]), 3)
    _, decided = run(early_exit.make("exact", 6, 3, rounding=0), p)  # leads 1, 2, 3, 2 with 5, 4, 3, 2 to come
    assert not decided.any()
    _, decided = run(early_exit.make("exact", 5, 3, rounding=0), p)  # 3 with 2 to come; then 2 with 1 to come
    assert decided[:, 0].tolist() == [False, False, True, True]
    _, decided = run(early_exit.make("exact", 2, 2), torch.full((2, 1, 2), 0.5))
    assert not decided.any()


def test_exact_allows_for_softmax_values_above_one():
    """The lead is 1 + 2^-24 with one draw to come, which float32 may make 1 + 2^-23."""
    p = torch.tensor([[1, 0], [1, 0], [2**-24, 1]])[:, None]
    _, decided = run(early_exit.make("exact", 4, 2, rounding=0), p)
    assert not decided[2].any()


# betting


def expected_decisions(p: torch.Tensor, delta: float) -> list[bool]:
    """Of one image, float64 draws [T, K]: the rule of `Betting` in plain Python."""
    classes = p.shape[1]
    bets = [0.98 / 2**i for i in range(6)]
    capital = [[7 / 6 / ((i + 1) * (i + 2)) for i in range(6)] for _ in range(classes)]
    sums, rejected, decided = [0.0] * classes, set(), []
    for t, draw in enumerate(p.tolist()):
        if t > 0:
            leader = sums.index(max(sums))
            for k in range(classes):
                capital[k] = [c * (1 + b * (draw[leader] - draw[k])) for c, b in zip(capital[k], bets, strict=True)]
        rejected |= {k for k in range(classes) if sum(capital[k]) >= 1 / delta}
        sums = [s + value for s, value in zip(sums, draw, strict=True)]
        decided.append(rejected | {sums.index(max(sums))} == set(range(classes)))
    return decided


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_betting_follows_its_rule(classes):
    p = softmax_draws(80, 30, classes, spread=1.0, noise=2.0)
    _, decided = run(early_exit.make(0.9, 80, classes), p, [80])
    for image in range(30):
        assert decided[:, image].tolist() == expected_decisions(p[:, image].double(), 1 - 0.9)
    assert classes == 1 or 0 < decided.float().mean() < 1


def bernoulli(share: float, classes: int):
    """Saturated draws: the largest possible variance. Class 0 wins a little more often than class 1."""
    probabilities = torch.full((classes,), 0.1 / max(1, classes - 2))
    probabilities[:2] = torch.tensor([share, 1 - share]) * (0.9 if classes > 2 else 1)
    return lambda draws, images, g: one_hot(torch.multinomial(probabilities, draws * images, True, generator=g).view(draws, -1), classes)


def rare_event(chance: float, classes: int):
    """Class 1 leads by a little in nearly every draw, class 0 takes a rare draw whole and has the larger expectation, by little. An
    interval that trusts the variance seen so far fails here."""
    lead = 0.999 * chance / (1 - chance)
    usual = torch.full((classes,), 0.1 / classes)
    usual[:2] += (1 - usual.sum()) / 2 + torch.tensor([-lead / 2, lead / 2])
    rare = one_hot(torch.tensor(0), classes)
    return lambda draws, images, g: torch.where(torch.rand(draws, images, 1, generator=g) < chance, rare, usual)


def logit_normal(gap: float, noise: float, classes: int):
    """Two classes at gap, the others far below; the logits of class 0 vary no more than the others, so its expectation is the largest."""
    means = torch.full((classes,), -4.0)
    means[:2] = torch.tensor([gap, 0.0])
    return lambda draws, images, g: (means + noise * torch.randn(draws, images, classes, generator=g)).softmax(-1)


@pytest.mark.parametrize(
    "law, delta, images, draws",
    [
        pytest.param(bernoulli(0.501, 2), 0.05, 3000, 300, id="bernoulli-2"),
        pytest.param(rare_event(0.05, 2), 0.05, 3000, 300, id="rare-2"),
        pytest.param(logit_normal(0.01, 3, 2), 0.05, 3000, 300, id="logits-2"),
        pytest.param(bernoulli(0.501, 10), 0.05, 1500, 200, id="bernoulli-10"),
        pytest.param(rare_event(0.02, 10), 0.05, 2000, 300, id="rare-10"),
        pytest.param(logit_normal(0.01, 2, 10), 0.05, 1500, 200, id="logits-10"),
        pytest.param(bernoulli(0.501, 2), 0.01, 15_000, 200, id="bernoulli-2-sure"),
        pytest.param(rare_event(0.05, 2), 0.01, 15_000, 200, id="rare-2-sure"),
        pytest.param(logit_normal(0.01, 2, 100), 0.2, 400, 100, id="logits-100"),
    ],
)
def test_miscoverage_is_below_delta(law, delta, images, draws):
    """A label can be wrong, at any time of stopping, only where the truth, class 0, was ever rejected: that is counted. Seeded; the
    upper confidence limit of the rate (Clopper-Pearson, 99.9 %) must be below delta."""
    generator = torch.Generator().manual_seed(20240229)
    criterion = early_exit.make(1 - delta, draws, law(1, 1, generator).shape[-1])
    state = criterion.start(images, "cpu")
    wrong = right = torch.zeros(images, dtype=torch.bool)
    for _ in range(draws // 10):
        state, decided = criterion.update(state, law(10, images, generator))
        label = state.sums.argmax(-1)
        wrong, right = wrong | decided[-1] & (label != 0), right | decided[-1] & (label == 0)
    truth_rejected = state.rejected[:, 0]
    assert not (wrong & ~truth_rejected).any()
    assert right.any() and wrong.any()
    errors = int(truth_rejected.sum())
    assert stats.beta.ppf(0.999, errors + 1, images - errors) < delta, f"{errors} of {images}"


@pytest.mark.parametrize("confidence", [0.95, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confident_images_leave_early(confidence, classes):
    """The largest bet alone, with over half of the capital, multiplies it by 1.98 or nearly so from the second draw on."""
    p = (torch.randn(60, 40, classes) + 9 * one_hot(torch.tensor(0), classes)).softmax(-1)
    gain = (p[..., :1] - p[..., 1:]).double().mean().item()
    exits = first_exit(run(early_exit.make(confidence, 60, classes), p)[1]).double().mean().item()
    assert exits < 2 + math.log(2 / (1 - confidence)) / math.log(1 + 0.98 * gain)


def test_moderate_images_leave_near_the_best_possible_time():
    """Gap 0.3 with standard deviation 0.3: with one bet, of the best size, the capital grows by the rate of Kelly."""
    p = torch.distributions.Dirichlet(torch.tensor([0.65, 0.35]) * 9.1).sample((300, 400))
    gain = (p[..., 0] - p[..., 1]).double()
    rate = max((1 + bet / 50 * gain).log().mean().item() for bet in range(1, 50))
    exits = first_exit(run(early_exit.make(0.999, 300, 2), p, [20] * 15)[1]).double().mean().item()
    assert exits < 1.2 * (1 + math.log(1000) / rate)


def test_betting_outlives_extreme_capitals():
    """Capitals overflow and underflow where draws go on for long after the decision; nothing becomes NaN, and nothing is forgotten."""
    p = one_hot(torch.cat([torch.zeros(3000, 1), torch.ones(7000, 1)]).long(), 3)
    state, decided = run(early_exit.make(0.999, 10_000, 3), p, [1000] * 10)
    assert not state.capital.isnan().any()
    assert first_exit(decided).item() == 12
    assert decided[11:6000].all()


# both


CRITERIA = [early_exit.make("exact", 40, 7), early_exit.make(0.9, 40, 7)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("criterion", CRITERIA, ids=["exact", "betting"])
def test_grouping_into_rounds_does_not_matter(criterion):
    p = softmax_draws(40, 50, 7)
    state, decided = run(criterion, p)
    assert 0 < decided[-1].sum() and not decided[20].all()
    for sizes in ([40], [1, 2, 4, 8, 16, 9], [13, 0, 27]):
        other_state, other = run(criterion, p, sizes)
        assert equal(state, other_state) and torch.equal(decided, other)


@pytest.mark.parametrize("criterion", CRITERIA, ids=["exact", "betting"])
def test_places_come_and_go(criterion, rng):
    """Images that leave and arrive, each at its own number of draws, get what each gets alone."""
    p = softmax_draws(40, 12, 7, spread=2.0)
    alone = [run(criterion, p[:, i : i + 1]) for i in range(12)]
    waiting, active, seen, state = list(range(12)), [], {}, criterion.start(0, "cpu")
    while waiting or active:
        arrived = [waiting.pop(0) for _ in range(min(rng.integers(1, 4), len(waiting)))]
        state = early_exit.cat([state, criterion.start(len(arrived), "cpu")])
        active += arrived
        assert state.used.tolist() == [len(seen.get(i, [])) for i in active]
        draws = int(rng.integers(1, 1 + min(5, *(40 - len(seen.get(i, [])) for i in active))))
        part = torch.stack([p[len(seen.get(i, [])) :][:draws, i] for i in active], 1)
        state, decided = criterion.update(state, part)
        for row, i in enumerate(active):
            seen[i] = seen.get(i, []) + decided[:, row].tolist()
        stay = torch.tensor([len(seen[i]) < 40 for i in active])
        for row in (~stay).nonzero().flatten().tolist():
            assert equal(state.select(slice(row, row + 1)), alone[active[row]][0])
        state, active = state.select(stay), [i for i, s in zip(active, stay.tolist(), strict=True) if s]
        order = torch.randperm(len(active))
        state, active = state.select(order), [active[i] for i in order]
    assert all(seen[i] == alone[i][1][:, 0].tolist() for i in range(12))


@pytest.mark.parametrize("criterion", CRITERIA, ids=["exact", "betting"])
def test_needed_is_a_lower_bound_that_the_best_draws_attain(criterion):
    p = softmax_draws(40, 50, 7)
    state = criterion.start(50, "cpu")
    _, decided = run(criterion, p)
    for used in range(30):
        needed = criterion.needed(state)
        assert needed.dtype == torch.int64 and (needed >= 1).all()
        too_early = torch.arange(1, 41 - used)[:, None] < needed
        assert not (decided[used:] & too_early).any()
        _, best = run(early_exit_from(criterion, state), one_hot(state.sums.argmax(-1), 7).expand(40, -1, -1))
        assert (first_exit(best) >= needed).all()
        if used == 0 or isinstance(criterion, early_exit.Exact):  # later, several bets share the capital of one class
            assert (first_exit(best) == needed).all()
        state, _ = criterion.update(state, p[used : used + 1])


class early_exit_from:
    """A criterion that starts from a given state."""

    def __init__(self, criterion, state):
        self.update, self.start = criterion.update, lambda images, device: state


@pytest.mark.parametrize("choice", ["exact", 0.9])
def test_one_class_and_one_draw(choice):
    single = early_exit.make(choice, 5, 1)
    assert run(single, torch.ones(5, 3, 1))[1].all()
    assert single.needed(single.start(3, "cpu")).max() <= 2
    once = early_exit.make(choice, 1, 4)
    assert once.needed(once.start(2, "cpu")).min() >= 1
    _, decided = run(once, one_hot(torch.tensor([[2, 3]]), 4))
    assert decided.all() if choice == "exact" else not decided.any()


@pytest.mark.parametrize("criterion", CRITERIA, ids=["exact", "betting"])
def test_no_images_and_what_is_not_a_number(criterion):
    state, decided = criterion.update(criterion.start(0, "cpu"), torch.zeros(3, 0, 7))
    assert decided.shape == (3, 0) and criterion.needed(state).shape == (0,)
    p = one_hot(torch.zeros(40, 2).long(), 7)
    p[1, 0, 3] = p[30, 1] = math.nan
    state, decided = run(criterion, p, [40])
    assert not decided[:, 0].any() and decided[29, 1] and not decided[30:, 1].any()
    assert (criterion.needed(state) >= 1).all()
