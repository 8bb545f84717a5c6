"""Serves an Ensemble over HTTP: single images are gathered into packed batches, and every answer says which noise it had.

    pip install 'rse-fast[serve]'
    python examples/serve.py runs/small-rse --port 8000

POST /predict takes {"image": C lists of H lists of W numbers in [0, 1]}, of the shape that the network was trained on. Anything else is
answered with status 422 and a sentence, and the other images of its batch are not touched by it. Each batch has a fresh seed of the
operating system. An answer names its seed and the image's index in the batch, so the owner of the model can repeat it:
`ensemble.predict(image[None], seed, image_offset=index)`. Where clients may attack, leave both out of the answer: noise that is known can
be attacked.
"""

import argparse
import functools
import json
import math
from pathlib import Path

import litserve
import torch
from fastapi.responses import JSONResponse

import rse_fast
from rse_fast import train


class Classifier(litserve.LitAPI):
    """load: gives the ensemble; called once in each process that runs it. shape: (C, H, W) of an image."""

    def __init__(self, load, shape, **options):
        super().__init__(**options)
        self.load, self.shape = load, tuple(shape)

    def setup(self, device):
        self.ensemble = self.load()

    def decode_request(self, request: dict):
        """The image, or a sentence that refuses it. An exception would become the answer to every request of the batch."""
        channels, height, width = self.shape
        expected = f"image must be {channels} lists of {height} lists of {width} numbers in [0, 1]"
        if "image" not in request:
            return f'{expected}, got a request without "image"'
        try:
            image = torch.tensor(request["image"], dtype=torch.float32)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: nested too deep
            return f"{expected}, got something that is no array of numbers"
        if image.shape != self.shape:
            return f"{expected}, got an array of shape {list(image.shape)}"
        if not ((image >= 0) & (image <= 1)).all():  # nor NaN
            return f"{expected}, got others"
        return image

    def batch(self, inputs):
        return inputs

    def predict(self, inputs):
        # LitServe hands on a single input, and wants a single output, where batches have at most one.
        return self.answers(inputs) if self.max_batch_size > 1 else self.answers([inputs])[0]

    def answers(self, inputs):
        """A dict for each image, the sentence again for each refusal."""
        images = [image for image in inputs if not isinstance(image, str)]
        if not images:
            return inputs
        out = self.ensemble.predict(torch.stack(images))
        found = (
            {"label": label, "probs": probs, "seed": str(out.seed), "index": index}  # a JavaScript number has 53 bits, a seed 64
            for index, (label, probs) in enumerate(zip(out.labels.tolist(), out.probs.tolist(), strict=True))
        )
        return [refused if isinstance(refused, str) else next(found) for refused in inputs]

    def encode_response(self, output):
        return JSONResponse({"detail": output}, 422) if isinstance(output, str) else output


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


def server(load, shape, batch=8, wait=0.005, most=64):
    """The server of ``load()`` for images of ``shape``: batches of at most ``batch`` images, for which it waits ``wait`` seconds; ``most``
    requests at once."""
    api = Classifier(load, shape, max_batch_size=batch, batch_timeout=wait)
    largest = 1024 + 32 * math.prod(shape)  # bytes of a request: 32 for a number. A larger one gets status 413, unread.
    return litserve.LitServer(api, accelerator="cpu", middlewares=[(Limit, {"most": most})], max_payload_size=largest)


def load(run: Path, draws: int) -> rse_fast.Ensemble:
    return rse_fast.Ensemble(train.load_model(run), draws, temperature=train.load_temperature(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder of rse-fast train")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="most images of a batch")
    parser.add_argument("--most", type=int, default=64, help="most requests at once; further ones get status 503")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    shape = json.loads((arguments.run / "data.json").read_text())["shape"]
    made = server(functools.partial(load, arguments.run, arguments.draws), shape, arguments.batch, most=arguments.most)
    made.run(port=arguments.port, generate_client_file=False)


if __name__ == "__main__":
    main()
