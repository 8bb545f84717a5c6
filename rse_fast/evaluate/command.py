"""``rse-fast evaluate``: a protocol of attacks on a trained network, and its report, in a folder that a killed run continues.

The folder: ``evaluation.json`` (what is evaluated, and how), ``rows-RANK.jsonl`` (a line an image and attack, flushed batch by batch), and
at the end ``report.md``, ``results.json`` and pictures. With more ``--images`` the same folder goes on to those; with fewer the report is
of those alone, and no row is lost. How far probabilities can be trusted is measured anew whenever the report is written, on images that
are not attacked. Under torchrun the batches are shared out among the processes.
"""

import argparse
import os
import platform
import shlex
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from rse_fast import models
from rse_fast.cli import wrapper
from rse_fast.cli.options import at_least, number
from rse_fast.evaluate import attacks, calibration, report, rows
from rse_fast.evaluate.protocols import PROTOCOLS
from rse_fast.evaluate.run import batches, evaluate
from rse_fast.evaluate.summary import summarise
from rse_fast.evaluate.target import Target, derive
from rse_fast.nn import noise_layers

_PACKAGES = ("torch", "numpy", "rse-fast", "foolbox", "pyautoattack")
_SETTINGS = "evaluation.json"
_ORDER_SEED = 0  # of the order of a test part that is sorted by class


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, also if a check failed; 1 where a file cannot be written; 2 for bad input; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    out = _parser().parse_args(argv).out
    return wrapper.run("evaluate", lambda: run(argv) and 0, out, ("rows-*.jsonl",))


