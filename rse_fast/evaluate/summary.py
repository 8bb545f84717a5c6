"""From rows to figures: one entry a case, the plateau over EOT, accuracy against draws, and the checks that an attack must pass."""

import statistics

from rse_fast.evaluate.estimate import estimate, paired_difference
from rse_fast.evaluate.protocols import LARGE, PAPER_C, Case
from rse_fast.render import radius

# Of the gradients at images that are still right, the share that is zero beyond which an attack that follows them counts as blind.
ZERO_GRADIENTS = 0.1
TOLD_APART = 0.02  # a plateau that could hide more than this says so


def summarise(cases: list[Case], rows: dict[tuple[str, int], dict], images: int) -> dict:
    """``cases``: name -> figures of those with rows of all ``images``; ``incomplete``: the same of those with fewer, of the images that are
    there; ``eot``, ``steps``: `plateaus` over these; ``draws``, ``replication``, ``checks``: see their functions."""
    table, incomplete = {}, {}
    for case in cases:
        own = [rows[key] for key in sorted(key for key in rows if key[0] == case.name)]
        if len(own) == images:
            table[case.name] = {**vars(case), **_figures(case, own)}
        elif own:
            incomplete[case.name] = {**vars(case), **_figures(case, own)}
    shares = {name: {row["index"]: _share(row) for row in rows.values() if row["case"] == name} for name in table}
    l2 = {name: {row["index"]: row["l2"] for row in rows.values() if row["case"] == name} for name in table}
    return {
        "cases": table,
        "incomplete": incomplete,
        "eot": plateaus(table, shares, "eot"),
        "steps": plateaus(table, shares, "steps"),
        "draws": _by_draws(table, rows),
        "replication": replication(table),
        "checks": checks(table, shares, l2),
    }


def _share(row):
    """Of the scorings of an image, how many were right, in [0, 1]."""
    return sum(answer == row["target"] for answer in row["answers"]) / len(row["answers"])


def _figures(case, rows):
    """accuracy: estimate over repeats. worst: share of images that were right in each of the repeats, "worst of k queries". verdict: share
    that the attack's library calls right."""
    count, repeats = len(rows), len(rows[0]["answers"])
    accuracies = [sum(row["answers"][r] == row["target"] for row in rows) / count for r in range(repeats)]
    worst = sum(all(answer == row["target"] for answer in row["answers"]) for row in rows) / count
    figures = {
        "images": count,
        "accuracy": estimate(accuracies, count),
        "worst": estimate([worst], count),
        "queries_per_image": repeats,
        "mean_l2": statistics.fmean(row["l2"] for row in rows),
        "rms_l2": statistics.fmean(row["l2"] ** 2 for row in rows) ** 0.5,
        "largest_linf": max(row["linf"] for row in rows),
        "attack_queries": statistics.fmean(row["queries"] for row in rows),
        "seconds_per_image": statistics.fmean(row["seconds"] for row in rows),
    }
    if case.method != "clean":  # where there is no library to have one
        figures["verdict"] = 1 - sum(row["verdict"] for row in rows) / count
    gradients = [row["gradients"] for row in rows if row.get("gradients")]
    if gradients:
        # Rows of an older version do not tell how many were right.
        nan, right, zero = (statistics.fmean(g.get(kind, 1.0) for g in gradients) for kind in ("nan", "right", "zero"))
        figures["gradients"] = {"nan": nan, "zero": zero / right if right else 0.0}
    if parts := rows[0].get("parts"):
        figures["parts"] = {
            part: estimate([sum(row["parts"][part][r] == row["target"] for row in rows) / count for r in range(repeats)], count)
            for part in parts
        }
    if case.method == "cw":
        # An image whose scorings do not mostly come out wrong was not won at any distance.
        won = [row["l2"] if _share(row) < 0.5 else float("inf") for row in rows]
        median = statistics.median_low(won)
        figures |= {"median_l2": median if median < float("inf") else None, "won": sum(d < float("inf") for d in won) / count}
    return figures


