"""torch.func, forward mode and checkpointing on noisy layers, converted models and ensembles: their derivatives are the eager ones."""

import pytest
import torch
from small_nets import NETS
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils.checkpoint import checkpoint

import rse_fast
from rse_fast import Ensemble, functional
from rse_fast.nn import GaussianNoise, NoisyConv2d, NoisyLinear

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "conv": (lambda: NoisyConv2d(3, 4, 3, padding=1, sigma=torch.tensor([0.1, 0.2, 0.3])), (2, 3, 5, 5)),
    "same": (lambda: NoisyConv2d(3, 4, 2, padding="same"), (2, 3, 5, 5)),
    "linear": (lambda: NoisyLinear(3, 4), (2, 5, 3)),
    "noise": (lambda: GaussianNoise(0.3), (2, 3, 5)),
    "subclass": (lambda: rse_fast.convert(nn.Sequential(Widened(3, 4, 3))), (2, 3, 5, 5)),
    "learnable": (lambda: rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), learnable=True), (2, 3, 5, 5)),
    "model": (lambda: NETS["residual"](), (2, 3, 10, 10)),
}


class Widened(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 2, 0, 1)))


def seeded(function, seed=7):
    """``function`` with torch's generator begun at ``seed``, so that each call has the same ambient noise."""

    def run(*args):
        torch.manual_seed(seed)
        return function(*args)

    return run


@pytest.fixture(params=list(LAYERS))
def layer(request, rng):
    """(a layer or model in float64, an input)."""
    make, shape = LAYERS[request.param]
    return make().double().eval(), torch.randn(shape, dtype=torch.float64)


def close(a, b):
    """Equal but for the order of float64 sums."""
    return (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max().item())


def parameters(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def test_grad_vjp_and_jacrev_are_autograds(layer):
    module, x = layer
    run, start = seeded(module), x.clone().requires_grad_()
    y = run(start)
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, start, g, retain_graph=True)
    found, pull = vjp(run, x)
    assert torch.equal(found, y) and close(pull(g)[0], expected)
    assert close(grad(lambda x: (run(x) * g).sum())(x), expected)
    assert close((jacrev(run)(x) * g[(..., *[None] * x.dim())]).sum(tuple(range(g.dim()))), expected)


def test_the_gradient_of_parameters_is_autograds(layer):
    module, x = layer
    values = parameters(module)
    if not values:
        pytest.skip("this layer has no parameters")
    loss = seeded(lambda values: functional_call(module, values, (x,)).square().sum())
    found = grad(loss)(values)
    torch.manual_seed(7)
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    assert all(close(found[name], e) for name, e in zip(values, expected, strict=True))


def test_forward_mode_is_the_transpose_of_reverse_mode(layer):
    module, x = layer
    run, t = seeded(module), torch.randn_like(x)
    y, tangent = jvp(run, (x,), (t,))
    g = torch.randn_like(y)
    assert torch.equal(y, run(x))
    pulled = vjp(run, x)[1](g)[0]
    assert close((tangent * g).sum(), (pulled * t).sum())
    assert close(jacfwd(run, randomness="same")(x), jacrev(run)(x))
    with forward_ad.dual_level():
        assert torch.equal(forward_ad.unpack_dual(run(forward_ad.make_dual(x, t))).tangent, tangent)