def _parser():
    from rse_fast import run_inputs

    def eps(text: str) -> float:
        value = number(text)
        if not 0 < value < 1:
            raise argparse.ArgumentTypeError(f"expected a number or fraction in (0, 1), got {text!r}")
        return value

    parser = argparse.ArgumentParser(
        prog="rse-fast evaluate", description="Attacks a trained network by a protocol and reports what is left of its accuracy.",
        epilog="Protocols: " + "; ".join(f"{name}: {protocol.text}" for name, protocol in PROTOCOLS.items())
        + ". On several GPUs: torchrun --nproc-per-node N -m rse_fast.cli evaluate ...",
    )  # fmt: skip
    model = "run folder of rse-fast train, or package.module:function that returns a network"
    run_inputs.add_model(parser)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="safetensors file for --model")
    parser.add_argument("--plain", metavar="RUN|PACKAGE.MODULE:FUNCTION", help=f"undefended network to transfer attacks from: {model}")
    parser.add_argument("--plain-weights", type=Path, metavar="FILE", help="safetensors file for --plain PACKAGE.MODULE:FUNCTION")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), default="quick", help="default: %(default)s")
    parser.add_argument("--draws", type=at_least(1), default=10, metavar="N", help="draws of the deployed ensemble (default: %(default)s)")
    radii = [2 / 255, 4 / 255, 8 / 255]
    parser.add_argument(
        "--eps",
        type=eps,
        nargs="+",
        metavar="EPS",
        default=radii,
        help="Linf radii, pixels in [0, 1]; the largest is the main one (default: 2/255 4/255 8/255)",
    )
    parser.add_argument("--l2", type=eps, default=0.5, metavar="RADIUS", help="L2 radius, pixels in [0, 1] (default: %(default)s)")
    parser.add_argument("--images", type=at_least(1), metavar="N", help="test images (default: by protocol)")
    parser.add_argument("--repeats", type=at_least(1), default=5, metavar="R", help="scorings with fresh noise (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="run only these cases of the protocol, named as in the report")
    parser.add_argument("--report", action="store_true", help="attack nothing: write the report of what is in the folder")
    parser.add_argument(
        "--calibration",
        type=int,
        default=1000,
        metavar="N",
        help="images, not attacked, for the section on calibration; 0 leaves it out (default: %(default)s)",
    )
    parser.add_argument(
        "--ood", metavar="DATA", help="data set of another kind, whose images should look more uncertain than those of --data"
    )
    parser.add_argument("--certified", type=Path, metavar="DIR", help="folder of rse-fast certify for the report (default: RUN/certified)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("evaluation"),
        metavar="DIR",
        help="folder of the report, new or to continue (default: %(default)s)",
    )
    return parser


def run(argv: list[str]) -> dict | None:
    """What the command does. Returns the results, as in ``results.json``; None where other processes are not done.

    Raises ValueError or TypeError naming the option, OSError for a folder that cannot be written.
    """
    from rse_fast import run_inputs, train

    args, command = _parser().parse_args(argv), shlex.join(["rse-fast", "evaluate", *argv])
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    run_inputs.check_source(args)
    model = load(str(args.run or args.model), args.weights, args.device, args.trust)
    plain = load(args.plain, args.plain_weights, args.device, args.trust) if args.plain else None
    if plain is not None and noise_layers(plain):
        raise ValueError("--plain: expected a network without noise to transfer from, got one with noisy layers")
    splits = run_inputs.splits(args)
    protocol, args.eps = PROTOCOLS[args.protocol], sorted(set(args.eps))
    target = Target(model, args.draws, plain=plain, dtype=args.dtype, logits=args.logits)
    part = getattr(splits, args.part)
    if args.calibration < 0:
        raise ValueError(f"--calibration: expected at least 0, got {args.calibration}")
    if args.ood and not args.calibration:
        raise ValueError("--ood: these images are for the section on calibration, which --calibration 0 leaves out")
    indices, order = image_order(part)
    images, labels = images_of(part, indices[: args.images or protocol.images])
    first = images[:1].to(target.device).float().div_(255)
    for option, kind in [("--model", "deployed")] + [("--plain", "plain")] * (plain is not None):
        with torch.no_grad():
            run_inputs.check_classes(target.classifier(kind, target.draws)(first).shape[1], part.labels, option)
    temperature = 1.0 if args.run is None else train.load_temperature(args.run)
    # The run's own validation part, in another size too; or the same under another name.
    chosen_by = args.run is not None and args.part == "val" and (args.data is None or train.is_validation_part(args.run, part))
    if chosen_by and args.calibration and not rank:
        warnings.warn(f"--part val: {report.optimistic(temperature)}", RuntimeWarning, stacklevel=2)
    others = _others(args.ood, args.calibration, images) if args.ood else None
    cases = protocol.cases(args.eps, args.l2, target.draws, plain is not None)
    cases = [case for case in cases if len(splits.classes) >= attacks.CLASSES.get(case.method, 2)]
    settings = {
        "model": args.model or str(args.run), "weights": run_inputs.digest(model.state_dict()),
        "plain": args.plain, "plain_weights": run_inputs.digest(plain.state_dict()) if plain is not None else None,
        "data": splits.name, "part": args.part, "order": order, "labels": run_inputs.digest({"labels": torch.as_tensor(part.labels)}),
        "draws": target.draws, "sigmas": sorted({float(f"{s:.6g}") for layer in noise_layers(model).values()
                                                 for s in layer.current_sigma().detach().flatten().tolist()}),
        "eps": args.eps, "l2": args.l2, "repeats": args.repeats, "dtype": args.dtype, "device": torch.device(args.device).type,
        "resize": args.resize and repr(args.resize), "logits": args.logits,
    }  # fmt: skip
    if rank:
        _await(args.out / _SETTINGS)
    if args.report and not (args.out / _SETTINGS).exists():
        raise ValueError(f"--report: no evaluation at {str(args.out)!r}")
    settings = run_inputs.open_folder(args.out, _SETTINGS, settings, args.seed)
    chosen = [case for case in cases if not args.only or case.name in args.only]
    if unknown := set(args.only or ()) - {case.name for case in cases}:
        raise ValueError(f"--only: expected cases of the protocol ({', '.join(c.name for c in cases)}), got {', '.join(sorted(unknown))}")
    begin = time.perf_counter()
    if args.report:  # also while another process attacks
        chosen = []
    else:
        mine = sum(len(batch) for case in chosen for batch in batches(case, len(images), target.device, images[0, 0].numel())[rank::ranks])
        with wrapper.Progress("evaluate", mine, shown=not rank) as progress:
            evaluate(
                target, images, labels, chosen, args.out, seed=settings["seed"], repeats=args.repeats, rank=rank, ranks=ranks,
                progress=lambda case, count: progress.update(count, case.name),
            )  # fmt: skip
    found = {key: row for key, row in rows.read(args.out).items() if key[1] < len(labels)}  # others are of a run with more images
    missing = sum((case.name, index) not in found for case in chosen for index in range(len(labels)))
    if missing and ranks > 1:
        print(f"process {rank} is done; {missing} rows are left to others, and the last of them writes the report", flush=True)
        return None
    results = {
        "settings": settings | {"protocol": args.protocol, "images": len(labels)},
        "defence": None if args.run is None else train.Config.load(args.run / "config.json").defence,
        "classes": list(splits.classes), "shape": list(images.shape[1:]),
        "command": command,
        "machine": {"device": args.device, "processor": _processor(args.device), "system": platform.platform(),
                    "threads": torch.get_num_threads(), "processes": ranks},
        "versions": {"python": platform.python_version()} | {package: version(package) for package in _PACKAGES},
        "seconds": time.perf_counter() - begin, "attack_seconds": sum(row["seconds"] for row in found.values()),
        **summarise(cases, found, len(labels)),
    }  # fmt: skip
    results["calibration"] = _calibration(args, target, part, indices, settings["seed"], temperature, others, chosen_by)
    for name, entry in results["cases"].items():
        entry["command"] = shlex.join(["rse-fast", "evaluate", *_all_cases(argv), "--seed", str(settings["seed"]), "--only", name])
    certified = args.certified or (args.run / "certified" if args.run else None)
    report.write(args.out, results, images, list(found.values()), certified)
    print(report.headline(results))
    print(f"report: {args.out / 'report.md'}")
    return results


def _all_cases(argv: list[str]) -> list[str]:
    """The options, but for those that say which cases are attacked."""
    kept, option = [], ""
    for word in argv:
        option = word if word.startswith("--") else option
        if option != "--only" and word != "--report":
            kept.append(word)
    return kept


def load(source: str, weights: Path | None, device: str, trust: bool = False) -> nn.Module:
    """The network of a run folder, or what ``package.module:function`` returns, with the weights of a safetensors file if given.

    trust: a run folder's own module is imported.
    """
    from rse_fast import data, run_inputs

    if ":" not in source:
        return run_inputs.model_of(Path(source), trust, device)
    models.search_working_directory()
    try:
        model = models.function(source)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--model: expected package.module:function, got {source!r} ({error})") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: expected {source!r} to return an nn.Module, got {type(model).__name__}")
    if weights is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            data.open_regular(weights).close()
            model.load_state_dict(load_file(weights))
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"--weights: {str(weights)!r} does not fit {source}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()


