"""A server of examples/serve.py on loopback, around a small network, and a client."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

import rse_fast
from rse_fast import models

HERE, EXAMPLES = Path(__file__).parent, Path(__file__).parents[2] / "examples"


def ensemble() -> rse_fast.Ensemble:
    """The same one in every process that calls it."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return rse_fast.Ensemble(rse_fast.convert(models.make("small", 10, 3)), 10, dtype="float32")


@contextlib.contextmanager
def serving(batch: int, most: int):
    """The port of a server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"import loopback, serve; serve.server(loopback.ensemble, (3, 32, 32), {batch}, most={most}).run(port={port}, host='127.0.0.1', "
    code = f"if __name__ == '__main__':\n    {code}generate_client_file=False, log_level='error')"
    script = ["-c", code]
    path = os.pathsep.join([str(HERE), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, *script], env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    try:
        end = time.monotonic() + 240
        while health(port) != 200:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server does not answer (exit status {process.poll()})")
            time.sleep(0.2)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(60)


def health(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def ask(connection: http.client.HTTPConnection, image: torch.Tensor) -> tuple[int, dict]:
    """(status, answer) for one image [C, H, W]."""
    return post(connection, json.dumps({"image": image.tolist()}))


def post(connection: http.client.HTTPConnection, body: str) -> tuple[int, dict]:
    """(status, answer) for any body of a request; {} for an answer that is empty."""
    connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    return response.status, json.loads(answer) if answer else {}
