"""Draws that certificates need, on simulated votes: `python -m rse_fast.bench.certificates` writes bench/results/certificates.md and .png.

No network runs: a vote is a success with probability p, the class's share of votes. Every procedure sees votes of the same p. Beside the
package's confidence sequence there are

- the fixed number of draws of Cohen, Rosenfeld & Kolter (ICML 2019);
- input-specific sampling (Chen et al., AAAI 2022): a pilot of `PILOT` draws gives an interval of p, and n is the least number of draws
  whose radius is at most `TOLERANCE` sigma smaller than that of all draws, for the worst p in it. Here the pilot's votes, which chose n,
  are not counted again, so that the Clopper-Pearson bound holds;
- looks at n, n / 2, n / 4, ..., alpha split evenly over them, images given up when an upper bound of the same level is below the goal;
- the one-sided beta-binomial mixture martingale (Robbins 1970): q uniform on (p0, 1) against p0, stopped when the mixture of likelihood
  ratios reaches 1 / alpha (Ville). It looks and gives up when the package's sequence does.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from rse_fast import confidence

N, ALPHA, PILOT, TOLERANCE = 100_000, 1e-3, 100, 0.05
SHARES = (0.3, 0.5, 0.7, 0.8, 0.83, 0.84, 0.845, 0.85, 0.86, 0.88, 0.9, 0.95, 0.99, 0.999)
RADIUS = 1.0  # "radius >= sigma?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="simulated images of each share (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/certificates.md"))
    args = parser.parse_args()
    text = write(args.images, np.random.default_rng(args.seed), args.out.with_suffix(".png"), args.seed)
    args.out.write_text(text)
    print(text)


# ----------------------------------------------------------------------------------------------------------- procedures: (proven, draws)
def votes(p: np.ndarray, rng: np.random.Generator):
    return lambda active, start, stop: rng.binomial(stop - start, p[active])


def fixed(p, goal, rng):
    lower, _ = confidence.clopper_pearson(rng.binomial(N, p), N, ALPHA)
    return lower, np.full(len(p), N)


def sequence(p, goal, rng):
    return confidence.estimate(votes(p, rng), len(p), N, ALPHA, confidence.reaching([goal]))


def split(p, goal, rng):
    looks = [N]
    while looks[0] >= 100:
        looks.insert(0, math.ceil(looks[0] / 2))
    best, taken, count, start, active = np.zeros(len(p)), np.zeros(len(p), int), np.zeros(len(p), int), 0, np.arange(len(p))
    for stop in looks:
        count[active] += rng.binomial(stop - start, p[active])
        lower, upper = confidence.clopper_pearson(count[active], stop, ALPHA / len(looks))
        taken[active], best[active] = stop, np.maximum(best[active], lower)
        active, start = active[(best[active] < goal) & (upper >= goal)], stop
    return best, taken


def log_mixture(successes: np.ndarray, draws: int, p0: float) -> np.ndarray:
    """log of the mean over q uniform on (p0, 1) of (likelihood of q / likelihood of p0)."""
    from scipy.special import betaln, log_ndtr
    from scipy.stats import beta

    failures = draws - successes
    tail = beta.logsf(p0, successes + 1, failures + 1)  # of the posterior; where it underflows the ratio is far below 1
    tail = np.where(np.isfinite(tail), tail, log_ndtr(-40.0))
    return betaln(successes + 1, failures + 1) + tail - math.log1p(-p0) - successes * math.log(p0) - failures * math.log1p(-p0)


def mixture(p, goal, rng):
    from scipy.special import ndtri

    looks = [m for m, _ in confidence.schedule(N, ALPHA, True)]
    won, taken, count, start, active = np.zeros(len(p), bool), np.zeros(len(p), int), np.zeros(len(p), int), 0, np.arange(len(p))
    last = confidence.schedule(N, ALPHA, True)[-1][1]
    for stop in looks:
        count[active] += rng.binomial(stop - start, p[active])
        taken[active], start = stop, stop
        won[active] = log_mixture(count[active], stop, goal) >= math.log(1 / ALPHA)
        _, likely = confidence.clopper_pearson(count[active], stop, confidence.GIVE_UP)
        rest = N - stop
        many = np.minimum(np.ceil(rest * likely - ndtri(confidence.GIVE_UP) * np.sqrt(rest * likely * (1 - likely))), rest)
        hoped, _ = confidence.clopper_pearson(count[active] + many, N, last)
        active = active[~won[active] & (hoped >= goal)]
    return np.where(won, goal, 0.0), taken


def radius(p):
    from scipy.special import ndtri

    return ndtri(np.maximum(p, 0.5))


class InputSpecific:
    """Input-specific sampling; n for each p is made once, for p in steps of 0.001 and n in steps of 1/500 of all draws."""

    def __init__(self):
        self.grid = np.arange(501) / 1000 + 0.5
        sizes = np.unique(np.concatenate([np.arange(50, 2000, 50), np.linspace(2000, N, 491).astype(int)]))
        best = radius(confidence.clopper_pearson(self.grid * N, N, ALPHA)[0])
        self.n = np.full(len(self.grid), N)
        for size in sizes[::-1]:
            small = radius(confidence.clopper_pearson(self.grid * size, size, ALPHA)[0])
            self.n = np.where(small >= best - TOLERANCE, size, self.n)
        self.n[best <= TOLERANCE] = 0

    def __call__(self, p, goal, rng):
        low, high = confidence.clopper_pearson(rng.binomial(PILOT, p), PILOT, ALPHA / 2)
        first, last = (np.searchsorted(self.grid, np.clip(v, 0.5, 1)) for v in (low, high))
        n = np.array([self.n[max(a - 1, 0) : b + 1].max() for a, b in zip(first, last, strict=True)])
        n[high < 0.5] = 0
        lower = [float(confidence.clopper_pearson(rng.binomial(m, q), m, ALPHA)[0]) if m else 0.0 for m, q in zip(n, p, strict=True)]
        return np.array(lower), n


def tolerant(p, goal, rng):
    return confidence.estimate(votes(p, rng), len(p), N, ALPHA, confidence.within(TOLERANCE))


# -------------------------------------------------------------------------------------------------------------------------- the page
VOTES = Path(__file__).parent / "results" / "cifar10" / "votes.json"  # of 100 certified images each


def populations(rng: np.random.Generator, images: int) -> dict[str, np.ndarray]:
    """Shares of images as one meets them: uniform, and those of certified CIFAR-10 images, each from its votes' Beta posterior."""
    found = {"uniform on (1/2, 1)": rng.uniform(0.5, 1, 5 * images)}
    for defence, counted in json.loads(VOTES.read_text()).items():
        k, n = (np.resize(counted[name], 5 * images) for name in ("votes", "draws"))
        found[f"CIFAR-10, `{defence}`"] = rng.beta(k + 0.5, n - k + 0.5)
    return found


