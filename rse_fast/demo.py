"""``rse-fast demo``: a plain network and its self-ensemble on real images, attacked with PGD, and a report of what was measured.

Both networks get the same images, recipe and seed, and the last epoch is taken, so nothing is chosen on the test set. The attack acts on
the deployed ensemble: its gradient is that of the log mean softmax over packed draws, with fresh noise at each step (expectation over
transformation), and what it finds is scored afterwards with fresh seeds. ``rse_fast.demo_report`` writes the report.
"""

import argparse
import copy
import importlib.util
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

import rse_fast
from rse_fast import data, demo_report
from rse_fast.cli import wrapper
from rse_fast.cli.options import at_least, number
from rse_fast.evaluate.estimate import estimate
from rse_fast.models import SmallNet
from rse_fast.train import Config, Ranks, Trainer

_PACKAGES = {"foolbox": "foolbox", "matplotlib": "matplotlib", "PIL": "pillow", "rich": "rich", "sklearn": "scikit-learn", "tqdm": "tqdm"}
_DRAW_COUNTS = (1, 2, 3, 5, 10, 20, 50)
_TIMED_BATCH = 16
_INFERENCE_ROWS = 256
_ATTACK_ROWS = 512  # packed rows of 32x32 pixels in one attack step: about 1 GB of activations in SmallNet


def main(argv: list[str] | None = None) -> int:
    """Runs the demo and writes its report under ``--out``.

    Returns the exit status: 0; 1 when packages are missing or training diverges; 2 for bad input; 130 after Ctrl-C, when the report holds
    what was known by then.
    """
    args = _parse(argv)
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"rse-fast demo: needs {', '.join(missing)}: pip install 'rse-fast[demo]'", file=sys.stderr)
        return 1
    return wrapper.run("demo", lambda: _run(args, _prepare(args)))


def _prepare(args: argparse.Namespace) -> data.Splits:
    """The data, once the device and the folder of the report are known to be usable. ValueError names what is not."""
    _check_device(args.device)
    data.check_writable(args.out)
    try:
        splits = _load(args)
    except OSError as error:
        raise ValueError(str(error)) from error
    args.out.mkdir(parents=True, exist_ok=True)
    return splits


def add_eager_noise(net: nn.Module, init_sigma: float, inner_sigma: float) -> None:
    """Puts ``x + sigma * randn_like(x)`` in front of every convolution, in module order: the plain-torch peer of ``rse_fast.convert``."""
    for index, conv in enumerate(m for m in net.modules() if isinstance(m, nn.Conv2d)):
        sigma = inner_sigma if index else init_sigma
        conv.register_forward_pre_hook(lambda _, inputs, sigma=sigma: (inputs[0] + sigma * torch.randn_like(inputs[0]),))


def eager_loop(net: nn.Module, images: Tensor, draws: int) -> Tensor:
    """Mean softmax [B, K] over ``draws`` passes of a noisy network, one after the other: the plain-torch peer of ``rse_fast.Ensemble``."""
    with torch.inference_mode():
        return torch.stack([net(images).softmax(-1) for _ in range(draws)]).mean(0)


