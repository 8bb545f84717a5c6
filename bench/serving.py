"""Load on examples/serve.py over loopback: `python bench/serving.py`, in a checkout, writes bench/results/serving.md.

So many clients each send an image as soon as the last one is answered. Every answer is checked against the seed that it names. With
more clients than the server lets in, the rest is turned away at once and tries again after 20 ms.
"""

import http.client
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT)]

import loopback  # noqa: E402

from rse_fast.bench.results import environment, write_whole  # noqa: E402

SECONDS, MOST = 10, 32
CASES = {1: (1, 8), 8: (1, 8, 32, 64)}  # clients, by the images of a batch at most


def load(port: int, images: torch.Tensor, clients: int) -> tuple[list, int]:
    """What the clients met within SECONDS: (image, answer, seconds) of each answer, and how many requests were turned away."""
    answers, refused, end = [], [], time.monotonic() + SECONDS

    def client(number):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.monotonic() < end:
            number = (number + clients) % len(images)
            start = time.perf_counter()
            status, answer = loopback.ask(connection, images[number])
            if status == 200:
                answers.append((number, answer, time.perf_counter() - start))
            elif status == 503:
                refused.append(number)
                time.sleep(0.02)
            else:
                raise RuntimeError(f"status {status}")
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, len(refused)


def wrong(ensemble, images, answers) -> int:
    """How many answers are not those of the seed and the index that they name."""
    count = 0
    for number, answer, _ in answers:
        again = ensemble.predict(images[number][None], int(answer["seed"]), image_offset=answer["index"])
        count += bool((again.probs[0] - torch.tensor(answer["probs"])).abs().max() > 1e-5)
    return count


def main() -> None:
    ensemble, images = loopback.ensemble(), torch.rand(128, 3, 32, 32)
    machine = environment()
    lines = [
        "# Serving",
        "",
        f"`python bench/serving.py`: examples/serve.py over loopback, the small network, {ensemble.draws} draws, 32x32 images, float32.",
        f"{machine['cpu']}; clients and server share the cores. Load average: {os.getloadavg()[0]:.1f}. torch {torch.__version__}.",
        f"{SECONDS} seconds a row; at most {MOST} requests at once. Wrong: answers that are not those of the seed they name.",
        "",
        "| batch at most | clients | answers/s | p50 ms | p99 ms | turned away | images a batch | wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for batch, many in CASES.items():
        with loopback.serving(batch, MOST) as port:
            load(port, images, 1)  # what is done once
            for clients in many:
                answers, refused = load(port, images, clients)
                p50, p99 = np.percentile([seconds * 1e3 for _, _, seconds in answers], [50, 99])
                batches = len({answer["seed"] for _, answer, _ in answers})
                row = f"| {batch} | {clients} | {len(answers) / SECONDS:.1f} | {p50:.0f} | {p99:.0f} | {refused} "
                lines.append(f"{row}| {len(answers) / batches:.1f} | {wrong(ensemble, images, answers)} of {len(answers)} |")
                print(lines[-1], flush=True)
    write_whole(ROOT / "bench" / "results" / "serving.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
