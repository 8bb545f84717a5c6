"""What every command does with errors, signals and unknown runs."""

import os
import signal
import subprocess
import sys

import pytest

from rse_fast import cli
from rse_fast.cli import wrapper


def raising(error):
    raise error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("path: 'x' is no data set"), 2, "rse-fast certify: --data: 'x' is no data set\n"),
        (TypeError("n must be an integer, got str"), 2, "rse-fast certify: n must be an integer, got str\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues in {out}\n"),
        (OSError(28, "No space left on device"), 1, "rse-fast certify: cannot write in '{out}' (No space left on device); "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_line_and_a_status(error, status, said, tmp_path, capsys):
    assert wrapper.run("certify", lambda: raising(error), tmp_path, ("*.tsv",)) == status
    err = capsys.readouterr().err
    assert err.startswith(said.format(out=tmp_path)) and err.count("\n") == 1


def test_an_error_of_the_program_itself_is_not_hidden():
    with pytest.raises(RuntimeError, match="a fault"):
        wrapper.run("certify", lambda: raising(RuntimeError("a fault")))


@pytest.mark.parametrize("status", [None, 0, 1])
def test_the_status_is_what_the_action_returns(status):
    assert wrapper.run("certify", lambda: status) == (status or 0)


def test_sigterm_runs_what_is_final_and_ends_the_process_by_the_signal(tmp_path):
    code = (
        "import time\nfrom pathlib import Path\nfrom rse_fast.cli import wrapper\n"
        "def action():\n    try:\n        print('begun', flush=True)\n        time.sleep(60)\n"
        "    finally:\n        Path('closed').write_text('yes')\n"
        "raise SystemExit(wrapper.run('certify', action, Path('out')))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"begun\n"
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(timeout=30) == -signal.SIGTERM
        finally:
            process.kill()
        assert process.stderr.read() == b"terminated; the same command continues in out\n"
    assert (tmp_path / "closed").read_text() == "yes"


@pytest.mark.parametrize("command", ["predict", "certify", "evaluate", "train --resume"])
def test_an_unknown_run_is_named(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split(), "nowhere"]) == 2
    assert "no run at 'nowhere'" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("spelling", ["--defence", "--defense"])
def test_both_spellings_of_defence_are_read(spelling, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", spelling, "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
