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

from rse_fast import certify_cli, cli, predict_cli  # noqa: E402
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
        log = [without(row, "seconds", "cpu_seconds") for row in read(out / "log.jsonl") if row["event"] in ("step", "epoch", "end")]
        kept = [out / name for name in ("config.json", "data.json", "best.safetensors")] + list((out / "checkpoints").glob("*/*"))
        return {"log": log} | {str(path.relative_to(out)): path.read_bytes() for path in kept}
    if command == "predict":
        order = [json.loads(line)["index"] for line in (out / "predictions.jsonl").read_text().splitlines()]
        return {"settings": load("predict.json"), "rows": predict_cli.read(out), "order": order}
    if command == "certify":
        table = sorted([vars(row) for row in certify_cli.read_table(out / "certified.tsv")], key=lambda row: row["index"])
        picture = (out / "certified.png").read_bytes()
        return {"settings": load("certify.json"), "picture": picture} | without(
            {"rows": table, "summary": load("summary.json")}, "seconds", "seconds_per_image", "command"
        )
    times = "seconds", "attack_seconds", "seconds_per_image", "command"
    return without({"rows": list(rows.read(out).values()), "results": load("results.json")}, *times)


def differing(command: str, expected: dict, found: dict) -> list[str]:
    """Names of what differs. `rse-fast predict` promises its numbers up to rounding, which is that of other sizes of packed batches."""
    if command == "predict":
        rows, found["rows"] = found["rows"], expected["rows"]
        assert rows.keys() == expected["rows"].keys()
        for index, row in expected["rows"].items():
            for name, value in row.items():
                assert value == pytest.approx(rows[index][name], abs=2e-6 if isinstance(value, float) else 0), (index, name)
    return [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]


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
    assert not differing(command, expected, content(command, tmp_path / "again"))
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
        wrong = differing(command, expected, content(command, out))
        assert not wrong, f"after {kills} kills {wrong} differ"
        left_behind = [str(path.relative_to(out)) for path in out.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".step")]
        assert not left_behind, f"after {kills} kills {left_behind} are left"
    print(f"{command}: {kills} kills in {folders} folders, {seconds:.1f} s uninterrupted")