def test_forward_mode_of_sigma_scale_and_shift(rng):
    x, sigma, scale, shift = (torch.rand(shape, dtype=torch.float64) for shape in ((2, 3, 4), (3,), (3,), (3,)))

    def run(x, sigma, scale, shift):
        return functional.add_noise(x, sigma, seed=5, images=2, draws=3, scale=scale, shift=shift - 0.5, act="relu")

    inputs = x, sigma, scale, shift
    tangents = tuple(map(torch.randn_like, inputs))
    y, tangent = jvp(run, inputs, tangents)
    g = torch.randn_like(y)
    pulled = vjp(run, *inputs)[1](g)
    assert close((tangent * g).sum(), sum((a * b).sum() for a, b in zip(pulled, tangents, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_mode_of_the_kernels_path(dtype, rng):
    layer, x, t = NoisyConv2d(3, 4, 3, dtype=dtype), torch.randn(2, 3, 6, 6, dtype=dtype), torch.randn(2, 3, 6, 6, dtype=dtype)
    _, tangent = jvp(layer, (x,), (t,))
    assert torch.equal(tangent, nn.functional.conv2d(t, layer.weight, None))  # noise is added: it has no part in the derivative


def test_vmap_over_inputs_gives_each_its_own_noise_or_all_the_same(layer):
    module, x = layer
    xs = torch.stack([x, x])
    same = vmap(seeded(module), randomness="same")(xs)
    assert close(same[0], seeded(module)(x)) and torch.equal(same[0], same[1])
    different = vmap(module, randomness="different")(xs)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(module)(xs)


def test_gradients_of_single_images(layer):
    module, x = layer
    values = parameters(module)
    if not values:
        pytest.skip("this layer has no parameters")
    xs = torch.stack([x, 2 * x, -x])

    def loss(values, x):
        return functional_call(module, values, (x,)).square().sum()

    found = vmap(grad(seeded(loss)), in_dims=(None, 0), randomness="same")(values, xs)
    for i, one in enumerate(xs):
        expected = grad(seeded(loss))(values, one)
        assert all(close(found[name][i], expected[name]) for name in values)
    fresh = vmap(grad(loss), in_dims=(None, 0), randomness="different")(values, torch.stack([x, x]))
    assert not any(torch.equal(both[0], both[1]) for both in fresh.values())


def test_explicit_seeds_under_vmap_are_each_entrys_own(rng):
    x, seeds = torch.randn(3, 2, 3, 5), torch.tensor([4, -1, 2**62])
    found = vmap(lambda x, seed: functional.add_noise(x, 0.1, seed=seed, draws=2))(x, seeds)
    assert torch.equal(found, torch.stack([functional.add_noise(one, 0.1, seed=s, draws=2) for one, s in zip(x, seeds, strict=True)]))


def test_stacked_models(rng):
    models = [rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), sigma, 0.1) for sigma in (0.1, 0.5)]
    x, (values, buffers) = torch.randn(2, 3, 5, 5), stack_module_state(models)
    run = seeded(lambda values, buffers: functional_call(models[0], (values, buffers), (x,)))
    found = vmap(run, randomness="same")(values, buffers)
    for i, model in enumerate(models):
        torch.testing.assert_close(found[i], seeded(model)(x))


# ------------------------------------------------------------------------------------------------------------------------ ensembles
@pytest.fixture(params=[True, False], ids=["fused", "live"])
def ensemble(request, rng):
    model = NETS["residual"]()
    return Ensemble(model, 3, seed=11, dtype="float32", fuse=request.param)


def near(a, b):
    """Equal but for float32 roundings of two orders of summation."""
    return (a - b).norm() <= 2.0**-14 * b.norm()


def test_transforms_of_an_ensemble(ensemble):
    x, t = torch.rand(2, 3, 10, 10), torch.randn(2, 3, 10, 10)
    start = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ensemble(start).square().sum(), start)
    assert near(grad(lambda x: ensemble(x).square().sum())(x), expected)
    y, tangent = jvp(ensemble, (x,), (t,))
    assert near(y, ensemble(x).detach())
    g = torch.randn_like(y)
    assert torch.isclose((tangent * g).sum(), (vjp(ensemble, x)[1](g)[0] * t).sum(), rtol=1e-3, atol=1e-5)
    xs = torch.rand(3, 2, 3, 10, 10)
    assert near(vmap(ensemble)(xs), torch.stack([ensemble(x) for x in xs]).detach())
    assert near(jacfwd(ensemble)(x[:1, :, :4, :4].repeat(1, 1, 2, 2)), jacrev(ensemble)(x[:1, :, :4, :4].repeat(1, 1, 2, 2)))


@pytest.mark.parametrize("fuse", [True, False])
def test_entries_of_a_vmap_have_noise_of_their_own(fuse, rng):
    """As the randomness of the vmap says, also for an ensemble without a seed, whose noise is not torch's."""
    ensemble, x = Ensemble(NETS["residual"](), 3, dtype="float32", fuse=fuse), torch.rand(3, 10, 10).expand(4, 3, 10, 10)
    for run in (lambda x: ensemble(x[None])[0], grad(lambda x: ensemble(x[None])[0, 0])):
        different, same = (vmap(run, randomness=randomness)(x) for randomness in ("different", "same"))
        assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
        assert all(torch.equal(row, same[0]) for row in same)
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(run)(x)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_jacobian_of_an_ensemble_by_batched_gradients(algorithm, rng):
    ensemble, x = Ensemble(NETS["residual"](), 3, seed=11, dtype="float32", algorithm=algorithm), torch.rand(2, 3, 10, 10)
    expected = torch.autograd.functional.jacobian(ensemble, x)
    assert expected.any() and near(torch.autograd.functional.jacobian(ensemble, x, vectorize=True), expected)