def write(images: int, rng: np.random.Generator, picture: Path, seed: int) -> str:
    from scipy.special import ndtr

    goal = float(ndtr(RADIUS))
    methods = {"alpha split over looks": split, "Robbins mixture": mixture, "confidence sequence": sequence}
    out = [
        "# Draws that certificates need",
        "",
        f"Made by `python -m rse_fast.bench.certificates --images {images} --seed {seed}`, which says what the procedures are. Votes are",
        f"simulated, no network runs. n = {N:,}, alpha = {ALPHA:g}. A cell is the mean number of estimation draws of an image, in brackets",
        f"how many times fewer than {N:,}. The draws that select the class (100) come on top for all.",
        "",
        f'## "radius >= sigma" (share p >= {goal:.4f})',
        "",
        "Proven: share of images for which the answer was yes, of fixed n and of the confidence sequence.",
        "",
        "| p | " + " | ".join(methods) + " | proven, fixed n | proven, sequence |",
        "|---|" + "---|" * (len(methods) + 2),
    ]
    cell = lambda draws: f"{draws.mean():,.0f} ({N / max(draws.mean(), 1):,.1f}x)"  # noqa: E731
    for name, p in [(f"{s:g}", np.full(images, s)) for s in SHARES] + list(populations(rng, images).items()):
        runs = {method: run(p, goal, rng) for method, run in {"fixed": fixed, **methods}.items()}
        proven = [(runs[m][0] >= goal).mean() for m in ("fixed", "confidence sequence")]
        out.append(f"| {name} | " + " | ".join(cell(runs[m][1]) for m in methods) + " | " + " | ".join(f"{v:.1%}" for v in proven) + " |")
    out += [
        "",
        f"## Full radii, at most about {TOLERANCE:g} sigma smaller than those of {N:,} draws",
        "",
        "Input-specific sampling is the procedure of Chen et al., the sequence is `tolerance=`. The radii, in sigma, are means.",
        "",
        "| p | draws, input-specific | draws, sequence | radius, fixed n | radius, input-specific | radius, sequence |",
        "|---|---|---|---|---|---|",
    ]
    specific = InputSpecific()
    for name, p in [(f"{s:g}", np.full(images, s)) for s in SHARES if s > 0.5] + list(populations(rng, images).items()):
        runs = [run(p, goal, rng) for run in (fixed, specific, tolerant)]
        out.append(f"| {name} | {cell(runs[1][1])} | {cell(runs[2][1])} | " + " | ".join(f"{radius(r[0]).mean():.3f}" for r in runs) + " |")
    out += ["", *randomised(rng), "", *coverage(images * 10, rng, picture)]
    return "\n".join(out) + "\n"


