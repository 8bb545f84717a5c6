"""examples/serve.py over loopback: answers can be repeated by the seed that they name, and too many requests are turned away."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import loopback
import pytest
import tiny_training
import torch

from rse_fast import cli

pytest.importorskip("litserve")
pytestmark = pytest.mark.slow


def client(image, port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        return loopback.ask(connection, image)
    finally:
        connection.close()


def test_a_run_is_served_at_the_temperature_that_it_keeps(rng, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(loopback.EXAMPLES)
    monkeypatch.syspath_prepend(loopback.HERE)
    import serve

    tiny_training.write_images(tmp_path / "images.npz", rng)
    command = ["train", "--data", tmp_path / "images.npz", "--out", tmp_path / "run", "--model", "small", "--epochs", 1, "--batch-size", 60]
    assert cli.main([*map(str, command), "--device", "cpu"]) == 0
    (tmp_path / "run" / "temperature.json").write_text('{"temperature": 2.5}')
    ensemble = serve.load(tmp_path / "run", 3)
    assert (ensemble.draws, ensemble.seed, ensemble.temperature) == (3, None, 2.5)


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


def wrong_requests(image):
    """Bodies that are no image of the network, with what their answer says."""
    lists = image.tolist()
    beyond, missing = image.clone(), image.clone()
    beyond[0, 0, 0], missing[2, 31, 31] = 1.5, float("nan")
    return {
        "{": "JSON decode error", "[" * 30_000: "error parsing the body", '{"image": ' + 200 * "[" + 200 * "]" + "}": "image must be",
        "[1, 2]": "valid dictionary", "{}": 'without "image"',
        **{json.dumps({"image": value}): "no array of numbers" for value in ("a cat", None, [[1, "a"]], [lists[0], [1]], {"a": 1})},
        json.dumps({"image": 0.5}): "shape []", json.dumps({"image": lists[:1]}): "shape [1, 32, 32]",
        json.dumps({"image": [lists]}): "shape [1, 3, 32, 32]", json.dumps({"image": image[:, :30].tolist()}): "shape [3, 30, 32]",
        json.dumps({"image": [[[]]]}): "shape [1, 1, 0]", '{"image": [1' + 400 * "0" + "]}": "no array of numbers",
        json.dumps({"image": beyond.tolist()}): "numbers in [0, 1], got others",
        json.dumps({"image": missing.tolist()}): "numbers in [0, 1], got others",
        json.dumps({"image": [lists] * 8}): "Payload too large",
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 4])
def test_a_wrong_request_is_answered_with_a_sentence_and_harms_no_other(batch, rng, one_thread):
    ensemble, images = loopback.ensemble(), torch.rand(6, 3, 32, 32)
    wrong = wrong_requests(images[0])
    bodies = [body for each in wrong for body in (each, *(json.dumps({"image": image.tolist()}) for image in images))]

    def post(body):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            return loopback.post(connection, body)
        finally:
            connection.close()

    with loopback.serving(batch, most=16) as port, ThreadPoolExecutor(16) as sixteen:
        answers = list(sixteen.map(post, bodies))
    for body, (status, answer) in zip(bodies, answers, strict=True):
        if body in wrong:
            assert status in (400, 413, 422) and wrong[body] in str(answer["detail"]), (body[:60], status, answer)
        else:
            assert status == 200
            again = ensemble.predict(torch.tensor([json.loads(body)["image"]]), int(answer["seed"]), image_offset=answer["index"])
            assert (again.probs[0] - torch.tensor(answer["probs"])).abs().max() < 1e-5
    assert (max(answer["index"] for _, answer in answers if "index" in answer) > 0) == (batch > 1)
