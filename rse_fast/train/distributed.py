"""The processes of one run, as torchrun starts them; without torchrun there is one."""

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, distributed


class ProcessLost(RuntimeError):
    """Another process of the run has died, or cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """rank, of ``size`` processes; the torch device of this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes, in each of them."""
        if self.size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives ``tensors`` the values that they have in rank 0, in place."""
        if self.size > 1:
            for values in tensors:
                distributed.broadcast(dense := values.contiguous(), 0)
                values.copy_(dense)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds in any process: so that all of them stop at the same step."""
        if self.size == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=self.device)))


@contextlib.contextmanager
def connect(device: str = "auto"):
    """Yields the `Ranks` of this process, connected to the others for the time of the ``with``: NCCL on GPUs, Gloo on CPUs.

    device: a torch device, "auto" for a GPU where there is one. With several processes each takes the GPU of its local rank. Raises
    ValueError for a device that cannot be used, `ProcessLost` where another process is gone.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if size > 1 and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        chosen = torch.empty(1, device=name).device
        torch.zeros(1, device=chosen).item()
    except Exception as error:  # torch has several kinds for devices it does not have
        raise ValueError(f"device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
    if size == 1:
        yield Ranks(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    owner = not distributed.is_initialized()
    try:
        if owner:
            # Imported before there is a group: its functions take the group of that moment as a default argument, and a group held there
            # stays alive after it is destroyed, with threads that abort the process if they need the interpreter while it shuts down.
            importlib.import_module("torch.distributed.nn.functional")
            distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), chosen)
    except RuntimeError as error:
        if not _of_the_connection(error):
            raise
        owner = False  # to leave the group would wait for the dead one
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0])[:100]
        raise ProcessLost(f"another process of this run has died or cannot be reached ({reason})") from error
    finally:
        if owner and distributed.is_initialized():
            distributed.destroy_process_group()


def _of_the_connection(error):
    """Gloo has no class of its own for what NCCL calls a DistBackendError."""
    return isinstance(error, distributed.DistError) or re.search(r"gloo|Connection (closed|reset|refused)|Broken pipe", str(error))


def leave(text: str) -> NoReturn:
    """Says why and ends this process with status 1, at once: threads of its group may wait for the dead one for half an hour."""
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
