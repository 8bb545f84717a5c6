"""Networks trained on handwritten digits for a few minutes, for what random weights cannot show: how sure a prediction is."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

import rse_fast
from rse_fast import data
from rse_fast.models import VGG16

from .measure import default_device
from .networks import SIGMAS


def digits(network: type[nn.Module] = VGG16, side: int = 32, steps: int = 120, **options) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(noisy network, test images [N, 3, side, side], test labels [N]): noisy SGD on those that come with scikit-learn.

    side: what their 8x8 pixels are scaled up to. options: of the network. Kept in the cache folder (RSE_FAST_CACHE, by default
    ``~/.cache/rse-fast``): on a small CPU the training of VGG16 takes minutes.
    """
    from sklearn.datasets import load_digits

    found, device = load_digits(), default_device()
    x = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    x = nn.functional.interpolate(x, size=(side, side), mode="bilinear").expand(-1, 3, -1, -1).contiguous().to(device)
    y = torch.from_numpy(found.target).to(device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(device)
    train, test = order[:1400], order[1400:]
    torch.manual_seed(0)
    model = rse_fast.convert(network(**options), *SIGMAS).to(device)
    folder = Path(os.environ.get("RSE_FAST_CACHE") or Path.home() / ".cache" / "rse-fast")
    kind = "-".join([network.__name__.lower(), *map(str, options.values()), f"digits{side}", str(steps), torch.__version__])
    file = folder / f"bench-{kind}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file, device=str(device)))
        return model.eval(), x[test], y[test]
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (64,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    data.write_atomically(file, lambda out: out.write(save(weights)))
    return model.eval(), x[test], y[test]
