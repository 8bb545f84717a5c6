"""What a known seed is worth to an attacker: python -m rse_fast.bench.fixed_seed [--images N]; a few minutes on a CPU.

The network of the demo is trained on the digits with noise, then attacked by PGD in two ways: with fresh noise at every query (the seed is
unknown), and with the very noise that the deployed ensemble will use (a fixed seed that the attacker knows).
"""

import argparse

import torch

from rse_fast import Ensemble, data
from rse_fast.train import Config, Trainer
from rse_fast.train.distributed import connect

EPS, STEPS, DRAWS, SEED = 0.13, 40, (1, 10), 12345


def trained() -> torch.nn.Module:
    config = Config(data="digits", model="small", defence="rse", epochs=4, batch_size=64, lr=0.05, device="cpu", seed=0)
    with connect("cpu") as ranks:
        trainer = Trainer(config, data.digits(), ranks)
        while not trainer.complete:
            trainer.advance()
    return trainer.evaluated.eval().requires_grad_(False)


def attack(ensemble: Ensemble, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """PGD in the L-infinity ball of radius EPS."""
    found = x.clone()
    for _ in range(STEPS):
        found.requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.nll_loss(ensemble(found), y), found)
        found = (found.detach() + 2.5 * EPS / STEPS * gradient.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    return found.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--images", type=int, default=360)
    count = parser.parse_args().images
    model, part = trained(), data.digits().test
    x, y = part.images[:count].float() / 255, torch.as_tensor(part.labels[:count])
    accuracy = lambda ensemble, images: f"{100 * (ensemble.predict(images).labels == y).float().mean().item():.1f}"  # noqa: E731
    print(f"digits, {len(x)} images, PGD of {STEPS} steps, Linf {EPS}, EOT as many draws as the ensemble has\n")
    print("| draws | accuracy % | deployed with fresh noise | deployed with a fixed seed |\n|---|---|---|---|")
    for draws in DRAWS:
        secret, fixed = Ensemble(model, draws), Ensemble(model, draws, seed=SEED)
        print(f"| {draws} | not attacked | {accuracy(secret, x)} | {accuracy(fixed, x)} |")
        for name, attacker in (("attacker without the seed", secret), ("attacker with the seed", fixed)):
            images = attack(attacker, x, y)
            print(f"| {draws} | {name} | {accuracy(secret, images)} | {accuracy(fixed, images)} |")


if __name__ == "__main__":
    main()