def _parser() -> argparse.ArgumentParser:
    def epsilon(text: str) -> float:
        value = number(text)
        if not 0 < value <= 1:
            raise argparse.ArgumentTypeError(f"expected a number or fraction in (0, 1], got {text!r}")
        return value

    def sigma(text: str) -> float:
        value = float(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
        return value

    parser = argparse.ArgumentParser(prog="rse-fast demo", description=__doc__.partition("\n\n")[0].replace("``", ""))
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="image folder (train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg); default: handwritten digits",
    )
    parser.add_argument(
        "--resize", type=at_least(4), metavar="PIXELS", help="crop and resample the images of --data to this height and width"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-report"), metavar="DIR", help="folder of the report (default: %(default)s)")
    parser.add_argument(
        "--draws", type=at_least(1), default=10, metavar="N", help="draws of the ensemble, also under attack (default: %(default)s)"
    )
    parser.add_argument(
        "--init-sigma", type=sigma, default=0.2, metavar="S", help="noise before the first convolution (default: %(default)s)"
    )
    parser.add_argument("--inner-sigma", type=sigma, default=0.1, metavar="S", help="noise before the others (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=at_least(1), metavar="E", help="epochs for each of the two networks (default: 30 digits, 12 folder)"
    )
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast (about twice as fast where the hardware has it)")
    parser.add_argument(
        "--eps", type=epsilon, nargs="+", metavar="EPS", help="L-infinity radii, pixels in [0, 1]; fractions like 8/255 are fine"
    )
    parser.add_argument("--steps", type=at_least(1), metavar="K", help="PGD steps (default: 20)")
    parser.add_argument("--attack-images", type=at_least(1), metavar="N", help="test images to attack (default: 200 digits, 100 folder)")
    parser.add_argument("--test-images", type=at_least(1), metavar="N", help="test images for clean accuracy (default: at most 1000)")
    parser.add_argument(
        "--repeats", type=at_least(2), metavar="R", help="times that attacked images are scored, each with fresh noise (default: 5)"
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="S",
        help="seed of weights, order, augmentation and choice of images (default: 0)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (default here: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few epochs, images and steps: shows that everything runs, not how well")
    return parser


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, and in place of those that are not given what suits the data set and ``--quick``."""
    args = _parser().parse_args(argv)
    folder = args.data is not None
    defaults = {
        "epochs": 12 if folder else 30,
        "eps": [2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255] if folder else [0.03, 0.06, 0.1, 0.15, 0.2, 0.3],
        "steps": 20,
        "attack_images": 100 if folder else 200,
        "test_images": 1000,
        "repeats": 5,
        "curve_draws": max(_DRAW_COUNTS),
        "timings": 7,
    }
    if args.quick:
        defaults |= {"epochs": 1 if folder else 3, "eps": defaults["eps"][2::3], "steps": 5, "attack_images": 20, "test_images": 200}
        defaults |= {"repeats": 2, "curve_draws": 5, "timings": 3}
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.eps = sorted(set(args.eps))
    return args


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name).item()
    except Exception as error:  # torch has several kinds for devices it does not have
        raise ValueError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error


def _load(args: argparse.Namespace) -> data.Splits:
    if args.data is None:
        if args.resize is not None:
            raise ValueError("--resize: needs --data")
        return data.digits()
    splits = data.image_folder(args.data, resize=args.resize, progress=True)
    if min(splits.train.images.shape[2:]) < 4:
        raise ValueError(f"--data: images of {list(splits.train.images.shape[2:])} pixels are too small (4x4 at least); give --resize")
    return splits


def _run(args: argparse.Namespace, splits: data.Splits) -> int:
    results = _facts(args, splits)
    gallery: dict = {"plain": [], "rse": []}
    start = time.perf_counter()

    def stage(name: str) -> None:
        results["stages"].append({"name": name, "at_second": round(time.perf_counter() - start, 1)})
        print(name, flush=True)

    try:
        _measure(args, splits, stage, results, gallery)
        results["status"] = "complete"
    except FloatingPointError as error:
        print(f"rse-fast demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        results["status"] = f"interrupted while {results['stages'][-1]['name']}"
    results["seconds"] = time.perf_counter() - start
    interrupted = results["status"] != "complete"
    if interrupted and "accuracy" not in results:
        print(f"{results['status']}: nothing was measured yet, so no report is written", file=sys.stderr)
        return 130
    demo_report.write(args.out, results, gallery)
    demo_report.show(results)
    print(f"{results['status']}, {results['seconds']:.0f} s; report: {args.out / 'report.md'}")
    return 130 if interrupted else 0


def _facts(args: argparse.Namespace, splits: data.Splits) -> dict:
    """What was asked and where it runs; the measurements are added to this."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "rse-fast", *_PACKAGES.values()):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = None
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    device = {"device": args.device, "system": platform.platform(), "threads": torch.get_num_threads()}
    device["processor"] = (
        torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    )
    parts = {name: len(getattr(splits, name)) for name in ("train", "val", "test")}
    described = {"name": splits.name, "classes": splits.classes, "shape": list(splits.train.images.shape[1:]), **parts}
    return {"stages": [], "settings": settings, "versions": versions, "machine": device, "data": described}


def _measure(args: argparse.Namespace, splits: data.Splits, stage: Callable[[str], None], results: dict, gallery: dict) -> None:
    """Fills ``results`` step by step. What is in it is a finished measurement, also when an interrupt ends this early."""
    stage("training the plain network")
    results["training"] = {}
    plain, results["training"]["plain"] = _train(splits, args, "plain", "plain")
    stage("training the RSE network")
    noisy, results["training"]["rse"] = _train(splits, args, "rse", "RSE")
    ensemble = rse_fast.Ensemble(noisy, draws=args.draws).eval()

    stage("measuring accuracy")
    chosen = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(args.seed))[: args.test_images]
    images = splits.test.images[chosen].to(args.device).float().div_(255)
    labels = splits.test.labels[chosen].to(args.device)
    clean = _accuracy_by_draws(noisy, images, labels, args)
    results["accuracy"] = {
        "plain": estimate([_accuracy(_plain_labels(plain, images), labels)], len(labels)),
        "rse_one_draw": next(row for row in clean if row["draws"] == 1),
        "rse_ensemble": _score(ensemble, images, labels, args.repeats)[0],
    }
    results["draws"] = {"clean": clean}

    stage("measuring speed")
    eager = _new_net(args, splits)
    eager.load_state_dict(noisy.state_dict())
    add_eager_noise(eager.eval(), args.init_sigma, args.inner_sigma)
    results["speed"] = _speed(plain, eager, ensemble, images[:_TIMED_BATCH], args)

    stage("attacking")
    images, labels = images[: args.attack_images], labels[: args.attack_images]
    gallery |= {"images": images, "labels": labels}
    levels = _attack_all(plain, ensemble, images, labels, args, results, gallery)

    stage("measuring accuracy on attacked images")
    index = min(range(len(levels)), key=lambda i: abs(levels[i]["rse_ensemble"]["mean"] - 0.5))
    attacked = _accuracy_by_draws(noisy, gallery["rse"][index]["images"], labels, args)
    results["draws"] |= {"attacked": attacked, "attacked_eps": levels[index]["eps"]}


