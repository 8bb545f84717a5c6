"""Noise on the image alone: what certificates are trained with (Cohen, Rosenfeld, Kolter, ICML 2019)."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Proxy

from rse_fast.nn import GaussianNoise

__all__ = ["with_input_noise"]


class Normalize(nn.Module):
    """``(x - mean) / std`` for images [N, C, H, W]; mean and std float32 [C, 1, 1], in the state dict."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torch would make a picture of three channels of a grey one. A tracer knows no shape; what runs its graph compares it with this.
        if not isinstance(x, Proxy) and not self.takes(x.shape):
            wanted = f"[N, C, H, W] with C = {len(self.mean)} channels, as many as mean and std have numbers"
            raise ValueError(f"x must be {wanted}, got shape {tuple(x.shape)}")
        return (x - self.mean) / self.std

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether images of the shape have the channels that mean and std are of; one image may come without a batch dimension."""
        return len(shape) in (3, 4) and shape[-3] == len(self.mean)

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def with_input_noise(
    model: nn.Module,
    sigma: float = 0.25,
    *,
    mean: Sequence[float] | torch.Tensor | None = None,
    std: Sequence[float] | torch.Tensor | None = None,
) -> nn.Sequential:
    """Puts Gaussian noise in front of a whole model, and between the two the normalisation that the model was trained with.

    The result takes images in [0, 1]. Its noise is in the units of their pixels, whatever the normalisation, and everything that reads the
    image reads the noisy one. So `certify` accepts it. The model itself may be plain, as in Cohen et al., or have noise of its own
    (`convert`).

    Args:
        model: `nn.Module` that maps images [N, C, H, W] to logits. It is not changed.
        sigma: standard deviation >= 0 of the noise, in the units of the image.
        mean: C numbers that the model's images have subtracted, or None for a model that takes pixels.
        std: C numbers > 0 that they are divided by; given with ``mean``.

    Returns:
        An `nn.Sequential` of ``noise``, ``normalize`` (where there is one) and ``model``: the model's weights are those of
        ``result.model``, ``result.noise.set_sigma`` changes sigma.

    Raises:
        TypeError: model is no module.
        ValueError: sigma, mean or std are out of range or do not fit each other.

    Examples:
        >>> model = rse_fast.with_input_noise(network, 0.25, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    parts: dict[str, nn.Module] = {"noise": GaussianNoise(sigma)}
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got mean={mean!r} and std={std!r}")
    if mean is not None and std is not None:
        shift, scale = _channels("mean", mean), _channels("std", std)
        if len(shift) != len(scale):
            raise ValueError(f"mean and std must have one number a channel, got {len(shift)} and {len(scale)}")
        if not bool((scale > 0).all()):
            raise ValueError(f"std must be positive, got {scale.tolist()}")
        parts["normalize"] = Normalize(shift, scale)
    like = next(model.parameters(), None)
    if like is not None:
        for part in parts.values():
            part.to(like.device)
    return nn.Sequential(OrderedDict(parts | {"model": model})).train(model.training)


def _channels(name: str, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
    try:
        found = torch.as_tensor(values, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold one number a channel, got {values!r}") from error
    if found.dim() != 1 or not len(found) or not bool(found.isfinite().all()):
        raise ValueError(f"{name} must hold one finite number a channel, got {values!r}")
    return found.clone()
