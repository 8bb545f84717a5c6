"""Labels a data set with Ray Data, on the processes or GPUs of a cluster: what `rse-fast predict` does, with the same seed the same labels.

    pip install 'ray[data]'
    python examples/ray_data.py runs/small-rse --seed 1 --actors 2

Noise is addressed by the index of an image, so which actor gets which batch, in what order and how often after a failure, changes nothing.
"""

import argparse
from pathlib import Path

import numpy as np
import ray

import rse_fast
from rse_fast import run_inputs, train


class Labeller:
    """An actor: its own copy of the model, and the noise that the seed and the index give each image."""

    def __init__(self, run: Path, draws: int, early_exit: str | float | None, seed: int, dtype: str, device: str):
        self.test = train.load_data(train.Config.load(run / "config.json")).test
        self.ensemble = rse_fast.Ensemble(train.load_model(run, device=device), draws, seed=seed, dtype=dtype, early_exit=early_exit)
        self.device = device

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        indices = sorted(batch["id"].tolist())
        parts = [
            self.ensemble.predict(run_inputs.images(self.test, rows, self.device), image_offset=rows[0])
            for rows in run_inputs.neighbours(indices, len(indices))
        ]
        return {
            "index": np.array(indices),
            "target": np.array([int(self.test.labels[i]) for i in indices]),
            "label": np.concatenate([out.labels.cpu().numpy() for out in parts]),
            "draws_used": np.concatenate([out.draws_used.cpu().numpy() for out in parts]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder of rse-fast train")
    parser.add_argument("--images", type=int, help="at most so many (default: the test set)")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--early-exit", default=None, type=lambda text: text if text == "exact" else float(text))
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    arguments = parser.parse_args()
    run = arguments.run.resolve()  # an actor has another working directory
    images = len(train.load_data(train.Config.load(run / "config.json")).test)
    found = (
        ray.data.range(images if arguments.images is None else min(images, arguments.images))
        .map_batches(
            Labeller,
            fn_constructor_args=(
                run,
                arguments.draws,
                arguments.early_exit,
                arguments.seed,
                arguments.dtype,
                "cuda" if arguments.gpus else "cpu",
            ),
            batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=arguments.actors),
            num_cpus=0.5,  # on a machine of as many cores as actors, something must be left for the tasks that hand out the indices
            num_gpus=arguments.gpus,
        )
        .sort("index")
        .to_pandas()
    )
    found.to_json("predictions.jsonl", orient="records", lines=True)
    right = (found["target"] == found["label"]).mean()
    print(f"{len(found)} images, accuracy {right:.2%}, {found['draws_used'].mean():.1f} draws an image; predictions.jsonl")


if __name__ == "__main__":
    main()
