"""CUDA graphs: the answers of plain launches, fresh noise at every replay, and models that cannot be captured."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_nets import NETS
from torch import nn

import rse_fast
from rse_fast import Ensemble
from rse_fast.ensemble import graphs

pytestmark = pytest.mark.gpu


@pytest.fixture
def model(rng):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return NETS["residual"]().cuda().eval()


def captured(ensemble, x):
    run = ensemble.prepared(x).run
    return len(run._graphs) if isinstance(run, graphs.Graphs) else None


@pytest.mark.parametrize("fuse", [True, False])
def test_replays_give_what_launches_give(model, fuse):
    x = torch.rand(3, 3, 10, 10, device="cuda")
    plain = Ensemble(model, 6, fuse=fuse, cuda_graphs=False)
    ensemble = Ensemble(model, 6, fuse=fuse)
    for call in range(4):  # the second call of a shape captures, later ones replay
        for image_offset in (0, 2**32 - 3):
            found, expected = ensemble.predict(x, call, image_offset), plain.predict(x, call, image_offset)
            assert torch.equal(found.probs, expected.probs) and torch.equal(found.votes, expected.votes), (call, image_offset)
    assert captured(ensemble, x) == 1 and captured(plain, x) is None


@pytest.mark.parametrize("how", ["exact", 0.9])
def test_replays_take_images_at_any_stage(model, how):
    x = torch.rand(9, 3, 10, 10, device="cuda")
    options = dict(draws=20, seed=7, early_exit=how, max_rows=16)
    found, expected = Ensemble(model, **options, cuda_graphs=True), Ensemble(model, **options, cuda_graphs=False)
    for _ in range(3):
        assert torch.equal(found.predict(x).labels, expected.predict(x).labels)
        assert torch.equal(found.predict(x).draws_used, expected.predict(x).draws_used)
    assert captured(found, x) >= 1


def test_every_replay_has_fresh_noise(model):
    ensemble = Ensemble(model, 4)
    x = torch.rand(2, 3, 10, 10, device="cuda")
    predictions = [ensemble.predict(x) for _ in range(6)]
    assert captured(ensemble, x) == 1
    assert len({p.seed for p in predictions}) == 6
    assert len({tuple(p.probs.flatten().tolist()) for p in predictions}) == 6
    again = ensemble.predict(x, predictions[0].seed)
    assert torch.equal(again.probs, predictions[0].probs)


def test_a_changed_model_is_captured_anew(model):
    ensemble = Ensemble(model, 4, seed=1)
    x = torch.rand(2, 3, 10, 10, device="cuda")
    before = [ensemble.predict(x).probs for _ in range(3)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = [ensemble.predict(x).probs for _ in range(3)]
    assert torch.equal(before[0], before[2]) and torch.equal(after[0], after[2])
    assert not torch.equal(before[0], after[0])


def test_gradients_and_large_batches_run_without(model, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_ROWS", 16)
    ensemble = Ensemble(model, 4, seed=1)
    x = torch.rand(2, 3, 10, 10, device="cuda", requires_grad=True)
    for _ in range(3):
        ensemble(x).sum().backward()
    assert captured(ensemble, x) == 0
    for _ in range(3):
        ensemble.predict(torch.rand(graphs.MOST_ROWS, 3, 10, 10, device="cuda"))
    assert captured(ensemble, x) == 0


class Synchronises(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = NETS["plain"]()

    def forward(self, x):
        return self.net(x) * (1.0 if x.sum().item() > -1e9 else 0.0)


def test_a_model_that_cannot_be_captured_says_so_and_works(rng):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = Synchronises().cuda().eval()
    x = torch.rand(2, 3, 10, 10, device="cuda")
    expected = Ensemble(model, 4, seed=3, fuse=False, cuda_graphs=False).predict(x).probs
    ensemble = Ensemble(model, 4, seed=3, fuse=False)
    with pytest.warns(RuntimeWarning, match="cannot be captured in a CUDA graph"):
        found = [ensemble.predict(x).probs for _ in range(4)]
    assert all(torch.equal(p, expected) for p in found) and captured(ensemble, x) == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device="cuda").unique().numel() == 3  # torch's own generator still works


def test_threads_on_streams_of_their_own(model):
    ensemble, alone = Ensemble(model, 5), Ensemble(model, 5, cuda_graphs=False)
    batches = [torch.rand(1 + i % 3, 3, 10, 10, device="cuda") for i in range(40)]
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            probs = ensemble.predict(batches[i], seed=i).probs
            torch.cuda.current_stream().synchronize()
            return probs

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(40)))
    for i, probs in enumerate(found):
        assert torch.equal(probs, alone.predict(batches[i], seed=i).probs), i


def test_noise_that_is_switched_off_is_noticed(model):
    ensemble = Ensemble(model, 4, seed=1)
    x = torch.rand(2, 3, 10, 10, device="cuda")
    noisy = [ensemble.predict(x).probs for _ in range(3)]
    with rse_fast.noise_off(model):
        clean = [ensemble.predict(x).probs for _ in range(3)]
    assert torch.equal(noisy[0], noisy[2]) and torch.equal(clean[0], clean[2]) and not torch.equal(noisy[0], clean[0])


def test_a_graph_of_inference_mode_is_replayed_outside(model):
    x, ensemble = torch.rand(2, 3, 10, 10, device="cuda"), Ensemble(model, 4, seed=1)
    with torch.inference_mode():
        inside = [ensemble.predict(x).probs for _ in range(3)]
    assert captured(ensemble, x) == 1 and torch.equal(ensemble.predict(x).probs, inside[0])


def test_a_failed_capture_leaves_earlier_graphs_as_they_were(model, rng):
    x, ensemble = torch.rand(2, 3, 10, 10, device="cuda"), Ensemble(model, 4, seed=1)
    before = [ensemble.predict(x).probs for _ in range(3)][0]
    numbers, graph = torch.empty(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        numbers.normal_()
    bad = Ensemble(Synchronises().cuda().eval(), 4, seed=3, fuse=False)
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        for _ in range(3):
            bad.predict(x)
    assert captured(ensemble, x) == 1 and torch.equal(ensemble.predict(x).probs, before)
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        graph.replay()
        drawn.append(numbers.clone())
    graph.replay()
    assert torch.equal(*drawn) and not torch.equal(drawn[0], numbers)  # of torch's generator, as ever


def test_hooks_are_called_and_so_nothing_is_captured(model):
    called = []
    next(iter(rse_fast.nn.noise_layers(model).values())).register_forward_hook(lambda *_: called.append(1))
    x, ensemble = torch.rand(2, 3, 10, 10, device="cuda"), Ensemble(model, 4, seed=1)
    ensemble.predict(x)
    for _ in range(3):
        before = len(called)
        ensemble.predict(x)
        assert len(called) > before
    assert captured(ensemble, x) is None


def test_a_captured_call_without_a_seed_is_refused(model):
    x, ensemble = torch.rand(2, 3, 10, 10, device="cuda"), Ensemble(model, 4)
    ensemble.predict(x)
    with pytest.raises(RuntimeError, match="same noise at every replay"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ensemble.predict(x)