def randomised(rng: np.random.Generator) -> list[str]:
    lines = [
        "## Randomised bound: the mean radius in sigma on the same votes",
        "",
        "| n | p | Clopper-Pearson | randomised | larger by |",
        "|---|---|---|---|---|",
    ]
    for n in (100, 1000, 10_000):
        for p in (0.7, 0.9, 0.99, 0.999):
            k = rng.binomial(n, p, 1000)
            plain = radius(confidence.clopper_pearson(k, n, ALPHA)[0]).mean()
            larger = radius(confidence.randomised_clopper_pearson(k, n, ALPHA, rng.uniform(size=1000))).mean()
            lines.append(f"| {n:,} | {p:g} | {plain:.4f} | {larger:.4f} | {larger / plain - 1:.1%} |")
    return lines


def coverage(images: int, rng: np.random.Generator, picture: Path) -> list[str]:
    """How often a bound is wrong, for the worst rule of stopping: at the first look whose bound is wrong."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n, alpha, shares = 2000, 0.05, np.array([0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995])
    never = lambda proven, expected, hoped: np.zeros(len(proven), bool)  # noqa: E731
    wrong = {"confidence sequence, worst stop": [], "Clopper-Pearson, all n draws": [], "Clopper-Pearson at each look, worst stop": []}
    looks = [m for m, _ in confidence.schedule(n, alpha, True)]
    for p in shares:
        each = np.full(images, p)
        for name, rule in (("confidence sequence, worst stop", never), ("Clopper-Pearson, all n draws", None)):
            wrong[name].append((confidence.estimate(votes(each, rng), images, n, alpha, rule)[0] > p).mean())
        count = np.cumsum(rng.binomial(np.diff(looks, prepend=0)[:, None], p, (len(looks), images)), 0)
        bounds = np.array([confidence.clopper_pearson(k, m, alpha)[0] for k, m in zip(count, looks, strict=True)])
        wrong["Clopper-Pearson at each look, worst stop"].append((bounds.max(0) > p).mean())
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in wrong.items():
        error = 1.96 * np.sqrt(np.array(values) * (1 - np.array(values)) / images)
        axes.errorbar(shares, values, error, label=name, marker="o", markersize=3, capsize=2)
    axes.axhline(alpha, color="black", linewidth=1, linestyle="--", label=f"alpha = {alpha:g}")
    axes.set(xlabel="share of votes p", ylabel="bounds that are wrong", ylim=(0, None), title=f"n = {n}, {images} images a point")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(picture, format="png", dpi=120)
    return [
        "## Coverage",
        "",
        f"Share of bounds that are wrong, n = {n}, alpha = {alpha:g}, {images} images at each p; the largest of the shares at p from "
        f"{shares[0]:g} to {shares[-1]:g}. The worst stop is the first look whose bound is wrong.",
        "",
        *[f"- {name}: {max(values):.4f}" for name, values in wrong.items()],
        "",
        f"![share of wrong bounds against p]({picture.name})",
    ]


if __name__ == "__main__":
    main()
