"""Cutting images x draws into packed batches: every pair once, in the order that the engine sums in, never more rows than allowed, than
memory holds, or than is fast."""

import gc
import math
import os
import weakref

import pytest
import torch

from rse_fast.ensemble import memory, plan

EDGES = [(images, draws, rows) for images in (1, 2, 7) for draws in (1, 2, 7) for rows in (1, 2, 6, 7, 8, 14, 1000)]


@pytest.fixture
def cases(rng):
    """(images, draws, rows)"""
    return EDGES + rng.integers(1, (60, 60, 200), (300, 3)).tolist()


def length(s):
    return s.stop - s.start


def test_chunks_cover_each_draw_of_each_image_once_within_the_rows(cases):
    for images, draws, rows in cases:
        pieces = list(plan.chunks(images, draws, rows))
        pairs = [(i, d) for image, draw in pieces for i in range(images)[image] for d in range(draws)[draw]]
        assert sorted(pairs) == [(i, d) for i in range(images) for d in range(draws)], (images, draws, rows)
        assert all(1 <= length(image) * length(draw) <= rows for image, draw in pieces), (images, draws, rows)


def test_chunks_go_image_by_image_and_keep_the_draws_together(cases):
    for images, draws, rows in cases:
        pieces = list(plan.chunks(images, draws, rows))
        starts = [(image.start, draw.start) for image, draw in pieces]
        assert starts == sorted(starts)
        if rows >= draws:
            assert all(draw == slice(0, draws) for _, draw in pieces)
        else:
            assert all(length(image) == 1 for image, _ in pieces)
        for sizes in ({length(image) for image, _ in pieces}, {length(draw) for _, draw in pieces}):
            assert max(sizes) - min(sizes) <= 1, (images, draws, rows)
        # As few pieces as the rows allow: in each direction, one piece fewer would not hold everything.
        assert len({image.start for image, _ in pieces}) == -(-images // max(1, rows // draws))
        assert len({draw.start for _, draw in pieces}) == -(-draws // rows)


def test_no_images_no_chunks():
    assert list(plan.chunks(0, 10, 80)) == []


# ---------------------------------------------------------------------------------------------------------------------- planner
CPU = torch.device("cpu")


def covered(pieces):
    return [(i, d) for image, draw, _ in pieces for d in range(draw.start, draw.stop) for i in range(image.start, image.stop)]


def complete(images, draws):
    return [(i, d) for i in range(images) for d in range(draws)]


class Memory:
    """A step that runs out of memory beyond so many rows; ``tried`` are the rows of every attempt."""

    def __init__(self, rows, error=torch.OutOfMemoryError):
        self.rows, self.error, self.tried = rows, error, []

    def __call__(self, image, draw):
        self.tried.append(length(image) * length(draw))
        if self.tried[-1] > self.rows:
            raise self.error("no room")
        return self.tried[-1]


def test_when_memory_runs_out_nothing_is_lost_and_it_is_remembered(cases):
    for images, draws, rows in cases[::7]:
        planner, attempts = plan.Planner(CPU), Memory(max(1, rows // 3))
        pieces = list(planner.run(images, draws, attempts, fixed=rows))
        assert sorted(covered(pieces)) == complete(images, draws), (images, draws, rows)
        draws_of_0 = [d for image, draw, _ in pieces if image.start == 0 for d in range(draw.start, draw.stop)]
        assert draws_of_0 == list(range(draws))  # in order: sums of a prefix are those of fewer draws
        failures = sum(n > attempts.rows for n in attempts.tried)
        assert failures <= max(1, rows).bit_length()
        attempts.tried.clear()
        assert sorted(covered(planner.run(images, draws, attempts, fixed=rows))) == complete(images, draws)
        assert not any(n > attempts.rows for n in attempts.tried), "the second call knows"


@pytest.mark.parametrize("error", [MemoryError, lambda text: RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {text}")])
def test_the_cpu_runs_out_of_memory_in_its_own_words(error):
    assert sorted(covered(plan.Planner(CPU).run(5, 4, Memory(3, error), fixed=20))) == complete(5, 4)


def test_an_error_that_is_no_lack_of_memory_comes_out_at_once():
    attempts = Memory(3, lambda text: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(plan.Planner(CPU).run(5, 4, attempts, fixed=20))
    assert attempts.tried == [20]


def test_a_single_row_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        list(plan.Planner(CPU).run(2, 3, Memory(0), fixed=6))


def test_rows_follow_free_memory_and_what_the_user_wants():
    free = memory.free_memory(CPU)
    assert 0 < free < 2**50
    assert plan.Planner(CPU, row_bytes=1).rows() == plan.Planner(CPU).rows() == plan.SWEET_SPOT["cpu"]
    assert plan.Planner(CPU, row_bytes=free * plan.MEMORY_SHARE / 10.5).rows() in range(7, 14)  # free memory changes meanwhile
    assert plan.Planner(CPU, row_bytes=1, in_bytes=True).rows() == 2 * plan.SWEET_SPOT["cpu"]
    assert type(plan.Planner(CPU, row_bytes=free * plan.MEMORY_SHARE / 10.5).rows()) is int  # a number of rows to cut by
    assert plan.Planner(CPU, row_bytes=1, gradient_bytes=free * plan.MEMORY_SHARE / 10.5).rows(gradient=True) in range(7, 14)
    assert plan.Planner(CPU, row_bytes=100 * free).rows() == 1
    assert plan.Planner(CPU, row_bytes=100 * free).rows(fixed=30) == 30


def test_a_limit_of_the_address_space_counts():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, before[1]))
        assert memory.free_memory(CPU) <= 2**28
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


GROUPS = {
    "version 2, the tightest counts": (
        {"/proc/self/cgroup": "0::/user/job\n", "/sys/fs/cgroup/user/job/memory.max": "max\n"}
        | {f"/sys/fs/cgroup/user/memory.{name}": text for name, text in [("max", "5000\n"), ("current", "4000\n"), ("stat", "file 9\n")]}
        | {f"/sys/fs/cgroup/memory.{name}": text for name, text in [("max", "9000\n"), ("current", "4000\n")]},
        1000,
    ),
    "a container's own root, full of cached files": (
        {"/proc/self/cgroup": "0::/../elsewhere\n"}
        | {"/sys/fs/cgroup/memory.max": "5000", "/sys/fs/cgroup/memory.current": "4990"}
        | {"/sys/fs/cgroup/memory.stat": "anon 1000\nfile 3990\ninactive_file 3500\nactive_file 490\n"},
        3510,
    ),
    "version 1": (
        {"/proc/self/cgroup": "5:devices:/x\n4:cpu,memory:/docker/0a1b\n0::/\n"}
        | {"/sys/fs/cgroup/memory/memory.limit_in_bytes": "5000", "/sys/fs/cgroup/memory/memory.usage_in_bytes": "4990"}
        | {"/sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n"},
        510,
    ),
    "version 1 without a limit": (
        {"/proc/self/cgroup": "4:memory:/\n"}
        | {"/sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096), "/sys/fs/cgroup/memory/memory.usage_in_bytes": "4990"},
        math.inf,
    ),
    "beyond its limit": ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "5", "/sys/fs/cgroup/memory.current": "7"}, 0),
    "no control groups": ({}, math.inf),
}


@pytest.mark.parametrize(("files", "left"), GROUPS.values(), ids=GROUPS)
def test_a_limit_of_a_control_group_counts(files, left, monkeypatch):
    monkeypatch.setattr(memory, "_read", lambda path: files.get(os.path.normpath(path), ""))
    memory._limited_groups.cache_clear()
    try:
        assert memory.free_memory(CPU) == left
    finally:
        memory._limited_groups.cache_clear()


@pytest.mark.parametrize(("in_bytes", "general"), [(False, 80), (True, 160)])
@pytest.mark.parametrize("best", [20, 320, 80, 160, None])
def test_the_first_large_call_measures_and_every_row_it_runs_counts(best, in_bytes, general):
    planner, clock, draws, images = plan.Planner(CPU, in_bytes=in_bytes), [0.0], 10, 2000
    chosen = best or general

    def step(image, draw):
        rows = length(image) * length(draw)
        clock[0] += rows * (0.5 if rows == best else 1.0 if best else 1.0 - rows * 5e-5)  # without a best, no size is clearly better
        return rows

    planner._clock = lambda: clock[0]
    with torch.no_grad():
        small = list(planner.run(20, draws, step))
        assert not planner.measured and {rows for *_, rows in small} <= ({100} if in_bytes else {70, 60, 80})
        pieces = list(planner.run(images, draws, step))
        assert sorted(covered(pieces)) == complete(images, draws)
        assert planner.rows() == chosen
        assert max(rows for *_, rows in planner.run(images, draws, step)) == chosen


def test_no_measuring_while_gradients_are_kept_or_rows_are_given():
    for fixed, grad in ((None, True), (40, False)):
        planner = plan.Planner(CPU)
        with torch.set_grad_enabled(grad):
            list(planner.run(5000, 10, lambda image, draw: None, fixed))
        assert not planner.measured


def test_planners_are_shared_by_key_and_let_models_go():
    model = torch.nn.Linear(2, 2)
    one = plan.planner(model, ((3, 8, 8), torch.float32), CPU, 10)
    assert plan.planner(model, ((3, 8, 8), torch.float32), CPU, 20) is one
    assert plan.planner(model, ((3, 9, 9), torch.float32), CPU, 20) is not one
    assert plan.planner(torch.nn.Linear(2, 2), ((3, 8, 8), torch.float32), CPU, 20) is not one
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_bytes_counts_what_is_alive_at_once(device):
    with torch.no_grad(), memory.PeakBytes() as counted:
        a = torch.zeros(1000, device=device)
        b = a + 1
        assert counted.peak == 8000
        b += 1
        b = b.view(10, 100) + 1  # the old b goes only then
        del a
        c = b * 2
        assert counted.alive == 8000
    assert counted.peak == 12000
    del b, c


def test_shards_are_a_partition_in_order():
    for images in (0, 1, 7, 64):
        for world in (1, 2, 3, 8):
            parts = [plan.shard(images, rank, world) for rank in range(world)]
            assert [i for part in parts for i in range(part.start, part.stop)] == list(range(images))
            assert max(map(length, parts)) - min(map(length, parts)) <= 1
    for bad in ((-1, 0, 1), (5, 2, 2), (5, -1, 2), (5, 0, 0)):
        with pytest.raises(ValueError, match="images" if bad[0] < 0 else "rank"):
            plan.shard(*bad)
    for name, bad in (("images", (5.0, 0, 1)), ("rank", (5, 0.5, 2)), ("world_size", (5, 0, "2"))):
        with pytest.raises(TypeError, match=f"^{name} must be an integer"):
            plan.shard(*bad)
