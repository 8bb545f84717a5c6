"""Memory: whether it ran out, what this process may still take, and what tensors hold while they live."""

import functools
import math
import os
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")  # the CPU's allocator; CUDA and Triton; cuBLAS and cuDNN


def out_of_memory(error: Exception) -> bool:
    """Whether memory was what an operation lacked; only torch's own allocator of GPU memory has a class of errors for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still take on ``device``: what is free there, or less where a limit is set. inf if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available(), _cgroup(), _address_space()) if device.type == "cpu" else math.inf


def _available() -> float:
    lines = _read("/proc/meminfo").splitlines()
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def _cgroup() -> float:
    """What the control groups around this process leave it. Cached files that nobody uses are given up where memory is asked for."""
    left = math.inf
    for folder, limit, used, cached in _limited_groups():
        figures = [_read(folder / limit).strip(), _read(folder / used).strip()]
        statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
        if all(figure.isdigit() for figure in figures):
            left = min(left, float(figures[0]) - float(figures[1]) + float(statistics.get(cached, 0)))
    return max(0.0, left)


@functools.cache
def _limited_groups() -> list[tuple[Path, str, str, str]]:
    """(folder, file of the limit, file of what is used, entry of memory.stat for unused cached files) of the groups that limit memory."""
    found = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, own = line.split(":", 2)
        if not controllers:  # version 2
            root, files = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, files = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / own.lstrip("/")
        groups = [folder, *folder.parents][: len(folder.parents) - len(root.parents) + 1]  # a container may see its own as the root alone
        found += [(group, *files) for group in groups if (text := _read(group / files[0]).strip()).isdigit() and int(text) < 2**60]
    return found


def _address_space() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _read("/proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return math.inf
    return max(0.0, limit - float(pages[0]) * os.sysconf("SC_PAGE_SIZE"))


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at the same time, of those made within ``with``; ``peak`` is the most there were.

    Works on the meta device as well, where the tensors have sizes and no memory.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._holders = Counter()  # tensors by the storage they look at

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata in self._holders or storage._cdata not in given:
                self._hold(tensor, storage._cdata, storage.nbytes())
        return out

    def _hold(self, tensor, key, size):
        if not self._holders[key]:
            self.alive += size
            self.peak = max(self.peak, self.alive)
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key, size).atexit = False

    def _release(self, key, size):
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.alive -= size


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of what autograd keeps for backward within ``with``, each storage once: ``total``; not the model's own tensors."""

    def __init__(self, model: torch.nn.Module):
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.total, self._held = 0, []  # held, so that no storage comes to lie where one was counted

        def pack(saved):
            for tensor in _tensors(saved):
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    own.add(storage._cdata)
                    self._held.append(tensor.detach())
                    self.total += storage.nbytes()
            return saved.detach()  # with its history, an operation that saves its own result would keep itself for ever

        super().__init__(pack, lambda saved: saved)

    def __enter__(self):
        super().__enter__()
        return self


def _tensors(tree):
    """Those with a storage to ask; a weight in the vendor library's own order has none."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]