def _new_net(args: argparse.Namespace, splits: data.Splits) -> nn.Module:
    net = SmallNet(len(splits.classes), in_channels=splits.train.images.shape[1])
    return net.to(args.device, memory_format=torch.channels_last)  # on CPUs 1.3 to 4 times as fast as NCHW here


def _train(splits: data.Splits, args: argparse.Namespace, defence: str, name: str) -> tuple[nn.Module, dict]:
    """A network of the last epoch in eval mode, and the record of its training. For an RSE network this is noisy SGD."""
    from tqdm import tqdm

    batch_size = min(64 if len(splits.train) < 10_000 else 256, len(splits.train))
    config = Config(
        defence=defence, init_sigma=args.init_sigma, inner_sigma=args.inner_sigma, epochs=args.epochs, batch_size=batch_size,
        lr=0.1 * batch_size / 64, bf16=args.bf16, seed=args.seed,
    )  # fmt: skip
    trainer = Trainer(config, splits, Ranks(0, 1, torch.device(args.device)))
    history = []
    start = time.perf_counter()
    with tqdm(total=trainer.total_steps, desc=f"training {name}", unit="step", disable=None) as bar:
        while not trainer.complete:
            try:
                row = trainer.advance()
            except FloatingPointError as error:
                raise FloatingPointError(f"{name} network: {error}") from error
            bar.update(trainer.step - bar.n)
            if row is not None and row["event"] == "epoch":
                history.append(row)
                bar.set_postfix(epoch=f"{trainer.epoch}/{args.epochs}", loss=f"{row['loss']:.3f}", val=f"{row['val_accuracy']:.1%}")
    seconds = time.perf_counter() - start
    print(
        f"{name}: {args.epochs} epochs in {seconds:.0f} s, loss {row['loss']:.3f}, validation accuracy {row['val_accuracy']:.1%}",
        flush=True,
    )
    net = trainer.model.eval().requires_grad_(False)  # the attacks need gradients of the images only
    return net, {"seconds": seconds, "batch_size": batch_size, "peak_rate": config.lr, "epochs": history}


def _plain_labels(net: nn.Module, images: Tensor) -> Tensor:
    """Labels of one pass per image (of one draw, if the network is noisy)."""
    with torch.inference_mode():
        return torch.cat([net(chunk).argmax(-1) for chunk in images.split(_INFERENCE_ROWS)])


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def _score(ensemble: nn.Module, images: Tensor, labels: Tensor, repeats: int) -> tuple[dict, Tensor]:
    """Accuracy over ``repeats`` predictions with fresh seeds, and the labels of the last one."""
    predictions = [ensemble.predict(images) for _ in range(repeats)]
    scored = estimate([_accuracy(p.labels, labels) for p in predictions], len(labels))
    return scored | {"seeds": [int(p.seed) for p in predictions]}, predictions[-1].labels