def test_predict_is_refused_inside_a_transform(ensemble):
    xs = torch.rand(2, 2, 3, 10, 10)
    for run in (lambda: vmap(lambda x: ensemble.predict(x).probs)(xs), lambda: grad(lambda x: ensemble.predict(x).probs.sum())(xs[0])):
        with pytest.raises(ValueError, match="x must not be inside a transform of torch.func .* predict the whole batch"):
            run()


def test_parameters_of_an_ensemble_have_a_gradient(ensemble):
    x = torch.rand(2, 3, 10, 10)
    torch.manual_seed(0)
    ensemble(x).square().sum().backward()
    found = [p.grad for p in ensemble.parameters()]
    live = Ensemble(ensemble.model, 3, seed=11, dtype="float32", fuse=False)
    expected = torch.autograd.grad(live(x).square().sum(), list(live.parameters()))
    assert all(near(a, b) or b.abs().max() < 1e-7 for a, b in zip(found, expected, strict=True)) and any(g.any() for g in found)
    values = {name: p.detach() for name, p in ensemble.named_parameters()}
    by_call = grad(lambda values: functional_call(ensemble, values, (x,)).square().sum())(values)
    assert all(near(by_call[n], b) or b.abs().max() < 1e-7 for n, b in zip(values, expected, strict=True))


