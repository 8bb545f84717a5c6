"""What the commands work on: a model, a part of a data set, and a folder of results that a killed run continues."""

import argparse
import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from rse_fast import data, models, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `load` reads."""
    add_model(parser)
    parser.add_argument("--every", type=int, default=1, metavar="K", help="take every K-th image (default: %(default)s)")
    parser.add_argument("--images", type=int, metavar="N", help="at most N images")
    parser.add_argument("--max-rows", type=int, metavar="ROWS", help="most rows, images times draws, of a packed batch")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options of every command that works on a network: which one, which part of which data set, and how it computes."""
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="run folder of rse-fast train, such as runs/small-rse")
    parser.add_argument("--model", metavar="PACKAGE.MODULE:FUNCTION", help="in place of RUN: a function that returns the converted network")
    add_trust(parser)
    add_data(parser)
    parser.add_argument("--part", choices=("test", "val"), default="test", help="part of the data set (default: %(default)s)")
    parser.add_argument("--seed", type=int, metavar="SEED", help="seed of the noise (default: a fresh one, kept in the folder)")
    parser.add_argument("--dtype", default="auto", metavar="DTYPE", help="auto, float32 or bfloat16 (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, metavar="DEVICE", help="cpu, cuda or cuda:N (default here: %(default)s)")
    add_logits(parser)


def add_logits(parser: argparse.ArgumentParser) -> None:
    text = "where the model's output has its logits: a name or an index (default: found by itself)"
    parser.add_argument("--logits", type=lambda word: int(word) if word.lstrip("-").isdigit() else word, metavar="NAME|INDEX", help=text)


def add_trust(parser: argparse.ArgumentParser) -> None:
    text = "import the module that the run folder names as its model, and so run that code: only for authors whom you trust"
    parser.add_argument("--trust", action="store_true", help=text)


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options that `splits` reads, with ``run``."""
    parser.add_argument("--data", metavar="DATA", help="data set, as in rse-fast train (default: the run's, or digits)")
    parser.add_argument("--resize", type=train.config.size, metavar="N|HxW", help="size of a folder's images (default: the run's)")


def splits(args: argparse.Namespace) -> data.Splits:
    """The data set that the options name."""
    if args.run is None:
        return data.load(args.data or "digits", resize=args.resize, progress=True)
    check_run(args.run)
    return train.load_data(train.Config.load(args.run / "config.json"), args.data, args.resize)


def check_source(args: argparse.Namespace) -> None:
    """Raises ValueError unless the options name one model."""
    if (args.run is None) == (args.model is None):
        got = "neither" if args.run is None else "both"
        raise ValueError(f"RUN, --model: expected one of the two, a run folder or a function that returns a network; got {got}")


def check_run(run: Path, option: str = "RUN") -> None:
    """Raises ValueError where there is no run folder."""
    if not (run / "config.json").exists():
        raise ValueError(f"{option}: no run at {str(run)!r}, expected a folder that rse-fast train made, with config.json")


def model_of(run: Path, trust: bool, device: str = "cpu") -> nn.Module:
    """The model of a run folder. A module that it names may lie in the working directory, if it is trusted."""
    check_run(run)
    if trust and ":" in train.Config.load(run / "config.json").model:
        models.search_working_directory()
    return train.load_model(run, device=device, trust=trust)


def load(args: argparse.Namespace) -> tuple[nn.Module, data.Part, range, dict]:
    """The model in eval mode on its device, the part of the data set, the images wanted of it, and what names model and part: results of
    an image do not depend on which others are wanted.

    Raises ValueError naming the option.
    """
    check_source(args)
    for name in ("every", "images"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    if args.run is not None:
        model = model_of(args.run, args.trust)
    else:
        models.search_working_directory()
        try:
            model = models.function(args.model)()
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--model: expected package.module:function, got {args.model!r} ({error})") from error
    found = splits(args)
    model = model.to(args.device).eval()
    part = getattr(found, args.part)
    rows = range(0, len(part), args.every)[: args.images]
    if not len(rows):
        raise ValueError(f"--part: {args.part} of the data set has no images")
    facts = {"model": args.model or str(args.run), "weights": digest(model.state_dict()), "data": found.name}
    facts |= {
        "labels": digest({"labels": part.labels}),
        "part": args.part,
        "resize": args.resize and repr(args.resize),
        "logits": args.logits,
    }
    return model, part, rows, facts


def images(part: data.Part, rows: range, device: str | torch.device) -> torch.Tensor:
    """Images of the rows as float32 [len(rows), C, H, W] in [0, 1]."""
    (fetched,) = part.fetch([torch.tensor(rows)])
    return fetched.to(device).float().div_(255)


def check_classes(classes: int, labels: Sequence[int] | torch.Tensor, option: str = "--model") -> None:
    """Raises ValueError where a network of so many classes can never give one of the labels."""
    wanted = int(torch.as_tensor(labels).max()) + 1
    if 0 < classes < wanted:
        raise ValueError(f"{option}: expected a network of at least {wanted} classes, as the data set has, got one of {classes}")


def neighbours(indices: Sequence[int], most: int) -> Iterator[range]:
    """Cuts ascending indices into ranges of neighbours, at most ``most`` of them each."""
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or i - start == most or indices[i] != indices[i - 1] + 1:
            yield range(indices[start], indices[i - 1] + 1)
            start = i


def open_folder(out: Path, name: str, settings: dict, seed: int | None) -> dict:
    """Makes the folder with its settings file, or checks that it is one of these settings; returns them with the seed.

    Raises ValueError where the folder holds results of something else.
    """
    path = out / name
    if not path.exists():
        data.check_writable(out)
        out.mkdir(parents=True, exist_ok=True)
        data.remove_leftovers(out)
        settings = settings | {"seed": secrets.randbits(63) if seed is None else seed}
        data.write_atomically(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        return settings
    try:
        found = data.read_json(path)
        if not isinstance(found, dict) or type(found.get("seed")) is not int or not 0 <= found["seed"] < 2**64:
            raise ValueError("expected settings with a seed")
    except (OSError, ValueError) as error:
        raise ValueError(f"--out: cannot read {str(path)!r}: {error}") from error
    wanted = settings | {"seed": found.get("seed") if seed is None else seed}
    differing = [f"{name} {found.get(name)!r} there, {value!r} here" for name, value in wanted.items() if found.get(name) != value]
    if differing:
        raise ValueError(f"--out: {str(out)!r} holds results of something else ({'; '.join(differing)}); name another folder")
    data.remove_leftovers(out)
    return found


def digest(tensors) -> str:
    """SHA-256 of names, types and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
