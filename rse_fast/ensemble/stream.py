"""Continuous batching: decided images free their slots for waiting ones, so the packed batch stays full.

An image's result depends on its own draws alone. They are judged one by one, so where it stops does not depend on how many draws a
packed batch held, nor on which images shared it.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch

from rse_fast.ensemble import early_exit
from rse_fast.ensemble.prediction import DrawStatistics
from rse_fast.ensemble.softmax import log_softmax

# A round may take as many draws more as makes the draws of an image grow by this factor. The surplus of an image that is decided within
# a round is not counted; without it, the last hard images of a batch would run a row or two at a time.
GROWTH = 1.5


class Scheduler:
    """The images under way and those that wait.

    run: (x [A, ...], sample_ids int64 [A, 2], draws m) -> float32 logits [m, A, ..., K], draws ``sample_ids[i, 1] ..`` of image
    ``sample_ids[i, 0]``.
    row: shape of an image's logits, the classes last.
    draws: most draws an image; rows: rows of a full packed batch; criterion: of `early_exit`.
    """

    def __init__(self, run: Callable, row: tuple[int, ...], draws: int, rows: int, criterion, device: torch.device):
        self.run, self.row, self.draws, self.rows, self.criterion, self.device = run, row, draws, rows, criterion, device
        # With early exit, one draw each of many images: every image stops at the very draw that decides it, and no row is for nothing.
        # Without, all images take the same draws, and an image's draws go together.
        self.slots = max(1, rows // draws) if criterion is None else rows
        self.waiting: deque[tuple[int, torch.Tensor]] = deque()
        self.x, self.statistics, self.state = None, self.nothing(), None
        self.rows_run = self.draws_counted = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or len(self.statistics.index) > 0

    @property
    def occupancy(self) -> float:
        """Share of the rows of the packed batches so far that counted as a draw of an image; nan before the first."""
        return self.draws_counted / self.rows_run if self.rows_run else float("nan")

    def nothing(self) -> DrawStatistics:
        """The statistics of no images."""
        return DrawStatistics.empty(torch.zeros(0, dtype=torch.int64, device=self.device), self.row)

    def put(self, x: torch.Tensor, index0: int) -> None:
        """Queues images x [B, ...] as number index0, index0 + 1, ..."""
        self.waiting.extend((index0 + i, image) for i, image in enumerate(x))

    def step(self) -> DrawStatistics:
        """Runs one packed batch; the images that it finished."""
        self._refill()
        active, draws = len(self.statistics.index), self._draws()
        log_p = log_softmax(self.run(self.x, torch.stack([self.statistics.index, self.statistics.used], 1), draws))
        number = self.statistics.used + torch.arange(1, draws + 1, device=self.device)[:, None]  # [m, A], of each draw
        done = number >= self.draws
        if self.criterion is not None:
            self.state, decided = self.criterion.update(self.state, log_p.exp())
            done |= decided
        # A draw counts if none before it ended its image.
        counts = torch.cat([torch.ones_like(done[:1]), done[:-1].cumsum(0) == 0])
        self.statistics.add(log_p, counts)
        self.rows_run += max(self.rows, active * draws)
        self.draws_counted += int(counts.sum())
        done = done.any(0)
        finished = self.statistics.select(done)
        if len(finished.index):
            self._keep(~done)
        return finished

    def _keep(self, rows) -> None:
        self.x, self.statistics = self.x[rows], self.statistics.select(rows)
        self.state = None if self.criterion is None else self.state.select(rows)

    def _draws(self) -> int:
        """Draws of each image in the next batch: what fills it, but no more than an image is known to need, or `GROWTH` times before."""
        left = self.draws - self.statistics.used
        if self.criterion is None:
            wanted = left
        else:
            wanted = torch.maximum(self.criterion.needed(self.state), ((GROWTH - 1) * self.statistics.used).ceil().long()).minimum(left)
        return max(1, min(self.rows // len(left), int(wanted.max())))

    def _refill(self) -> None:
        free = min(self.slots - len(self.statistics.index), len(self.waiting))
        if free <= 0:
            return
        arrived = [self.waiting.popleft() for _ in range(free)]
        x = torch.stack([image for _, image in arrived])
        index = torch.tensor([number for number, _ in arrived], device=self.device)
        self.x = x if self.x is None else torch.cat([self.x, x])
        self.statistics = DrawStatistics.cat([self.statistics, DrawStatistics.empty(index, self.row)])
        if self.criterion is not None:
            state = self.criterion.start(free, self.device)
            self.state = state if self.state is None else early_exit.cat([self.state, state])


def in_order(batches: Iterator[torch.Tensor], scheduler: Scheduler, backlog: int) -> Iterator[DrawStatistics]:
    """Yields one `DrawStatistics` a batch, in order, its rows in the batch's order.

    The source is asked for more only while fewer images wait than there are slots, and fewer than ``backlog`` are held: waiting, under
    way, or finished before their turn (a larger batch is taken whole). What the source raises comes out after the batches before it.
    """
    pending: deque[range] = deque()  # the images of each batch that is not yielded yet
    finished: dict[int, DrawStatistics] = {}
    failure, source_open, total, held = None, True, 0, 0
    first = 0  # the image that is not finished and has none such before it
    while source_open or pending:
        while source_open and held < backlog and len(scheduler.waiting) < scheduler.slots:
            try:
                x = next(batches)
            except StopIteration:
                source_open = False
            except Exception as error:
                failure, source_open = error, False
            else:
                scheduler.put(x, total)
                pending.append(range(total, total + len(x)))
                total, held = total + len(x), held + len(x)
                if not len(x):
                    break  # an empty batch may be answered now
        if scheduler.busy:
            done = scheduler.step()
            for row, index in enumerate(done.index.tolist()):
                finished[index] = done.select(slice(row, row + 1))
        while first in finished:
            first += 1
        while pending and pending[0].stop <= first:
            rows = [finished.pop(index) for index in pending.popleft()]
            held -= len(rows)
            yield DrawStatistics.cat([scheduler.nothing(), *rows])
    if failure is not None:
        raise failure
