"""A command that is killed at any instant and given again ends with the folder of one that was not.

`make faults` kills RSE_FAST_KILLS times; the test suite does so a few times.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from children import fork, status

for package in ("foolbox", "matplotlib", "pyautoattack", "safetensors", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(package)

from rse_fast import certify_cli, cli  # noqa: E402
from rse_fast.evaluate import rows  # noqa: E402
from rse_fast.train.log import read  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
KILLS = int(os.environ.get("RSE_FAST_KILLS", 12))  # in all commands together
TRAIN = [
    "train", "--data", "digits", "--model", "tiny_training:net", "--epochs", "2", "--batch-size", "64", "--lr", "0.05", "--ema", "0.9",
    "--save-steps", "4", "--log-steps", "2", "--device", "cpu", "--seed", "3",
]  # fmt: skip
MODEL = ["--model", "certify_model:make", "--dtype", "float32", "--device", "cpu", "--seed", "4"]
COMMANDS = {
    "train": TRAIN,
    "predict": ["predict", *MODEL, "--images", "300", "--draws", "40", "--early-exit", "exact", "--max-rows", "60"],
    "certify": ["certify", *MODEL, "--n0", "10", "--n", "600", "--alpha", "0.01", "--images", "40"],
    "evaluate": ["evaluate", *MODEL, "--protocol", "quick", "--eps", "0.2", "--draws", "4", "--repeats", "2", "--images", "24"],
}  # fmt: skip


def without(found, *names):
    """A result without the values called so, however deep."""
    if isinstance(found, dict):
        return {key: without(value, *names) for key, value in found.items() if key not in names}
    return [without(value, *names) for value in found] if isinstance(found, list) else found


def content(command: str, out: Path) -> dict:
    """What must not depend on kills: all but times and names of folders."""
    load = lambda name: json.loads((out / name).read_text())  # noqa: E731
    if command == "train":
        log = [without(row, "seconds") for row in read(out / "log.jsonl") if row["event"] in ("step", "epoch", "end")]
        checkpoints = sorted(f"checkpoints/{path.name}" for path in (out / "checkpoints").iterdir())
        kept = ["config.json", "data.json", "best.safetensors", *checkpoints]
        files = {name: (out / name).read_bytes() for name in kept if (out / name).is_file()}
        for folder in (out / "checkpoints").iterdir():
            files |= {f"{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()}
        return {"log": log, **files}
    if command == "predict":
        return {name: (out / name).read_bytes() for name in ("predict.json", "predictions.jsonl")}
    if command == "certify":
        table = sorted([vars(row) for row in certify_cli.read_table(out / "certified.tsv")], key=lambda row: row["index"])
        picture = (out / "certified.png").read_bytes()
        return {"settings": load("certify.json"), "picture": picture} | without(
            {"rows": table, "summary": load("summary.json")}, "seconds", "seconds_per_image", "command"
        )
    times = "seconds", "attack_seconds", "seconds_per_image", "command"
    return without({"rows": list(rows.read(out).values()), "results": load("results.json")}, *times)


def arguments(command: str, out: Path) -> list[str]:
    if command == "train" and (out / "config.json").exists():
        return ["train", "--resume", str(out), "--trust"]
    return [*COMMANDS[command], "--out", str(out)]


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_random_instants_the_result_is_the_same(command, tmp_path, rng):
    def run(out):
        return fork(lambda: cli.main(arguments(command, out)))

    assert status(run(tmp_path / "whole")) == 0
    began = time.monotonic()
    assert status(run(tmp_path / "again")) == 0  # the first one also pays for what the system reads
    seconds = time.monotonic() - began
    expected = content(command, tmp_path / "whole")
    assert content(command, tmp_path / "again") == expected
    wanted, kills, folders = -(-KILLS // len(COMMANDS)), 0, 0
    while kills < wanted:
        out, left = tmp_path / f"killed-{folders}", min(int(rng.integers(1, 5)), wanted - kills)
        folders += 1
        while left:
            child = run(out)
            time.sleep(rng.uniform(0, 1.05 * seconds))
            os.kill(child, signal.SIGKILL)
            ended = status(child)
            assert ended in (0, -signal.SIGKILL), ended
            left, kills = left - 1, kills + (ended != 0)
        ended = status(run(out))
        assert ended == 0, f"{out.name}: the command that continues ends with {ended}"
        found = content(command, out)
        differing = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
        assert not differing, f"after {kills} kills {differing} differ"
        left_behind = [str(path.relative_to(out)) for path in out.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".step")]
        assert not left_behind, f"after {kills} kills {left_behind} are left"
    print(f"{command}: {kills} kills in {folders} folders, {seconds:.1f} s uninterrupted")