def image_order(part):
    """The indices of a part's images, and in words how they are ordered. A part sorted by class is shuffled, in the same way each time."""
    labels = torch.as_tensor(part.labels)
    sorted_by_class = bool((labels[1:] >= labels[:-1]).all())
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_ORDER_SEED))
    if sorted_by_class:
        return shuffled, f"first of a fixed shuffle (seed {_ORDER_SEED})"
    return torch.arange(len(labels)), "first"


def images_of(part, indices):
    """uint8 images [N, C, H, W] of a part, and their labels."""
    (images,) = part.fetch([indices])
    return images, torch.as_tensor(part.labels)[indices]


def _others(source, count, images):
    """(name, images) of another data set's test part, at most ``count``, scaled to the size of ``images``."""
    from rse_fast import data

    try:
        splits = data.load(source, progress=True)
    except ValueError as error:
        raise ValueError(f"--ood: {error}") from error
    found, _ = images_of(splits.test, image_order(splits.test)[0][:count])
    if found.shape[1] != images.shape[1]:
        raise ValueError(f"--ood: expected images of {images.shape[1]} channels, as those of the data set, got {found.shape[1]}")
    if found.shape[2:] != images.shape[2:]:
        size = tuple(images.shape[2:])
        found = torch.nn.functional.interpolate(found.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
    return splits.name, found


def _calibration(args, target, part, indices, seed, temperature, others, chosen_by):
    """The figures of the section on calibration, or None where none is wanted. chosen_by: the images are the run's validation images."""
    if not args.calibration:
        return None
    images, labels = images_of(part, indices[: args.calibration])
    inside = calibration.answers(target, images, derive(seed, "calibration"))
    outside = others and calibration.answers(target, others[1], derive(seed, "ood"))
    found = calibration.measure(inside, labels, temperature, outside)
    return found | {"chosen_by": chosen_by, "ood": found["ood"] and {"data": others[0]} | found["ood"]}


def _await(path: Path) -> None:
    """Until the first process has made the folder."""
    waited = time.monotonic()
    while not path.exists():
        if time.monotonic() - waited > 600:
            raise ValueError(f"--out: the first process has made no {str(path)!r} in ten minutes")
        time.sleep(0.1)


def _processor(device):
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
