"""What is run: a protocol is a list of cases, a case is one attack on one classifier at one strength."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

PAPER_C = (0.01, 0.03, 0.06, 0.1, 0.2, 0.4, 1.0)  # the columns of the paper's table
EOT = (1, 5, 20, 50)
LARGE = 1.0  # an L-infinity ball that holds every image


@dataclass(frozen=True)
class Case:
    """One attack.

    name: unique in a protocol; the key of its rows.
    method: clean, noise, fgsm, pgd, momentum (PGD on a running sum of gradients), cw (binary search for the smallest L2), cw-c (fixed c),
        apgd-ce, apgd-dlr, square, autoattack.
    norm: Linf or L2. eps: its radius, pixels in [0, 1]; None for clean, cw, cw-c.
    steps: iterations of the attack; queries for square. eot: draws behind each query of the attack.
    source: whose gradient is followed: "deployed" (the classifier itself); "mean-logits" (its draws, averaged before the softmax),
        "noise-off" (its network without noise), "fixed-draw" (one draw, the same at every step), "plain" (another network). All but the
        first are transfers.
    victim: what is scored: "deployed"; "noise-off", "fixed-seed" (the ensemble with one seed for all), both ablations.
    restarts: independent starts; the image whose true class is furthest behind another, in draws of their own, counts.
    c: weight of the margin in the loss of cw-c.
    by_draws: the images found are scored by ensembles of 1, 2, 5, ... draws as well.
    """

    name: str
    method: str
    norm: str = "Linf"
    eps: float | None = None
    steps: int = 1
    eot: int = 1
    source: str = "deployed"
    victim: str = "deployed"
    restarts: int = 1
    c: float | None = None
    by_draws: bool = False


@dataclass(frozen=True)
class Protocol:
    """images: number of test images by default, taken from the first on. text: what the protocol is for."""

    images: int
    text: str

    def cases(self, eps: Sequence[float], l2: float, draws: int, plain: bool) -> list[Case]:
        """The cases for L-infinity radii ``eps`` (the last is the main one), L2 radius ``l2``, an ensemble of ``draws``, and with a
        ``plain`` network to transfer from. ``draws`` = 0: a deterministic classifier, for which the cases about noise are left out."""
        made = {"clean": Case("clean", "clean", by_draws=True)}
        for case in _CASES[self](tuple(eps), l2, draws or 1):
            if case.source == "plain" and not plain:
                continue
            if not draws and (case.source not in ("deployed", "plain") or case.victim != "deployed"):
                continue
            if not draws:  # one pass says it all
                case = replace(case, eot=1, name=case.name.replace(f"-eot{case.eot}", ""))
            made.setdefault(case.name, case)
        return list(made.values())


def pgd(eps: float, steps: int, eot: int, norm: str = "Linf", **other) -> Case:
    suffix = "".join(f"-{value}" for key, value in other.items() if key in ("source", "victim"))
    suffix += f"-restarts{other['restarts']}" if "restarts" in other else ""
    return Case(f"pgd{steps}-{norm}-{eps:.4g}-eot{eot}{suffix}", "pgd", norm, eps, steps, eot, **other)


def _main(eps, eot):
    return pgd(eps[-1], 20, eot, by_draws=eot == 20)


def _square(eps, queries, draws):
    """In more draws than are deployed: the best image so far is kept by the answer it had, which shall not be a lucky one."""
    return Case(f"square-Linf-{eps:.4g}-{queries}", "square", "Linf", eps, queries, max(40, draws))


def _quick(eps, l2, draws):
    yield Case(f"noise-Linf-{eps[-1]:.4g}", "noise", eps=eps[-1])
    yield Case(f"fgsm-Linf-{eps[-1]:.4g}-eot20", "fgsm", eps=eps[-1], eot=20)
    for eot in EOT[:3]:
        yield from (pgd(e, 20, eot) for e in eps[:-1])
        yield _main(eps, eot)
    yield pgd(l2, 20, 20, "L2")
    yield pgd(LARGE, 40, 5)


def _paper(eps, l2, draws):
    for c in PAPER_C:
        yield Case(f"cw-c{c:g}-eot{draws}", "cw-c", "L2", None, 300, draws, c=c)


def _adaptive(eps, l2, draws):
    main = eps[-1]
    yield from _sanity(eps, l2, draws)
    for eot in EOT:
        yield from (pgd(e, 20, eot) for e in eps[:-1])
        yield _main(eps, eot)
    yield from (pgd(main, 40, eot) for eot in EOT)
    yield pgd(main, 40, 20, restarts=5)
    for norm, radius in (("Linf", main), ("L2", l2)):
        for method in ("apgd-ce", "apgd-dlr"):
            yield Case(f"{method}-{norm}-{radius:.4g}-eot20", method, norm, radius, 100, 20)
        yield Case(f"autoattack-{norm}-{radius:.4g}-eot20", "autoattack", norm, radius, 100, 20)
    yield Case(f"cw-eot{draws}", "cw", "L2", None, 200, draws)
    yield _square(main, 5000, draws)


def _table(eps, l2, draws):
    yield Case(f"noise-Linf-{eps[-1]:.4g}", "noise", eps=eps[-1])
    yield Case(f"fgsm-Linf-{eps[-1]:.4g}-eot20", "fgsm", eps=eps[-1], eot=20)
    yield pgd(LARGE, 40, 5)
    yield from (case for case in _paper(eps, l2, draws) if case.c <= 0.2)
    yield from (pgd(e, 20, 20) for e in eps[:-1])
    yield _main(eps, 20)
    yield from (pgd(eps[-1], 40, eot) for eot in EOT)
    yield pgd(l2, 40, 20, "L2")
    yield from (pgd(eps[-1], 20, 20, source=source) for source in ("plain", "noise-off", "fixed-draw"))
    yield from (Case(f"autoattack-{norm}-{e:.4g}-eot20", "autoattack", norm, e, 100, 20) for norm, e in (("Linf", eps[-1]), ("L2", l2)))
    yield Case(f"cw-eot{draws}", "cw", "L2", None, 200, draws)
    yield _square(eps[-1], 5000, draws)


def _plateau(eps, l2, draws):
    main = eps[-1]
    for eot in (*EOT, 100):
        yield _main(eps, eot)
    yield from (pgd(main, steps, 20) for steps in (100, 400))
    yield pgd(main, 100, 100)
    yield from (pgd(main, 20, 20, source=source) for source in ("plain", "noise-off", "fixed-draw", "mean-logits"))
    yield Case(f"momentum20-Linf-{main:.4g}-eot20", "momentum", eps=main, steps=20, eot=20)
    yield pgd(main, 20, 20, restarts=10)


def _sanity(eps, l2, draws):
    main = eps[-1]
    yield Case(f"noise-Linf-{main:.4g}", "noise", eps=main)
    yield Case(f"fgsm-Linf-{main:.4g}-eot20", "fgsm", eps=main, eot=20)
    yield _main(eps, 20)
    yield pgd(LARGE, 40, 5)
    yield _square(main, 500, draws)
    yield from (pgd(main, 20, 20, source=source) for source in ("plain", "noise-off", "fixed-draw"))
    yield pgd(main, 20, 1, victim="noise-off")
    yield pgd(main, 20, draws, victim="fixed-seed")


PROTOCOLS = {
    "quick": Protocol(100, "minutes on a CPU: PGD at several radii and EOT"),
    "paper": Protocol(1600, "replication of the paper: C&W L2 with fixed c on the first 1600 test images"),
    "adaptive": Protocol(500, "everything we know: EOT to a plateau, restarts, APGD, AutoAttack, C&W, Square, transfers, sanity"),
    "sanity": Protocol(100, "whether the attacks work at all"),
    "table": Protocol(500, "the columns of a table of defences: C&W, PGD, AutoAttack, Square and transfers"),
    "plateau": Protocol(500, "PGD over draws and steps until two settings agree, and what a cheaper attacker might find instead"),
}
_CASES = dict(zip(PROTOCOLS.values(), (_quick, _paper, _adaptive, _sanity, _table, _plateau), strict=True))
