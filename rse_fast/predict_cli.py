"""``rse-fast predict``: labels a data set with the ensemble, on one or many devices, in a folder that a killed run continues.

The folder: ``predict.json`` (what predicts, and how), ``predictions-RANK.jsonl`` (a line an image with its checksum, flushed batch by
batch), and at the end ``predictions.jsonl``, in the order of the data set. Under torchrun each process takes a contiguous share of the
images. Probabilities and entropies are at the temperature that the run keeps. An image's line depends on the settings and its index
alone, not on the number of processes; another order of sums may round its last digits otherwise. ``label`` is the prediction, ``target``
the label of the data set. What is not finite is null.
"""

import argparse
import math
from pathlib import Path

from torch import distributed

from rse_fast import data, run_inputs, train
from rse_fast.cli import wrapper
from rse_fast.data import lines
from rse_fast.ensemble import Ensemble, shard
from rse_fast.train.distributed import ProcessLost, connect, leave

_FIELDS = {
    "index": lines.is_index, "target": lines.is_integer, "label": lines.is_integer, "probability": lines.is_number,
    "entropy": lines.is_number, "mutual_information": lines.is_number, "draws_used": lines.is_integer,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where a file cannot be written; 2 for bad input; 130 after Ctrl-C (see `wrapper.run`)."""
    args = _parser().parse_args(argv)

    def action():
        try:
            with connect(args.device) as ranks:
                args.device = ranks.device
                _run(args, ranks)
        except ProcessLost as error:
            leave(f"rse-fast predict: {error}; the same command continues in {args.out}")

    return wrapper.run("predict", action, args.out, ("predictions-*.jsonl",))


def _parser():
    def early_exit(text):
        return text if text == "exact" else float(text)

    parser = argparse.ArgumentParser(prog="rse-fast predict", description=__doc__.partition("\n\n")[0].replace("``", ""))
    run_inputs.add_arguments(parser)
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="noisy passes an image (default: %(default)s)")
    parser.add_argument("--early-exit", type=early_exit, metavar="HOW", help="exact, or a confidence such as 0.999 (default: all draws)")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="DIR", help="folder of results, new or to continue (default: %(default)s)"
    )
    return parser


def _run(args, ranks):
    model, part, rows, facts = run_inputs.load(args)
    temperature = 1.0 if args.run is None else train.load_temperature(args.run)
    ensemble = Ensemble(
        model, args.draws, dtype=args.dtype, max_rows=args.max_rows, early_exit=args.early_exit, logits=args.logits, temperature=temperature
    )
    prepared = ensemble.prepared(run_inputs.images(part, rows[:1], args.device))
    if prepared.runner.pixels:
        raise ValueError("--model: expected one that gives an image one label, got logits [N, K, H, W] of pixels")
    run_inputs.check_classes(prepared.classes, part.labels)
    settings = facts | {"draws": args.draws, "early_exit": args.early_exit, "dtype": args.dtype, "temperature": temperature}
    opened = [None, None]
    if ranks.main:  # one process makes the folder, and all take its seed
        try:
            opened = [run_inputs.open_folder(args.out, "predict.json", settings, args.seed), None]
        except (OSError, ValueError) as error:
            opened = [None, error]
    if ranks.size > 1:
        distributed.broadcast_object_list(opened, device=ranks.device if ranks.device.type == "cuda" else None)
    settings, problem = opened
    if problem is not None:
        raise problem
    done = read(args.out)
    mine = [i for i in rows[shard(len(rows), ranks.rank, ranks.size)] if i not in done]
    with (
        data.append(args.out / f"predictions-{ranks.rank}.jsonl") as file,
        wrapper.Progress("predict", len(mine), shown=ranks.main) as progress,
    ):
        for group in run_inputs.neighbours(mine, max(1, 4 * ensemble.rows(run_inputs.images(part, rows[:1], args.device)) // args.draws)):
            out = ensemble.predict(run_inputs.images(part, group, args.device), seed=settings["seed"], image_offset=group[0])
            file.write(b"".join(lines.json_line(_row(i, part.labels[i], out, k)) for k, i in enumerate(group)))
            file.flush()
            progress.update(len(group))
    if ranks.size > 1:
        distributed.barrier()
    if ranks.main:
        done = read(args.out)
        whole = b"".join(lines.json_line(done[i]) for i in rows)
        data.write_atomically(args.out / "predictions.jsonl", lambda file: file.write(whole))
        right = sum(done[i]["target"] == done[i]["label"] for i in rows) / len(rows)
        draws = sum(done[i]["draws_used"] for i in rows) / len(rows)
        print(f"{len(rows)} images, accuracy {right:.2%}, {draws:.1f} draws an image; {args.out / 'predictions.jsonl'}")


def _row(index, target, out, k):
    def number(value):
        return round(float(value), 6) if math.isfinite(value) else None

    return {
        "index": index, "target": int(target), "label": int(out.labels[k]), "probability": number(out.probs[k].max()),
        "entropy": number(out.entropy[k]), "mutual_information": number(out.mutual_information[k]), "draws_used": int(out.draws_used[k]),
    }  # fmt: skip


def read(folder: Path) -> dict[int, dict]:
    """The rows of every process's file by image; a last line that was cut off is not there. Raises ValueError for a damaged file."""
    return {row["index"]: row for path in sorted(folder.glob("predictions-*.jsonl")) for row in lines.json_lines(path, _FIELDS)}
