"""Stop and continue: the noise comes from torch's generator, so its state is all that a checkpoint needs beside the usual.

python examples/resume.py
"""

import tempfile
from pathlib import Path

import torch
from digits import dataset, network, report


def train(until: int, path: Path) -> torch.nn.Module:
    """Trains up to so many epochs, from where the checkpoint in ``path`` stands."""
    torch.manual_seed(0)
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    done = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])  # on GPUs torch.cuda.set_rng_state as well
        done = state["done"]
    loader = torch.utils.data.DataLoader(dataset("train"), batch_size=64, shuffle=True, drop_last=True)
    for _ in range(done, until):
        for images, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": torch.get_rng_state(), "done": until}
    torch.save(state, path)
    return model


with tempfile.TemporaryDirectory() as folder:
    whole = train(4, Path(folder) / "whole.pt")
    train(2, Path(folder) / "stopped.pt")
    continued = train(4, Path(folder) / "stopped.pt")
same = all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), continued.state_dict().values(), strict=True))
print(f"the run that was stopped has the weights of the whole one: {same}")
report(continued)