def plateaus(table: dict, shares: dict, along: str) -> list[dict]:
    """Robust accuracy against EOT, or against steps, for each PGD of two or more that differ in nothing else; against steps at
    the largest EOT alone. plateau: the last takes no more than the one before, within the 95 % margin of the paired difference; then its
    accuracy is the one to quote."""
    groups: dict = {}
    for entry in table.values():
        plain_attack = entry["source"] == entry["victim"] == "deployed" and entry["restarts"] == 1
        if entry["method"] == "pgd" and plain_attack and entry["eps"] < LARGE:
            key = {name: entry[name] for name in ("norm", "eps", "steps", "eot") if name != along}
            groups.setdefault(tuple(key.items()), []).append(entry)
    found = []
    for key, entries in groups.items():
        entries = sorted(entries, key=lambda e: e[along])
        if len(entries) < 2:
            continue
        gain, margin = _compare(shares, entries[-2]["name"], entries[-1]["name"])
        points = [{along: e[along], "accuracy": e["accuracy"]} for e in entries]
        found.append({**dict(key), "points": points, "gain": gain, "margin": margin, "plateau": gain <= margin})
    if along == "steps":  # steps along a gradient of few draws settle elsewhere
        best = {(f["norm"], f["eps"]): f for f in sorted(found, key=lambda f: f["eot"])}
        found = [f for f in found if f in best.values()]
    return found


def _compare(shares, first, second):
    common = sorted(shares[first].keys() & shares[second].keys())
    return paired_difference([shares[first][i] for i in common], [shares[second][i] for i in common])


def _by_draws(table, rows):
    """name -> [{draws, accuracy}] for the cases that were scored by ensembles of several sizes."""
    curves = {}
    for name in table:
        own = [row for row in rows.values() if row["case"] == name and "by_draws" in row]
        if own:
            sizes = sorted(map(int, own[0]["by_draws"]))
            curves[name] = [
                {"draws": n} | estimate([sum(row["by_draws"][str(n)] == row["target"] for row in own) / len(own)], len(own)) for n in sizes
            ]
    return curves


def replication(table: dict) -> dict | None:
    """The paper's columns: accuracy and root mean square L2 for each c, and the L2 at which accuracy falls through 30 % (linear between
    columns)."""
    columns = sorted((entry for entry in table.values() if entry["method"] == "cw-c" and entry["c"] in PAPER_C), key=lambda e: e["c"])
    if not columns:
        return None
    points = [(e["rms_l2"], e["accuracy"]["mean"]) for e in columns]
    if "clean" in table:
        points.insert(0, (0.0, table["clean"]["accuracy"]["mean"]))
    crossing = None
    for (l2, above), (next_l2, below) in zip(points, points[1:], strict=False):
        if above >= 0.3 > below:
            crossing = l2 + (next_l2 - l2) * (above - 0.3) / (above - below)
            break
    return {"columns": [{"c": e["c"], "rms_l2": e["rms_l2"], "accuracy": e["accuracy"]} for e in columns], "l2_at_30": crossing}


