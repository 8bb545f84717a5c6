"""Early exit and continuous batching of the Ensemble: what an image gets does not depend on its company."""

import threading
import weakref

import pytest
import torch
from torch import nn

import rse_fast
from rse_fast.ensemble import early_exit
from rse_fast.ensemble.stream import GROWTH, Scheduler, in_order

CLASSES = 5


def network(seed: int = 0) -> nn.Module:
    """A small noisy network whose draws disagree on some images and agree on others."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(8, CLASSES)).eval()
    with torch.no_grad():
        model[-1].weight.mul_(40)
        model[-1].bias.sub_(model(torch.rand(64, 3, 8, 8)).mean(0))  # every class wins somewhere
        model[-1].weight.mul_(4)
        model[-1].bias.mul_(4)
    return rse_fast.convert(model, 0.3, 0.2)


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8) * torch.rand(n, 1, 1, 1)


def same(a, b, rows=slice(None)) -> bool:
    """Whether prediction ``a`` is rows of ``b``; probabilities to the rounding of another packed batch."""
    close = torch.allclose(a.probs, b.probs[rows], rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    return close and all(torch.equal(getattr(a, k), getattr(b, k)[rows]) for k in ("labels", "votes", "draws_used"))


@pytest.mark.parametrize("draws", [1, 2, 7, 20])
def test_exact_early_exit_has_the_label_of_all_draws_and_saves_some(draws):
    model, x = network(), images(40)
    for seed in range(2):
        full = rse_fast.Ensemble(model, draws, seed=seed, dtype="float32").predict(x)
        early = rse_fast.Ensemble(model, draws, seed=seed, dtype="float32", early_exit="exact").predict(x)
        assert torch.equal(early.labels, full.labels)
        assert (early.draws_used <= draws).all() and (early.draws_used > draws // 2).all()
        assert draws < 7 or early.draws_used.float().mean() < 0.95 * draws
        assert torch.equal(early.votes.sum(1), early.draws_used)


@pytest.mark.parametrize("how", ["exact", 0.99])
def test_an_early_exit_is_the_prefix_of_all_draws(how):
    model, x = network(1), images(12)
    early = rse_fast.Ensemble(model, 40, seed=9, dtype="float32", early_exit=how).predict(x)
    assert early.draws_used.unique().numel() > 1
    for i, used in enumerate(early.draws_used.tolist()):
        prefix = rse_fast.Ensemble(model, used, seed=9, dtype="float32").predict(x[i : i + 1], image_offset=i)
        assert same(prefix, early, slice(i, i + 1)), f"image {i} after {used} draws"


@pytest.mark.parametrize("how", [None, "exact", 0.99])
@pytest.mark.parametrize("rows", [3, 50])
def test_results_do_not_depend_on_chunks_batches_or_company(how, rows):
    model, x = network(2), images(17)
    want = rse_fast.Ensemble(model, 15, seed=3, dtype="float32", early_exit=how).predict(x)
    ensemble = rse_fast.Ensemble(model, 15, seed=3, dtype="float32", early_exit=how, max_rows=rows)
    assert same(ensemble.predict(x), want)
    assert same(ensemble.predict(x[9:], image_offset=9), want, slice(9, None))
    cuts = [0, 5, 5, 6, 14, 17]
    parts = list(ensemble.stream(x[a:b] for a, b in zip(cuts, cuts[1:], strict=False)))
    assert len(parts) == 5
    for part, a, b in zip(parts, cuts, cuts[1:], strict=False):
        assert same(part, want, slice(a, b)), f"images {a}..{b}"


def test_a_long_stream_keeps_the_packed_batch_full():
    ensemble = rse_fast.Ensemble(network(), 20, dtype="float32", early_exit="exact", max_rows=16)
    stream = ensemble.stream(images(10) for _ in range(20))
    assert sum(len(p.labels) for p in stream) == 200
    assert 0.95 <= stream.occupancy <= 1


def test_a_stream_holds_few_images_and_asks_for_more_only_then():
    taken = []

    def source():
        for _ in range(1000):
            batch = images(4)
            taken.append(weakref.ref(batch))
            yield batch

    ensemble = rse_fast.Ensemble(network(), 10, dtype="float32", early_exit="exact", max_rows=8)
    stream = ensemble.stream(source())
    for yielded in range(1, 20):
        next(stream)
        assert 4 * (len(taken) - yielded) <= stream.BACKLOG * 8 + 4
        # It asks while fewer than 8 images wait, so at most 11 do, of four batches. Of the others it holds results alone.
        assert sum(batch() is not None for batch in taken) <= 4 + 1  # the source holds its last one
    stream.close()
    assert next(stream, None) is None
    assert len(taken) < 40


def test_what_the_source_raises_comes_after_the_batches_before_it():
    def source():
        yield images(3)
        yield images(2)
        raise OSError("disk gone")

    stream = rse_fast.Ensemble(network(), 6, early_exit="exact").stream(source())
    assert [len(next(stream).labels) for _ in range(2)] == [3, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(stream)


def test_streams_of_nothing_and_of_empty_batches():
    ensemble = rse_fast.Ensemble(network(), 6, early_exit="exact")
    assert list(ensemble.stream([])) == []
    sizes = [len(p.labels) for p in ensemble.stream([images(0), images(2), images(0)])]
    assert sizes == [0, 2, 0]
    with pytest.raises(TypeError, match="^batch must be a tensor.*, got NoneType"):  # not an end
        list(ensemble.stream([None, images(2)]))


def test_images_without_pixels_are_refused():
    ensemble = rse_fast.Ensemble(network(), 2)
    for run in (ensemble, ensemble.predict, ensemble.rows, lambda x: list(ensemble.stream([x]))):
        with pytest.raises(ValueError, match=r"must be a batch .* that have pixels, got shape \(2, 3, 0, 10\)"):
            run(torch.zeros(2, 3, 0, 10))


def test_a_stream_says_which_seed_it_used():
    model, x = network(), images(6)
    stream = rse_fast.Ensemble(model, 8, dtype="float32").stream([x])
    (prediction,) = stream
    assert prediction.seed == stream.seed
    assert same(rse_fast.Ensemble(model, 8, dtype="float32").predict(x, seed=stream.seed), prediction)


def test_stream_leaves_the_callers_grad_mode_alone():
    stream = rse_fast.Ensemble(network(), 4).stream([images(2), images(2)])
    for _ in stream:
        assert torch.is_grad_enabled()


def test_one_ensemble_streams_in_eight_threads_as_alone():
    model = network()
    ensemble = rse_fast.Ensemble(model, 12, dtype="float32", early_exit="exact")
    batches = [images(9) for _ in range(8)]
    want = [ensemble.predict(x, seed=i) for i, x in enumerate(batches)]
    got = [None] * 8

    def work(i):
        got[i] = ensemble.predict(batches[i], seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(g is not None and same(g, w) for g, w in zip(got, want, strict=True))


def test_pool_serves_adversarial_draws_exactly():
    """No network: logits made so that the runner-up takes every draw that is left at the moment an image leaves too early."""
    draws, classes = 9, 3
    table = torch.randn(50, draws, classes) * 30  # near-certain draws, random winners
    calls = []

    def run(x, sample_ids, m):
        calls.append(len(x) * m)
        index, first = sample_ids.unbind(1)
        return torch.stack([table[index, (first + d).clamp_max(draws - 1)] for d in range(m)])

    criterion = early_exit.make("exact", draws, classes)
    pool = Scheduler(run, (classes,), draws, 8, criterion, torch.device("cpu"))
    results = list(in_order(iter([torch.zeros(20, 1), torch.zeros(30, 1)]), pool, 24))
    labels = torch.cat([t.sums.argmax(1) for t in results])
    assert torch.equal(torch.cat([t.index for t in results]), torch.arange(50))
    assert torch.equal(labels, table.softmax(-1).double().sum(1).argmax(1))
    assert max(calls) <= 8


@pytest.mark.parametrize("how", ["exact", 0.999])
def test_rounds_of_the_last_images_grow(how):
    # Two classes with draws that alternate are never decided: without growth, a single image would run a draw or two at a time to the end.
    draws, sizes = 1000, []

    def run(x, sample_ids, m):
        sizes.append(m)
        number = sample_ids[:, 1] + torch.arange(m)[:, None]
        return torch.where((number % 2 == 0)[..., None], torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]))

    pool = Scheduler(run, (2,), draws, 400, early_exit.make(how, draws, 2), torch.device("cpu"))
    pool.put(torch.zeros(1, 1), 0)
    while pool.busy:
        finished = pool.step()
    assert finished.used.tolist() == [draws] and sum(sizes) >= draws
    assert len(sizes) <= 14 and all(b <= max(GROWTH * sum(sizes[:i]), 600) for i, b in enumerate(sizes[1:], 1))


@pytest.mark.parametrize("bad", ["sure", 0.3, 1.0, 2, float("nan")])
def test_unknown_early_exit_is_an_error(bad):
    with pytest.raises(ValueError, match="early_exit must be"):
        rse_fast.Ensemble(network(), 4, early_exit=bad)


def test_what_is_no_stream_of_images_is_refused():
    ensemble = rse_fast.Ensemble(network(), 4, seed=1)
    for batches in (images(3), 3):
        with pytest.raises(TypeError, match="batches must be an iterable of tensors"):
            ensemble.stream(batches)
    with pytest.raises(ValueError, match=r"one shape, got \(3, 9, 9\) after \(3, 8, 8\)"):
        list(ensemble.stream([images(2), torch.rand(2, 3, 9, 9)]))


def test_a_stream_with_a_fixed_seed_warns_once_a_process(run_python):
    code = (
        "import warnings, torch, rse_fast\nfrom torch import nn\n"
        "model = rse_fast.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval())\n"
        "x = [torch.rand(2, 1, 4, 4)]\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    list(rse_fast.Ensemble(model, 2).stream(x))\n"
        "    rse_fast.Ensemble(model, 2, seed=1).predict(x[0])\n"
        "    print(len(seen))\n"
        "    for _ in range(2):\n"
        "        list(rse_fast.Ensemble(model, 2, seed=1).stream(x))\n"
        "print(len(seen), seen[0].message, seen[0].filename)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    none, one = done.stdout.strip().splitlines()
    assert none == "0" and one.startswith("1 rse-fast: this stream is of an ensemble with a fixed seed") and one.endswith("<string>")
