"""The training loop in memory. It knows no files: what keeps a run is `rse_fast.train.run`."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rse_fast import models
from rse_fast.data import Splits, batches, derived_seed, shuffled
from rse_fast.nn import noise_layers
from rse_fast.outputs import take
from rse_fast.train import defences
from rse_fast.train.captured import Captured, captures
from rse_fast.train.config import Config
from rse_fast.train.distributed import Ranks

_TRAINING, _VALIDATION = 2, 3  # 0 and 1 are order and augmentation (rse_fast.data)
_FULL_SCALE = 0.4  # of the epochs, the last, where images grow and the configuration does not say
_STEP_MILESTONES = (0.4, 0.7, 0.9)  # the paper's 80 + 60 + 40 + 20 epochs


class Trainer:
    """A run that `advance` takes one batch further at a time.

    All randomness of a step follows from (seed, step, rank): before each, torch's generators are seeded with it, as order and augmentation
    are. So a run that continues from `state_dict` and the weights does bit for bit what it would have done without the break.

    Args:
        splits: trained on ``train``, validated on ``val``; ``test`` is not looked at.
        ranks: this process among those of the run; default: it is alone, on the CPU.
        teacher: the model that a distillation imitates.

    Raises ValueError for a batch size that does not fit, and for a model or defence that cannot be built.
    """

    def __init__(self, config: Config, splits: Splits, ranks: Ranks | None = None, teacher: nn.Module | None = None):
        self.config, self.splits = config, splits
        self.ranks = ranks or Ranks(0, 1, torch.device("cpu"))
        device = self.ranks.device
        if config.defence == "distillation" and teacher is None:
            raise ValueError("teacher: distillation needs one, got None")
        self.teacher = teacher and teacher.to(device).eval()
        self.steps_per_epoch = len(splits.train) // config.batch_size
        shuffled(splits.train, config.batch_size, seed=config.seed, epoch=0, ranks=self.ranks.size)  # raises for a bad batch size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step = self.epoch = 0

        torch.manual_seed(config.seed)
        model = defences.protect(models.make(config.model, len(splits.classes), splits.train.shape[0]), config)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout)
        if self.ranks.size > 1 and device.type == "cuda":  # statistics of the whole batch; torch has this for GPUs only
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        for size in {self._image_size(0), self._image_size(config.epochs)}:
            self._check_model(size)
        self._layers = list(noise_layers(self.model).values())
        self._train_sigmas = self._sigmas()
        defences.use_test_sigma(self.model, config)
        self._test_sigmas = self._sigmas()
        self._set_sigmas(self._train_sigmas)

        learned = [p for name, p in self.model.named_parameters() if name.endswith("sigma_raw")]
        others = [p for name, p in self.model.named_parameters() if not name.endswith("sigma_raw")]
        groups = [{"params": others}, {"params": learned, "weight_decay": 0.0}]  # decay would pull sigma to softplus(0) = 0.69
        self.optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]], lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.nesterov and config.momentum > 0,
        )  # fmt: skip
        if config.schedule == "one-cycle":
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, config.lr, self.total_steps, cycle_momentum=False)
        else:
            milestones = [round(share * self.total_steps) for share in _STEP_MILESTONES]
            self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, gamma=0.1)
        self.average = None
        if config.ema:
            self.average = AveragedModel(self.model, device, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        if config.compile:
            self.model.compile()
        self._forward = self.model
        if self.ranks.size > 1:
            self._forward = nn.parallel.DistributedDataParallel(self.model, [device] if device.type == "cuda" else None)
        self._captured = None
        if captures(config, device, self.ranks.size):
            self._captured = Captured(self._gradients, required=config.cuda_graphs is True)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # of this epoch's images: loss, accuracy, number
        self._batches: Iterator | None = None
        self._validation: Iterator | None = None

    def _check_model(self, size):
        images = torch.zeros((1, self.splits.train.shape[0], *size), device=self.ranks.device)
        wanted = f"images {list(images.shape[1:])} of {self.splits.name} into {len(self.splits.classes)} classes"
        try:
            with torch.no_grad(), self._autocast():
                found = take(self.model.eval()(images)).shape
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"model: {self.config.model!r} cannot sort {wanted}: {str(error).splitlines()[0]}") from error
        if found != (1, len(self.splits.classes)):
            raise ValueError(f"model: {self.config.model!r} cannot sort {wanted}: it returns shape {list(found)} for one")

    @property
    def complete(self) -> bool:
        return self.epoch == self.config.epochs

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and kept: the moving average if there is one. Its sigmas are those of training."""
        return self.model if self.average is None else self.average.module

    def advance(self) -> dict | None:
        """Trains on one batch, or validates on one after the last of an epoch. Returns a row for the log when there is one.

        A row has "event" "step" (every ``log_steps`` steps) or "epoch". Losses are means over all processes. Raises FloatingPointError
        when a row's loss is not finite.
        """
        if self.step < (self.epoch + 1) * self.steps_per_epoch:
            return self._train_step()
        if self._validation is None:
            self._validation = self._validate()
        row = next(self._validation)
        if row is not None:
            self._validation = None
            self._sums.zero_()
            self.epoch += 1
        return row

    def state_dict(self) -> dict:
        """Everything but the weights: where the run is, the sums of the epoch, optimiser, schedule."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "sums": self.ranks.total(self._sums).cpu(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "averaged": 0 if self.average is None else int(self.average.n_averaged),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues where ``state`` was taken; the weights are loaded into ``model`` and ``average.module`` by the caller."""
        self.step, self.epoch = state["step"], state["epoch"]
        self._sums = (state["sums"] * self.ranks.main).to(self.ranks.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.n_averaged.fill_(state["averaged"])
        self._batches = self._validation = None
        self._warm_up(self.step - 1)

    # ------------------------------------------------------------------------------------------------------------------ training
    def _train_step(self):
        config = self.config
        if self._batches is None:
            pad = self.splits.pad if config.pad is None else config.pad
            self._batches = shuffled(
                self.splits.train, config.batch_size, seed=config.seed, epoch=self.epoch, start=self.step % self.steps_per_epoch,
                rank=self.ranks.rank, ranks=self.ranks.size, pad=pad, flip=self.splits.flip, device=self.ranks.device,
            )  # fmt: skip
        images, labels = next(self._batches)
        if (size := self._image_size(self.epoch)) != images.shape[2:]:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        torch.manual_seed(derived_seed(config.seed, _TRAINING, self.step, self.ranks.rank))
        self._warm_up(self.step)
        self.model.train()
        if config.adversarial:  # attacks act on the model itself, whose statistics DistributedDataParallel shares at its own forward only
            self.ranks.share(self.model.buffers())
        loss, accuracy, objective = (self._captured or self._gradients)(images, labels)
        self._sums += len(labels) * torch.stack([loss.double(), accuracy.double(), torch.ones_like(self._sums[0])])
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        rate = self.scheduler.get_last_lr()[0]
        self.step += 1
        if self.step < self.total_steps:
            self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        if self.step % self.steps_per_epoch == 0:
            self._batches = None
        if self.step % config.log_steps:
            return None
        mean = (self.ranks.total(objective) / self.ranks.size).item()
        return self._row("step", loss=mean, lr=rate)

    def _image_size(self, epoch):
        """(height, width) that an epoch's images are scaled to: they grow linearly, in steps of 4 pixels (progressive resizing, as in
        fast.ai's entry to DAWNBench, 2018). An epoch at half the side costs a quarter."""
        full = tuple(self.splits.train.shape[1:])
        if self.config.start_scale in (None, 1.0):
            return full
        share = _FULL_SCALE if self.config.full_scale is None else self.config.full_scale
        growing = self.config.epochs - max(1, round(share * self.config.epochs))
        if epoch >= growing:
            return full
        scale = self.config.start_scale + (1 - self.config.start_scale) * epoch / growing
        return tuple(min(side, max(4, int(side * scale) // 4 * 4)) for side in full)

    def _gradients(self, images, labels):
        """(mean loss of the batch, its accuracy, what is minimised), without gradients; those of the parameters are left in them."""
        config = self.config
        with self._autocast():
            loss, accuracy = defences.batch_loss(config, self.model, self._forward, images, labels, self.teacher)
        objective = loss
        if config.sigma_regulariser and self._layers:  # as in Learn2Perturb (Jeddi et al., CVPR 2020), without its schedule
            spread = torch.stack([layer.current_sigma().sqrt().mean() for layer in self._layers]).mean()
            objective = loss - config.sigma_regulariser * spread
        self.optimizer.zero_grad()
        objective.backward()
        return loss.detach(), accuracy, objective.detach()

    def _row(self, event, **values):
        for name, value in values.items():
            if "loss" in name:
                self._check_finite(name, value)
        row = {"event": event, "step": self.step, "epoch": self.step / self.steps_per_epoch, **values}
        if self._layers:
            row["sigma"] = torch.stack([layer.current_sigma().detach().mean() for layer in self._layers]).mean().item()
        return row

    def _check_finite(self, name, value):
        if not math.isfinite(value):
            raise FloatingPointError(f"training diverged: {name} is {value} at step {self.step}; try a smaller lr or sigma")

    # ---------------------------------------------------------------------------------------------------------------- validation
    def _validate(self):
        """Yields None after each batch, and then the row of the epoch."""
        config, model, device = self.config, self.evaluated, self.ranks.device
        loss, accuracy, count = self.ranks.total(self._sums).tolist()
        row = self._row("epoch", loss=loss / count, accuracy=accuracy / count, lr=self.optimizer.param_groups[0]["lr"])
        row["epoch"] = self.epoch + 1
        self.ranks.share(model.buffers())  # what is validated is what is kept: rank 0's
        self._set_sigmas(self._test_sigmas, model=model)
        torch.manual_seed(derived_seed(config.seed, _VALIDATION, self.epoch, self.ranks.rank))
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, correct under attack
        share = math.ceil(len(self.splits.val) / self.ranks.size)
        stream = batches(self.splits.val, config.batch_size, rank=self.ranks.rank, ranks=self.ranks.size, device=device)
        for _ in range(math.ceil(share / config.batch_size)):  # as often in each process: what follows a yield may be collective
            for images, labels in itertools.islice(stream, 1):
                with self._autocast():
                    sums += self._validated(model, images, labels)
            yield None
        self._set_sigmas(self._train_sigmas, model=model)
        loss, correct, robust = (self.ranks.total(sums) / len(self.splits.val)).tolist()
        self._check_finite("val_loss", loss)
        row |= {"val_loss": loss, "val_accuracy": correct}
        if config.adversarial:
            row["val_attacked_accuracy"] = robust
        yield row

    def _validated(self, model, images, labels):
        """Float64 [3] of a batch: sum of its losses, number of right labels, and of those under attack."""
        with torch.no_grad():
            logits = take(model(images)).float()
        sums = [F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()]
        if self.config.adversarial:
            attacked = defences.attack(model, images, labels, self.config)
            with torch.no_grad():
                sums.append((take(model(attacked)).argmax(-1) == labels).sum())
        else:
            sums.append(torch.zeros_like(sums[1]))
        return torch.stack([value.double() for value in sums])

    def _autocast(self):
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.bf16)

    # --------------------------------------------------------------------------------------------------------------------- sigma
    def _sigmas(self):
        return [layer.current_sigma().detach().clone() for layer in self._layers]

    def _warm_up(self, step):
        """Sets the fixed sigmas of a step: they grow linearly until ``sigma_warmup`` epochs are over."""
        steps = self.config.sigma_warmup * self.steps_per_epoch
        if step < steps + 1:  # also at the first step of full strength
            self._set_sigmas(self._train_sigmas, min(1.0, (step + 1) / (steps + 1)))

    def _set_sigmas(self, sigmas, factor=1.0, model=None):
        """Writes fixed sigmas; learned ones are the optimiser's."""
        if not self.config.learnable_sigma:
            layers = self._layers if model is None else noise_layers(model).values()
            for layer, sigma in zip(layers, sigmas, strict=True):
                layer.set_sigma(sigma * factor)
