"""``rse-fast predict``: labels a data set with the ensemble, on one or many devices, in a folder that a killed run continues.

The folder: ``predict.json`` (what predicts, and how), ``predictions-RANK.jsonl`` (a line an image, flushed batch by batch), and at the end
``predictions.jsonl``, in the order of the data set. Under torchrun each process takes a contiguous share of the images. An image's line
depends on the settings and its index alone, not on the number of processes; another order of sums may round its last digits otherwise.
"""

import argparse
import json
import sys
from pathlib import Path

from torch import distributed
from tqdm import tqdm

from rse_fast import data, run_inputs
from rse_fast.ensemble import Ensemble, shard
from rse_fast.train.distributed import connect


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where the folder cannot be written; 2 for bad input; 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        with connect(args.device) as ranks:
            args.device = ranks.device
            _run(args, ranks)
    except (ValueError, TypeError) as error:
        print(f"rse-fast predict: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"rse-fast predict: {error}; what was predicted before is in {args.out}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues in {args.out}", file=sys.stderr)
        return 130
    return 0


def _parser():
    def early_exit(text):
        return text if text == "exact" else float(text)

    parser = argparse.ArgumentParser(prog="rse-fast predict", description=__doc__.partition("\n\n")[0].replace("``", ""))
    run_inputs.add_arguments(parser)
    parser.add_argument("--draws", type=int, default=10, help="noisy passes an image (default: %(default)s)")
    parser.add_argument("--early-exit", type=early_exit, metavar="HOW", help="exact, or a confidence such as 0.999 (default: all draws)")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="new, or to continue (default: %(default)s)")
    return parser


def _run(args, ranks):
    model, part, rows, facts = run_inputs.load(args)
    ensemble = Ensemble(model, args.draws, dtype=args.dtype, max_rows=args.max_rows, early_exit=args.early_exit)
    settings = facts | {"draws": args.draws, "early_exit": args.early_exit, "dtype": args.dtype}
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
        tqdm(total=len(mine), unit="image", disable=None if ranks.main else True) as bar,
    ):
        for group in run_inputs.neighbours(mine, max(1, 4 * ensemble.rows(run_inputs.images(part, rows[:1], args.device)) // args.draws)):
            out = ensemble.predict(run_inputs.images(part, group, args.device), seed=settings["seed"], image_offset=group[0])
            lines = [json.dumps(_line(i, part.labels[i], out, k), allow_nan=False) + "\n" for k, i in enumerate(group)]
            file.write("".join(lines).encode())
            file.flush()
            bar.update(len(group))
    if ranks.size > 1:
        distributed.barrier()
    if ranks.main:
        done = read(args.out)
        lines = [json.dumps(done[i]) + "\n" for i in rows]
        data.write_atomically(args.out / "predictions.jsonl", lambda file: file.write("".join(lines).encode()))
        right = sum(done[i]["label"] == done[i]["predicted"] for i in rows) / len(rows)
        draws = sum(done[i]["draws_used"] for i in rows) / len(rows)
        print(f"{len(rows)} images, accuracy {right:.2%}, {draws:.1f} draws an image; {args.out / 'predictions.jsonl'}")


def _line(index, label, out, k):
    def number(value):
        return None if value.isnan() else round(float(value), 6)  # JSON has no NaN

    return {
        "index": index, "label": int(label), "predicted": int(out.labels[k]), "probability": number(out.probs[k].max()),
        "entropy": number(out.entropy[k]), "mutual_information": number(out.mutual_information[k]),
        "draws_used": int(out.draws_used[k]),
    }  # fmt: skip


def read(folder: Path) -> dict[int, dict]:
    """The lines of every process's table by image; a last one that was cut off is not there. Raises ValueError for a damaged file."""
    done = {}
    for path in folder.glob("predictions-*.jsonl"):
        text = path.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            try:
                row = json.loads(line)
                done[row["index"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"--out: {str(path)!r} is damaged ({error})") from error
    return done
