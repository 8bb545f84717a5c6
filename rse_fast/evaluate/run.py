"""Runs the cases of an evaluation batch by batch: attack, select, score, write down. Resumable, and shared out among processes.

A batch is a fixed set of images, its noise and the library's choices follow from (seed, case, batch), so the rows do not depend on where
a run was interrupted or on how many processes took part.
"""

import base64
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rse_fast.ensemble import gradient, plan
from rse_fast.evaluate import attacks, rows
from rse_fast.evaluate.protocols import Case
from rse_fast.evaluate.target import Target, derive

DRAWS = (1, 2, 5, 10, 20, 50)  # of the ensembles in accuracy against draws
EXAMPLES = 6  # images whose adversarial versions are kept, in 8 bits, for pictures


def batches(case: Case, images: int, device: torch.device, pixels: int) -> list[range]:
    """The images of each batch of a case: as many as keep the packed rows of a query within what backward keeps (see
    `rse_fast.ensemble.gradient`); fewer where images have more than 32x32 pixels."""
    packed = gradient.KEEP * plan.SWEET_SPOT.get(device.type, 256)
    size = max(1, min(packed * 1024 // max(pixels, 1024) // case.eot, 64))
    return [range(start, min(start + size, images)) for start in range(0, images, size)]


def evaluate(
    target: Target,
    images: Tensor,
    labels: Tensor,
    cases: Sequence[Case],
    out: Path,
    *,
    seed: int,
    repeats: int = 5,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[Case, int], None] = lambda case, images: None,
) -> None:
    """Attacks images, and appends one row for each image and case to ``out``/rows-RANK.jsonl.

    A batch whose rows are there is not done again.

    Args:
        target: the classifier under attack.
        images: uint8 [N, C, H, W], N >= 1.
        labels: int64 [N].
        cases: attacks with different names, such as those of ``PROTOCOLS["quick"].cases(...)``.
        out: folder of the rows.
        seed: the master seed, from which all noise of attacks, selection and scoring is derived.
        repeats: scorings of each image with fresh noise, >= 1.
        rank: this process takes every ``ranks``-th batch, beginning with this one.
        ranks: how many processes share the batches.
        progress: called with (case, number of images) after each batch.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(labels) or not len(images):
        got = f"{images.dtype} {list(images.shape)} and {len(labels)} labels"
        raise ValueError(f"images: expected uint8 [N, C, H, W] and one label for each, at least one, got {got}")
    if len({case.name for case in cases}) != len(cases):
        raise ValueError("cases: expected different names, got one twice")
    if repeats < 1 or not 0 <= rank < ranks:
        raise ValueError(f"repeats must be at least 1 and rank in [0, ranks), got repeats={repeats}, rank={rank}, ranks={ranks}")
    done = rows.read(out)
    writer = rows.Writer(out, rank)
    try:
        for case in cases:
            for number, batch in enumerate(batches(case, len(images), target.device, images[0, 0].numel())):
                if number % ranks != rank:
                    continue
                if not all((case.name, index) in done for index in batch):
                    x = images[batch.start : batch.stop].to(target.device).float().div_(255)
                    y = labels[batch.start : batch.stop].to(target.device)
                    writer.write(_batch(target, case, x, y, batch, derive(seed, case.name, number), repeats))
                progress(case, len(batch))
    finally:
        writer.close()


def _batch(target: Target, case: Case, x: Tensor, y: Tensor, batch: range, seed: int, repeats: int) -> list[dict]:
    begin = time.perf_counter()
    queries = target.queries(case, derive(seed, "attack"))
    found = attacks.run(
        case, queries, lambda images: target.answer(case.victim, images, derive(seed, "select"), batch.start), x, y, derive(seed, "library")
    )
    seconds = time.perf_counter() - begin
    if case.victim == "fixed-seed":  # the noise that the attack saw, which is that of images 0, 1, ...
        seeds, image_offset = [queries.seed] * repeats, 0
    else:
        seeds, image_offset = [derive(seed, "score", repeat) for repeat in range(repeats)], batch.start

    def scored(images: Tensor) -> list[list[int]]:
        return torch.stack([target.answer(case.victim, images, s, image_offset).labels for s in seeds]).T.tolist()

    answers, parts = scored(found.images), {part: scored(images) for part, images in found.parts.items()}
    by_draws = {}
    if case.by_draws and target.draws:
        for n in sorted({*DRAWS, target.draws}):
            answer = target.answer(case.victim, found.images, derive(seed, "draws", n), batch.start, n)
            by_draws[str(n)] = answer.labels.tolist()
    change = (found.images - x).flatten(1)
    l2, linf = change.norm(dim=-1).tolist(), change.abs().amax(-1).tolist()
    verdict, labels = found.verdict.tolist(), y.tolist()
    return [
        {
            "case": case.name, "index": index, "target": labels[i], "answers": answers[i], "l2": l2[i], "linf": linf[i],
            "verdict": verdict[i], "queries": found.queries / len(batch), "seconds": seconds / len(batch), "seeds": seeds,
            "gradients": queries.gradients,
        }
        | ({"by_draws": {n: labels[i] for n, labels in by_draws.items()}} if by_draws else {})
        | ({"parts": {part: labels[i] for part, labels in parts.items()}} if parts else {})
        | ({"example": _example(found.images[i])} if index < EXAMPLES else {})
        for i, index in enumerate(batch)
    ]  # fmt: skip


def _example(image: Tensor) -> str:
    """Pixels rounded to 8 bits, channel-last, in base64."""
    return base64.b64encode(image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy().tobytes()).decode()
