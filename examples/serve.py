"""Serves an Ensemble over HTTP: single images are gathered into packed batches, and every answer says which noise it had.

    pip install 'rse-fast[serve]'
    python examples/serve.py runs/small-rse --port 8000

POST /predict takes {"image": C lists of H lists of W numbers}. Each batch has a fresh seed of the operating system. An answer names its
seed and the image's index in the batch, so the owner of the model can repeat it: `ensemble.predict(image[None], seed, image_offset=index)`.
Where clients may attack, leave both out of the answer: noise that is known can be attacked.
"""

import argparse
import functools
from pathlib import Path

import litserve
import torch

import rse_fast
from rse_fast import train


class Classifier(litserve.LitAPI):
    """load: gives the ensemble; called once in each process that runs it."""

    def __init__(self, load, **options):
        super().__init__(**options)
        self.load = load

    def setup(self, device):
        self.ensemble = self.load()

    def decode_request(self, request):
        return torch.tensor(request["image"], dtype=torch.float32)

    def batch(self, inputs):
        return torch.stack(inputs)

    def predict(self, x):
        # LitServe hands on a single image where batches have at most one.
        return self.ensemble.predict(x if x.dim() == 4 else x[None])

    def unbatch(self, output):
        return [
            {"label": label, "probs": probs, "seed": str(output.seed), "index": index}  # a JavaScript number has 53 bits, a seed 64
            for index, (label, probs) in enumerate(zip(output.labels.tolist(), output.probs.tolist(), strict=True))
        ]

    def encode_response(self, output):
        return output


class Limit:
    """Answers 503 to requests beyond ``most`` that are under way, so that those who are let in wait a bounded time."""

    def __init__(self, app, most):
        self.app, self.most, self.inside = app, most, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/predict":
            return await self.app(scope, receive, send)
        if self.inside >= self.most:
            headers = [(b"retry-after", b"1"), (b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            return await send({"type": "http.response.body", "body": b""})
        self.inside += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.inside -= 1


def server(load, batch=8, wait=0.005, most=64):
    """The server of ``load()``: batches of at most ``batch`` images, for which it waits ``wait`` seconds; ``most`` requests at once."""
    api = Classifier(load, max_batch_size=batch, batch_timeout=wait)
    return litserve.LitServer(api, accelerator="cpu", middlewares=[(Limit, {"most": most})])


def load(run: Path, draws: int) -> rse_fast.Ensemble:
    return rse_fast.Ensemble(train.load_model(run), draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder of rse-fast train")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="most images of a batch")
    parser.add_argument("--most", type=int, default=64, help="most requests at once; further ones get status 503")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    made = server(functools.partial(load, arguments.run, arguments.draws), arguments.batch, most=arguments.most)
    made.run(port=arguments.port, generate_client_file=False)


if __name__ == "__main__":
    main()
