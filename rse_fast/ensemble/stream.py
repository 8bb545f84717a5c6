"""Continuous batching: decided images free their slots for waiting ones, so the packed batch stays full.

An image's result depends on its own draws alone. They are judged one by one, so where it stops does not depend on how many draws a
packed batch held, nor on which images shared it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rse_fast.ensemble import early_exit
from rse_fast.ensemble.softmax import log_softmax, votes
from rse_fast.ensemble.temperature import rescale

# A round may take as many draws more as makes the draws of an image grow by this factor. The surplus of an image that is decided within
# a round is not counted; without it, the last hard images of a batch would run a row or two at a time.
GROWTH = 1.5


@dataclass
class DrawStatistics:
    """What the draws of some images add up to, one row an image.

    index int64 [A]; used int64 [A], the draws counted; sums float64 [A, K] of softmax; votes int64 [A, K] of argmax; entropies float64
    [A], the sum of the draws' entropies in nats. Of pixels: sums and votes [A, H, W, K], entropies [A, H, W].
    """

    index: torch.Tensor
    used: torch.Tensor
    sums: torch.Tensor
    votes: torch.Tensor
    entropies: torch.Tensor

    @classmethod
    def empty(cls, index: torch.Tensor, row: tuple[int, ...]) -> "DrawStatistics":
        """Of images without draws; ``row``: shape of an image's logits, the classes last."""

        def zeros(*shape, dtype):
            return torch.zeros(index.shape[0], *shape, dtype=dtype, device=index.device)

        counts, real = torch.int64, torch.float64
        return cls(index, zeros(dtype=counts), zeros(*row, dtype=real), zeros(*row, dtype=counts), zeros(*row[:-1], dtype=real))

    def add(self, log_p: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Counts draws given as float32 log-softmax [m, A, ..., K]: all of them, or those where ``counts`` (bool [m, A])."""
        p = log_p.exp()
        entropy = -(p * log_p.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
        vote = votes(log_p)
        if counts is not None:  # a draw that does not count may be NaN
            each = counts.view(*counts.shape, *[1] * (p.dim() - 2))
            p, entropy, vote = p.masked_fill(~each, 0), entropy.masked_fill(~each[..., 0], 0), vote * each
        self.used += len(log_p) if counts is None else counts.sum(0)
        self.sums += p.sum(0, dtype=torch.float64)
        self.votes += vote.sum(0)
        self.entropies += entropy.sum(0, dtype=torch.float64)

    def summary(self, temperature: float = 1.0) -> dict[str, torch.Tensor]:
        """What `Prediction` holds of them, by its names. An image, or a pixel, of NaN has label -1."""
        used = self.used.clamp_min(1)
        mean = self.sums / used.view(-1, *[1] * (self.sums.dim() - 1))
        total = -torch.special.xlogy(mean, mean).sum(-1)
        # No image may be there to tell the number of classes.
        labels = mean.argmax(-1).masked_fill(mean.isnan().any(-1), -1) if mean.shape[-1] else self.index
        probs, entropy = mean, total
        if temperature != 1:  # a softmax that is 0 in float32 counts as the least number that is not
            probs = rescale(mean.clamp_min(2.0**-149).log(), temperature).exp()
            entropy = -torch.special.xlogy(probs, probs).sum(-1)
        return {
            "labels": labels,
            "probs": probs.float().movedim(-1, 1).contiguous(),
            "entropy": entropy.float(),
            "mutual_information": (total - self.entropies / used.view(-1, *[1] * (total.dim() - 1))).clamp_min(0).float(),
            "votes": self.votes.movedim(-1, 1).contiguous(),
            "draws_used": self.used,
        }

    def select(self, rows) -> "DrawStatistics":
        """The statistics of some images: ``rows`` is an index or a mask over A, or a slice."""
        return DrawStatistics(*(t[rows] for t in vars(self).values()))

    @staticmethod
    def cat(statistics: list["DrawStatistics"]) -> "DrawStatistics":
        return DrawStatistics(*(torch.cat(ts) for ts in zip(*(vars(t).values() for t in statistics), strict=True)))


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