def _accuracy_by_draws(noisy: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> list[dict]:
    """Accuracy of ensembles of 1, 2, 3, ... draws. One set of single draws serves all sizes: disjoint groups of it are the repeats."""
    from tqdm import tqdm

    one_draw = rse_fast.Ensemble(noisy, draws=1).eval()
    total = max(args.draws, args.curve_draws)
    probs = torch.stack([one_draw.predict(images).probs for _ in tqdm(range(total), desc="accuracy by draws", unit="draw", disable=None)])
    rows = []
    for draws in sorted({n for n in _DRAW_COUNTS if n <= total} | {args.draws}):
        groups = probs[: total - total % draws].unflatten(0, (-1, draws)).mean(1)  # [groups, N, K]
        rows.append({"draws": draws, **estimate([_accuracy(group.argmax(-1), labels) for group in groups], len(labels))})
    return rows


def _attack_all(
    plain: nn.Module, ensemble: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace, results: dict, gallery: dict
) -> list[dict]:
    """PGD at every eps on both networks; each finished eps is added to ``results`` and ``gallery``."""
    from tqdm import tqdm

    levels: list[dict] = []
    unattacked = {"plain": estimate([_accuracy(_plain_labels(plain, images), labels)], len(labels))}
    unattacked["rse_ensemble"], _ = _score(ensemble, images, labels, args.repeats)
    results["attack"] = {
        "method": "foolbox LinfPGD, random start, step 2.5 eps / steps",
        "steps": args.steps,
        "unattacked": unattacked,
        "levels": levels,
    }
    rows = max(1, min(_ATTACK_ROWS, _ATTACK_ROWS * 32 * 32 // images[0, 0].numel()))
    chunks = {id(plain): rows, id(ensemble): max(1, rows // args.draws)}
    with tqdm(total=2 * len(args.eps) * len(images), desc="attacking", unit="image", disable=None) as bar:
        for eps in args.eps:
            found = {}
            for net in (plain, ensemble):
                parts = []
                for x, y in zip(images.split(chunks[id(net)]), labels.split(chunks[id(net)]), strict=True):
                    parts.append(_pgd(net, x, y, eps, args))
                    bar.update(len(x))
                found[id(net)] = torch.cat(parts)
            on_plain, on_ensemble = found[id(plain)], found[id(ensemble)]
            plain_labels = _plain_labels(plain, on_plain)
            scored, rse_labels = _score(ensemble, on_ensemble, labels, args.repeats)
            transfer, _ = _score(ensemble, on_plain, labels, args.repeats)
            level = {
                "eps": eps,
                "plain": estimate([_accuracy(plain_labels, labels)], len(labels)),
                "rse_ensemble": scored,
                "rse_transfer": transfer,
                "largest_change": max((found_images - images).abs().max().item() for found_images in found.values()),
            }
            gallery["plain"].append({"images": on_plain, "labels": plain_labels})
            gallery["rse"].append({"images": on_ensemble, "labels": rse_labels})
            levels.append(level)  # last, so that an interrupt never leaves a level without its images
            bar.set_postfix(eps=f"{eps:.3g}", plain=f"{level['plain']['mean']:.1%}", rse=f"{scored['mean']:.1%}")
    return levels


def _pgd(net: nn.Module, images: Tensor, labels: Tensor, eps: float, args: argparse.Namespace) -> Tensor:
    import foolbox

    attack = foolbox.attacks.LinfPGD(steps=args.steps, rel_stepsize=2.5 / args.steps)
    target = foolbox.PyTorchModel(net, bounds=(0, 1), device=images.device)
    _, found, _ = attack(target, images, labels, epsilons=eps)
    return found.detach()


def _speed(plain: nn.Module, eager: nn.Module, ensemble: nn.Module, images: Tensor, args: argparse.Namespace) -> dict:
    """Images/s of the ensemble, of the same network as an eager loop, and of one plain pass: interleaved, median of several rounds.

    The loop runs in both memory layouts (torch's convolutions are faster in channels_last, its generator in the other) and in bfloat16;
    the fastest of these counts.
    """
    loops = {
        "float32, contiguous": (copy.deepcopy(eager).to(memory_format=torch.contiguous_format), images),
        "float32, channels_last": (eager, images),
        "bfloat16, channels_last": (copy.deepcopy(eager).bfloat16(), images.bfloat16()),
    }
    calls: dict[str, Callable[[], object]] = {"plain": lambda: _plain_labels(plain, images), "ensemble": lambda: ensemble.predict(images)}
    for name, (net, batch) in loops.items():
        calls[name] = lambda net=net, batch=batch: eager_loop(net, batch, args.draws).argmax(-1)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: 1 for name in calls}
    for name, call in calls.items():
        call()
        counts[name] = max(1, round(0.2 / _seconds(call, 1, args.device)))
    for _ in range(args.timings):
        for name, call in calls.items():
            rates[name].append(counts[name] * len(images) / _seconds(call, counts[name], args.device))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    fastest = max(loops, key=lambda name: medians[name])
    return {
        "batch": len(images),
        "draws": args.draws,
        "plain": medians["plain"],
        "ensemble": medians["ensemble"],
        "eager_loop": medians[fastest],
        "eager_loop_form": fastest,
        "ratio": statistics.median(fast / slow for fast, slow in zip(rates["ensemble"], rates[fastest], strict=True)),
        "rounds": rates,
    }


def _seconds(call: Callable[[], object], count: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