def checks(table: dict, shares: dict, l2: dict) -> list[dict]:
    """What must hold if the attacks work: {name, passed, text}, the failed ones first. Comparisons are paired, image by image, and fail
    beyond their 95 % margin.

    shares, l2: case -> image -> share of right scorings, distance of the image that was scored.
    """
    found = []

    def add(name, passed, text):
        found.append({"name": name, "passed": bool(passed), "text": text})

    def at_least_as_strong(name, strong, weak, meaning, shares=shares):
        gap, margin = _compare(shares, strong, weak)
        left = [f"{name} leaves {100 * statistics.fmean(shares[name].values()):.1f} %" for name in (strong, weak)]
        text = f"{left[0]}, {left[1]} (difference {100 * gap:+.1f} ± {100 * margin:.1f} points)"
        add(name, gap <= margin, text + ("" if gap <= margin else f": {meaning}"))

    followed = [e for e in table.values() if "gradients" in e]
    lost = [e for e in followed if e["gradients"]["nan"] or e["gradients"]["zero"] > ZERO_GRADIENTS]
    for e in lost:
        nan, zero = (100 * e["gradients"][kind] for kind in ("nan", "zero"))
        text = f"{e['name']}: of the gradients that it followed {nan:.1f} % are NaN or infinite, and of those at images still right "
        text += f"{zero:.1f} % are exactly zero; an attack cannot follow such gradients, so its figures say nothing of the model"
        add("gradients", False, text)
    if followed and not lost:
        most = 100 * max(e["gradients"]["zero"] for e in followed)
        add(
            "gradients",
            True,
            f"none is NaN or infinite, and of those at images still right no attack has more than {most:.1f} % exactly zero",
        )
    attacks = [e for e in table.values() if e["victim"] == "deployed" and e["method"] != "clean"]
    white = [e for e in attacks if e["source"] == "deployed" and e["method"] not in ("noise", "square", "fgsm", "cw", "cw-c")]
    for e in white:
        if e["eps"] == LARGE:
            right = e["accuracy"]["mean"]
            add(
                "large eps", right == 0,
                f"{e['name']}: with every pixel free, {100 * right:.1f} % of the scorings are still right"
                + ("" if right == 0 else "; an attack that works leaves none, so the attack is too weak or its gradient is masked"),
            )  # fmt: skip
    white = [e for e in white if e["eps"] != LARGE]
    for e in attacks:
        same = [w for w in white if w["norm"] == e["norm"] and w["eps"] == e["eps"]]
        best = min(same, key=lambda w: w["accuracy"]["mean"], default=None)
        if best is None:
            continue
        if e in white:
            # The strongest of the PGDs: another attack that finds more shows what its gradient misses.
            pgd = max((w for w in same if w["method"] == "pgd"), key=lambda w: (w["steps"], w["eot"], w["restarts"]), default=None)
            if pgd is not None and e["method"] != "pgd":
                meaning = "PGD misses what another attack finds, so no figure of PGD is one to quote"
                at_least_as_strong(f"PGD against {e['method']}", pgd["name"], e["name"], meaning)
        elif e["method"] == "fgsm":
            meaning = "many steps do worse than one, so the iterated attack is broken"
            for iterated in same:
                if iterated["eot"] >= e["eot"]:
                    at_least_as_strong("iterated against one step", iterated["name"], e["name"], meaning)
        elif e["method"] == "noise":
            at_least_as_strong("attack against random noise", best["name"], e["name"], "the attack finds less than chance does")
        elif e["method"] == "square":
            meaning = "an attack without gradients finds more, so the gradient is masked and the white-box figures flatter the defence"
            at_least_as_strong("white box against black box", best["name"], e["name"], meaning)
        elif e["source"] != "deployed":
            meaning = "images made for something else find more than the attack on the defence itself, so its figures flatter the defence"
            at_least_as_strong(f"white box against transfer from {e['source']}", best["name"], e["name"], meaning)
    for e in table.values():
        if e["method"] != "cw":
            continue
        for w in white:
            if w["norm"] == "L2":  # right within the radius of the other attack
                within = {i: share if l2[e["name"]][i] <= w["eps"] else 1.0 for i, share in shares[e["name"]].items()}
                meaning = "an attack within a given distance finds more than the search for the smallest, whose distances are too large"
                name = f"smallest distance against {w['method']}, L2 {radius(w['eps'])}"
                at_least_as_strong(name, e["name"], w["name"], meaning, shares | {e["name"]: within})
    for along, title in (("eot", "EOT"), ("steps", "steps")):
        for plateau in plateaus(table, shares, along):
            one, before, last = (plateau["points"][i] for i in (0, -2, -1))
            what = f"-{plateau['steps']}" if along == "eot" else f" EOT {plateau['eot']}"
            text = f"PGD{what} {plateau['norm']} {radius(plateau['eps'])}: from {title} {before[along]} to {last[along]} the accuracy "
            text += f"changes by {0 - 100 * plateau['gain']:+.1f} ± {100 * plateau['margin']:.1f} points, to "
            text += f"{100 * last['accuracy']['mean']:.1f} % ({title} {one[along]}: {100 * one['accuracy']['mean']:.1f} %)"
            if plateau["plateau"] and plateau["gain"] + plateau["margin"] > TOLD_APART:
                text += f"; of so few images, a fall of {100 * (plateau['gain'] + plateau['margin']):.1f} points would look the same"
            meaning = {"eot": "draws in the gradient", "steps": "steps"}[along]
            text += "" if plateau["plateau"] else f": more {meaning} still find more, so no figure of it is final"
            add(f"plateau over {title}", plateau["plateau"], text)
    for e in table.values():
        if e["victim"] == "fixed-seed":
            fresh = min((w for w in white if (w["norm"], w["eps"], w["steps"]) == (e["norm"], e["eps"], e["steps"])),
                        key=lambda w: w["accuracy"]["mean"], default=None)  # fmt: skip
            if fresh:
                meaning = "taking the randomness away makes the attack no easier, so something else than randomness stops it"
                at_least_as_strong("ablation: fixed seed", e["name"], fresh["name"], meaning)
    return sorted(found, key=lambda check: (check["passed"], check["name"] != "gradients"))
