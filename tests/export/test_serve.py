"""examples/serve.py over loopback: answers can be repeated by the seed that they name, and too many requests are turned away."""

import http.client
from concurrent.futures import ThreadPoolExecutor

import loopback
import pytest
import torch

pytest.importorskip("litserve")
pytestmark = pytest.mark.slow


def client(image, port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        return loopback.ask(connection, image)
    finally:
        connection.close()


def test_images_one_by_one(rng, one_thread):
    image = torch.rand(3, 32, 32)
    with loopback.serving(batch=1, most=8) as port:
        status, answer = client(image, port)
    again = loopback.ensemble().predict(image[None], int(answer["seed"]))
    assert status == 200 and (again.probs[0] - torch.tensor(answer["probs"])).abs().max() < 1e-5


def test_answers_are_those_of_their_seed_and_a_full_server_says_so(rng, one_thread):
    ensemble, images = loopback.ensemble(), torch.rand(24, 3, 32, 32)
    with loopback.serving(batch=4, most=8) as port, ThreadPoolExecutor(8) as eight, ThreadPoolExecutor(24) as many:
        answers = list(eight.map(lambda image: client(image, port), images))
        crowd = list(many.map(lambda image: client(image, port), images))
        after = client(images[0], port)
    assert {status for status, _ in answers} == {200} and after[0] == 200
    assert {status for status, _ in crowd} == {200, 503}
    for image, (status, answer) in zip([*images, *images], answers + crowd, strict=True):
        if status == 200:
            again = ensemble.predict(image[None], int(answer["seed"]), image_offset=answer["index"])
            assert (again.probs[0] - torch.tensor(answer["probs"])).abs().max() < 1e-5  # other batches, hence other orders of sums
            assert answer["label"] == torch.tensor(answer["probs"]).argmax()
    assert max(answer["index"] for _, answer in answers) > 0  # images were gathered
    assert len({answer["seed"] for _, answer in answers}) > 1