def test_the_gradient_of_images_alone_does_not_run_the_model_again(rng):
    calls = []

    class Counted(nn.Module):
        def forward(self, x):
            calls.append(0)
            return 1 * x

    model = nn.Sequential(NETS["plain"](), Counted()).eval()
    ensemble, x = Ensemble(model, 3, seed=1, dtype="float32"), torch.rand(2, 3, 10, 10, requires_grad=True)
    y = ensemble(x)
    calls.clear()
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert not calls
    torch.autograd.grad(y.sum(), list(ensemble.parameters()))
    assert calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_an_ensemble_at_its_first_call(ensemble, reentrant):
    x = torch.rand(2, 3, 10, 10, requires_grad=True)
    checkpoint(ensemble, x, use_reentrant=reentrant).square().sum().backward()
    start = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(ensemble(start).square().sum(), start)
    assert near(x.grad, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_fresh_noise_is_refused(reentrant, rng):
    ensemble, x = Ensemble(NETS["plain"](), 3, dtype="float32"), torch.rand(2, 3, 10, 10, requires_grad=True)
    with pytest.raises(ValueError, match="^seed must be a number within torch.utils.checkpoint, got None: .*Ensemble\\(seed="):
        checkpoint(ensemble, x, use_reentrant=reentrant)
    assert ensemble(x).shape == (2, 5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_layers_replays_their_noise(layer, reentrant):
    module, x = layer
    start = x.clone().requires_grad_()
    expected = torch.autograd.grad(seeded(module)(start).square().sum(), [start, *module.parameters()])
    torch.manual_seed(7)
    checkpoint(module, start, use_reentrant=reentrant).square().sum().backward()
    found = [start.grad, *(p.grad for p in module.parameters())]
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------- what would be wrong without a word
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_sigma_of_another_dtype_is_the_same_noise(dtype, channels, rng):
    layer, x = GaussianNoise(torch.full(channels, 0.5)), torch.randn(2, 3, 8, 8)
    expected = seeded(layer)(x)
    layer.sigma = layer.sigma.to(dtype)
    assert torch.equal(seeded(layer)(x), expected)


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
def test_an_optimisers_step_is_noticed(how, rng):
    model, x = NETS["plain"](), torch.rand(2, 3, 10, 10)
    ensemble = Ensemble(model, 3, seed=1, dtype="float32")
    before = ensemble.predict(x).probs
    optimiser = torch.optim.Adam(model.parameters(), 0.1, **how)
    model(x).square().sum().backward()
    optimiser.step()
    after = ensemble.predict(x).probs
    assert not torch.equal(after, before)
    assert torch.equal(after, Ensemble(model, 3, seed=1, dtype="float32").predict(x).probs)


CHANGES = {
    "sigma": lambda model: rse_fast.set_sigma(model, 0.7, 0.7),
    "buffer": lambda model: next(model.buffers()).add_(1),
    "data": lambda model: setattr(next(model.parameters()), "data", next(model.parameters()).data + 1),
    "hook": lambda model: model.register_forward_hook(lambda *_: None),
    "switch": lambda model: setattr(next(iter(rse_fast.nn.noise_layers(model).values())), "noise_enabled", False),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_model_that_changes_before_backward_gives_no_wrong_gradient(name, rng):
    model, x = NETS["plain"](), torch.rand(2, 3, 10, 10)
    y = Ensemble(model, 3, seed=1, dtype="float32")(x).square().sum()
    CHANGES[name](model)
    with pytest.raises(RuntimeError, match="the model must be the same in backward"):
        y.backward()


def test_parameters_put_in_place_for_one_call_have_their_gradient(ensemble):
    x, values = torch.rand(2, 3, 10, 10), {n: (p.detach() * 1.1).requires_grad_() for n, p in ensemble.named_parameters()}
    functional_call(ensemble, values, (x,)).square().sum().backward()
    expected = grad(lambda values: functional_call(ensemble, values, (x,)).square().sum())({n: p.detach() for n, p in values.items()})
    assert all(near(values[n].grad, g) or g.abs().max() < 1e-7 for n, g in expected.items())


def test_a_gradient_penalty_is_refused_by_a_snapshot_and_right_for_the_model(ensemble):
    x = torch.rand(2, 3, 10, 10, requires_grad=True)
    (g,) = torch.autograd.grad(ensemble(x).square().sum(), x, create_graph=True)
    if ensemble.fuse:
        torch.autograd.grad(g.square().sum(), x, retain_graph=True)  # by the images alone: it is there
        with pytest.raises(RuntimeError, match="no second derivative.*fuse=False"):
            g.square().sum().backward()
    else:
        g.square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in ensemble.parameters())


def test_a_function_of_vjp_may_run_after_its_transform(rng):
    layer = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), learnable=True).double()
    x, values = torch.randn(2, 3, 5, 5, dtype=torch.float64), parameters(layer)
    y, pull = vjp(seeded(lambda values: functional_call(layer, values, (x,))), values)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(seeded(layer)(x), list(layer.parameters()), g)
    assert all(close(pull(g)[0][n], e) for n, e in zip(values, expected, strict=True))


def test_forward_mode_of_packed_draws(rng):
    for make in (lambda x: functional.add_noise(x, 0.1, seed=1, draws=2, channel_dim=-1), lambda x: functional.noisy_linear(
        x, torch.ones(2, 4), None, 0.1, seed=1, draws=2
    )):  # fmt: skip
        x, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        _, tangent = jvp(make, (x,), (t,))
        assert torch.allclose(tangent, make(x + t) - make(x), atol=1e-5)


@pytest.mark.parametrize("side", [8, 24])  # noise stored, and made again in backward
def test_gradients_of_a_batch_of_gradients(side, rng):
    """As `torch.autograd.functional.jacobian(vectorize=True)` takes them."""
    layer = rse_fast.convert(nn.Sequential(nn.Conv2d(8, 4, 3, padding=1)), 0.2, learnable="channel" if side == 24 else True)
    x = torch.rand(2, 8, side, side, requires_grad=True)
    y, inputs = layer(x), (x, *layer.parameters())
    batch = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, inputs, batch, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(y, inputs, g, retain_graph=True) for g in batch]
    for got, *one_by_one in zip(found, *apart, strict=True):
        want = torch.stack(one_by_one)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_functionalize_gives_the_same_noise_and_gradients(rng):
    layer = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), 0.2, learnable=True)
    x, seed = torch.rand(2, 3, 8, 8, requires_grad=True), int(rng.integers(2**63))
    found = []
    for function in (layer, torch.func.functionalize(layer)):
        torch.manual_seed(seed)
        y = function(x)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))])
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
