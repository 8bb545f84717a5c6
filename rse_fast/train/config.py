"""What a training run is asked to do: one flat, checked, JSON-serialisable record, from which the command line is made as well."""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from rse_fast.data import read_json, write_atomically

DEFENCES = ("plain", "rse", "gaussian", "adversarial", "distillation", "brelu", "rse+adversarial")


_BOOKKEEPING = ("data", "device", "workers", "compile", "cuda_graphs", "keep", "save_steps", "log_steps")  # fields that change no result


def _option(default, kind, text, *, low=-math.inf, high=math.inf, above=-math.inf, choices=None, pair=False):
    """A field of ``kind`` with its help text; numbers must be in [low, high] and greater than ``above``. A default of None allows None;
    pair: two numbers are fine as well."""
    checks = {"kind": kind, "text": text, "low": low, "high": high, "above": above, "choices": choices, "optional": default is None}
    checks["pair"] = pair
    return field(default=default, metadata=checks)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run. Raises ValueError or TypeError naming the field; what is left None is filled in where another field implies it."""

    # Data and network
    data: str = _option("digits", str, "data set: a folder of images, of CIFAR-10 or of STL-10, a .npz or .safetensors file, or digits")
    resize: int | tuple[int, int] | None = _option(
        None, int, "size of the images of a folder: one number, or height and width as in 48x64", low=1, pair=True
    )
    val_fraction: float = _option(0.1, float, "share of the training images set aside for validation", above=0, high=0.9)
    lazy: bool = _option(False, bool, "decode the images of a folder anew at each use, in worker processes (ImageNet)")
    workers: int | None = _option(None, int, "processes (lazy) or threads that decode images", low=0)
    pad: int | None = _option(None, int, "pixels of zero padding behind random crops; by default an eighth of the width", low=0)
    model: str = _option("small", str, "small, small-vgg, small-resnet, vgg16, resnext29, model-a, or package.module:function")
    # Defence
    defence: str = _option("rse", str, "what the network is trained to withstand attacks with", choices=DEFENCES)
    init_sigma: float = _option(0.2, float, "noise before the first convolution (gaussian: on the image), in pixel units", low=0)
    inner_sigma: float = _option(0.1, float, "noise before the other convolutions", low=0)
    test_init_sigma: float | None = _option(None, float, "--init-sigma in validation and use, where it differs", low=0)
    test_inner_sigma: float | None = _option(None, float, "--inner-sigma in validation and use, where it differs", low=0)
    sigma_warmup: float = _option(0.0, float, "epochs in which the noise grows from 0 to its full strength", low=0)
    learnable_sigma: str | None = _option(
        None, str, "learn sigma: one for each layer, or one for each channel", choices=("layer", "channel")
    )
    sigma_regulariser: float = _option(0.0, float, "weight of -mean(sqrt(sigma)) in the loss: keeps learnable sigmas from shrinking", low=0)
    draws: int = _option(1, int, "noise draws per image in a batch", low=1)
    attack: str = _option("pgd", str, "attack in adversarial training", choices=("fgsm", "pgd"))
    eps: float = _option(8 / 255, float, "L-infinity radius of that attack, pixels in [0, 1]; 8/255 is fine", above=0, high=1)
    attack_steps: int = _option(7, int, "steps of that attack, if it is pgd", low=1)
    attack_draws: int = _option(1, int, "noise draws behind each gradient of the attack", low=1)
    temperature: float | None = _option(
        None, float, "temperature of the softmax in training; by default 100 in distillation, else 1", above=0
    )
    augment_sigma: float = _option(0.05, float, "brelu: Gaussian noise added to the training images", low=0)
    # Optimisation
    epochs: int = _option(16, int, "passes over the training images", low=1)
    batch_size: int = _option(128, int, "images in a batch, over all processes", low=1)
    lr: float = _option(0.1, float, "learning rate (one-cycle: its peak)", above=0)
    start_scale: float | None = _option(None, float, "side of the images in the first epoch, as a share of the full side", above=0, high=1)
    full_scale: float | None = _option(
        None, float, "with --start-scale: share of the epochs, at the end, with images of full size; by default 0.4", above=0, high=1
    )
    schedule: str = _option(
        "one-cycle",
        str,
        "of the learning rate: one-cycle, or step: a tenth of it after 40, 70 and 90 %% of the run",
        choices=("one-cycle", "step"),
    )
    momentum: float = _option(0.9, float, "momentum of SGD", low=0, high=1)
    nesterov: bool = _option(True, bool, "Nesterov's momentum")
    weight_decay: float = _option(5e-4, float, "L2 penalty on the weights, not on sigmas", low=0)
    label_smoothing: float = _option(0.0, float, "probability spread over all classes", low=0, high=1)
    ema: float = _option(0.0, float, "decay of the moving average of the weights that is validated and kept (0: none)", low=0, high=1)
    clip: float | None = _option(None, float, "largest norm of the gradient", above=0)
    # Machine
    device: str = _option("auto", str, "torch device")
    bf16: bool = _option(False, bool, "bfloat16 autocast")
    channels_last: bool = _option(True, bool, "memory layout of weights and activations")
    compile: bool = _option(False, bool, "torch.compile")
    cuda_graphs: bool | None = _option(
        None,
        bool,
        "launch each step as one CUDA graph; the network must do the same in every step (by default the package's own, on one GPU)",
    )
    seed: int = _option(0, int, "seed of weights, order, augmentation and noise", low=0, high=2**63 - 1)
    # Bookkeeping
    keep: int = _option(3, int, "checkpoints that are kept", low=1)
    save_steps: int | None = _option(None, int, "steps between checkpoints, besides one at the end of each epoch", low=1)
    log_steps: int = _option(50, int, "steps between rows of the log, besides one at the end of each epoch", low=1)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        if self.temperature is None:
            object.__setattr__(self, "temperature", 100.0 if self.defence == "distillation" else 1.0)
        if self.learnable_sigma and (self.sigma_warmup or self.test_init_sigma is not None or self.test_inner_sigma is not None):
            raise ValueError("learnable_sigma: a learned sigma has no warm-up and no other value for tests; leave those out")
        if self.learnable_sigma and self.defence == "gaussian":
            raise ValueError("learnable_sigma: gaussian adds fixed noise to the images; a learned one would shrink to 0")
        if self.sigma_regulariser and not self.learnable_sigma:
            raise ValueError(f"sigma_regulariser: needs learnable_sigma, got {self.sigma_regulariser} for a fixed sigma")
        if self.cuda_graphs and self.compile:
            raise ValueError("cuda_graphs: a step is captured as it is, without compile; choose one of the two")
        if self.start_scale is None and self.full_scale is not None:
            raise ValueError(f"full_scale: needs start_scale, got {self.full_scale} for images of one size")
        if self.cuda_graphs and self.start_scale is not None:
            raise ValueError("cuda_graphs: a captured step takes images of one size; leave start_scale out")
        if self.sigma_warmup > self.epochs:
            raise ValueError(f"sigma_warmup: expected at most the {self.epochs} epochs of the run, got {self.sigma_warmup}")

    @property
    def noisy(self) -> bool:
        return self.defence in ("rse", "gaussian", "rse+adversarial")

    @property
    def adversarial(self) -> bool:
        return self.defence in ("adversarial", "rse+adversarial")

    @property
    def fingerprint(self) -> str:
        """Identifies what is computed: equal for configurations that differ in device, compilation, bookkeeping and the place of the data
        only. What the data are is for the run to check. A field that is None counts as absent, so that runs from before there was such a
        field can go on."""
        what = {name: value for name, value in dataclasses.asdict(self).items() if name not in _BOOKKEEPING and value is not None}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: "Config") -> list[tuple[str, object, object]]:
        """(field, value here, value there) of what the fingerprints differ in."""
        there = dataclasses.asdict(other)
        return [(k, v, there[k]) for k, v in dataclasses.asdict(self).items() if k not in _BOOKKEEPING and v != there[k]]

    def save(self, path: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Reads what `save` wrote. Raises ValueError for a file that cannot be read or holds other fields."""
        try:
            found = read_json(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"config: cannot read {str(path)!r}: {str(error)[:300]}") from error
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(found, dict) or not found.keys() <= names:
            unknown = sorted(found.keys() - names) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"config: expected the fields of a training run in {str(path)!r}, got {str(unknown)[:300]}")
        try:
            return cls(**found)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{str(error)[:500]} (in {str(path)!r})") from error


def _checked(f, value):
    """The value of a field, an integer made a float where one is expected."""
    rule = f.metadata
    if value is None and rule["optional"]:
        return None
    if rule["pair"] and isinstance(value, (list, tuple)) and len(value) == 2:
        return tuple(_value(f.name, rule, side) for side in value)
    return _value(f.name, rule, value)


def _value(name, rule, value):
    kind = rule["kind"]
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"{name}: expected {kind.__name__}, got {value!r}")
    if rule["choices"] and value not in rule["choices"]:
        raise ValueError(f"{name}: expected one of {', '.join(rule['choices'])}, got {value!r}")
    if kind in (int, float):
        low, high, above = rule["low"], rule["high"], rule["above"]
        if not (low <= value <= high and value > above and math.isfinite(value)):
            bounds = f"above {above}" if above > -math.inf else f"at least {low}"
            raise ValueError(f"{name}: expected a number {bounds}{f' and at most {high}' if high < math.inf else ''}, got {value!r}")
    return value


def size(text: str) -> int | tuple[int, int]:
    """A number, or two as in 48x64."""
    if pair := re.fullmatch(r"(\d+)[x,](\d+)", text):
        return int(pair[1]), int(pair[2])
    return int(text)
