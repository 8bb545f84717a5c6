"""The defences that are trained: what each changes in a network, and its loss for a batch."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rse_fast.context import ambient
from rse_fast.convert import convert, set_sigma
from rse_fast.functional import add_noise
from rse_fast.input_noise import with_input_noise
from rse_fast.outputs import take
from rse_fast.train.config import Config


def protect(model: nn.Module, config: Config) -> nn.Module:
    """Builds the defence into a plain model, in place, and returns the model that has it.

    rse, rse+adversarial: `rse_fast.convert`. gaussian: noise on the image alone, in a module around the model (`with_input_noise`;
    Cohen, Rosenfeld & Kolter, ICML 2019). brelu: every nn.ReLU is cut off at 1 (Zantedeschi, Nicolae & Rawat, AISec 2017).
    """
    if config.defence == "gaussian":
        return with_input_noise(model, config.init_sigma)
    if config.noisy:
        return convert(model, config.init_sigma, config.inner_sigma, learnable=config.learnable_sigma or False)
    if config.defence == "brelu":
        relus = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if type(child) is nn.ReLU]
        if not relus:
            raise ValueError("model: expected nn.ReLU modules, which brelu bounds, got none")
        for parent, name in relus:
            setattr(parent, name, nn.Hardtanh(0.0, 1.0, inplace=getattr(parent, name).inplace))
    return model


def use_test_sigma(model: nn.Module, config: Config) -> None:
    """Gives a noisy model with fixed sigmas those for validation and use."""
    if config.noisy and not config.learnable_sigma:
        init, inner = config.test_init_sigma, config.test_inner_sigma
        init, inner = config.init_sigma if init is None else init, config.inner_sigma if inner is None else inner
        if config.defence == "gaussian":
            model.noise.set_sigma(init)
        else:
            set_sigma(model, init, inner)


def batch_loss(config: Config, model: nn.Module, forward, images: Tensor, labels: Tensor, teacher=None) -> tuple[Tensor, Tensor]:
    """(mean loss, accuracy in [0, 1]) of the rows that the defence trains on, made from images [B, C, H, W] and labels [B].

    ``forward`` is ``model`` in training mode, possibly wrapped for several processes; attacks use ``model``.

    adversarial: fgsm trains on clean and attacked images in equal parts, without a random start (Goodfellow et al., ICLR 2015); pgd on
    attacked images alone, from a random start (Madry et al., ICLR 2018). distillation: soft labels of ``teacher``, student and teacher at
    one temperature (Papernot et al., S&P 2016). Noisy networks: ``config.draws`` draws an image packed into the batch, the cross-entropy
    averaged over them, which bounds the ensemble's from above (Liu et al., ECCV 2018).
    """
    if config.adversarial:
        attacked = attack(model, images, labels, config)
        if config.attack == "fgsm":
            images, labels = torch.cat([images, attacked]), labels.repeat(2)
        else:
            images = attacked
    elif config.defence == "brelu":
        images = add_noise(images, config.augment_sigma, **ambient(images)._asdict())
    draws = config.draws if config.noisy else 1
    logits = take(forward(images.repeat(draws, 1, 1, 1))).float()
    labels = labels.repeat(draws)
    target = labels
    if config.defence == "distillation":
        with torch.no_grad():
            target = (take(teacher(images)).float() / config.temperature).softmax(-1)
    # Times the temperature: the gradient keeps its size, so that learning rate and weight decay mean what they mean without one.
    loss = config.temperature * F.cross_entropy(logits / config.temperature, target, label_smoothing=config.label_smoothing)
    return loss, (logits.detach().argmax(-1) == labels).float().mean()


def attack(model: nn.Module, images: Tensor, labels: Tensor, config: Config) -> Tensor:
    """The images [B, C, H, W] in [0, 1], moved within eps (L-infinity) to where the model's loss is larger.

    The loss of a noisy model is that of its ensemble, -log(mean softmax) over ``attack_draws`` packed draws, fresh at each step: its
    gradient is the expectation over transformation. The model is in eval mode meanwhile, so that BatchNorm learns nothing from the attack.

    For evaluation the project takes foolbox. Here its gradient, ``loss.backward()``, would compute and accumulate the gradients of all
    weights as well, at every step, and under DistributedDataParallel exchange them.
    """
    draws = config.attack_draws if config.noisy else 1
    low, high = (images - config.eps).clamp_min(0), (images + config.eps).clamp_max(1)
    one_step = config.attack == "fgsm"
    step = config.eps if one_step else 2.5 * config.eps / config.attack_steps
    x = images if one_step else low + (high - low) * torch.rand_like(images)
    with _as_constant(model):
        for _ in range(1 if one_step else config.attack_steps):
            x = x.detach().requires_grad_()
            log_p = take(model(x.repeat(draws, 1, 1, 1))).float().log_softmax(-1).unflatten(0, (draws, -1)).logsumexp(0)  # [B, K]
            (gradient,) = torch.autograd.grad(F.nll_loss(log_p, labels, reduction="sum"), x)
            x = torch.minimum(torch.maximum(x.detach() + step * gradient.sign(), low), high)
    return x.detach()


@contextlib.contextmanager
def _as_constant(model):
    """The model in eval mode, its parameters without gradients; what was before is restored."""
    training, parameters = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in parameters:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in parameters:
            p.requires_grad_()
        model.train(training)
