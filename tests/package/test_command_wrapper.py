"""What every command does with errors, signals and unknown runs."""

import io
import os
import re
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


class Terminal(io.StringIO):
    def isatty(self):
        return True


LAST = "certify: 100 of 100 images, certified 60%"


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [(-1, ["certify: 30 of 100 images, certified 50%", "certify: 40 of 100 images, certified 50%", LAST]), (3600, [LAST])],
)
def test_without_a_terminal_a_line_comes_now_and_then_and_at_the_end(seconds, lines, monkeypatch, capsys):
    monkeypatch.setattr(wrapper, "TOLD_EVERY", seconds)
    with wrapper.Progress("certify", 100, done=10) as progress:
        for count, text in ((20, "certified 50%"), (10, ""), (60, "certified 60%")):
            progress.update(count, text)
    out = capsys.readouterr().out
    assert re.sub(r", \d+ s$", "", out, flags=re.MULTILINE).splitlines() == lines and out.count(" s\n") == len(lines)


def test_progress_is_a_bar_on_a_terminal_and_silent_in_other_processes(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with wrapper.Progress("evaluate", 4) as progress:
        progress.update(4, "pgd")
    shown = sys.stderr.getvalue().split("\r")[-1]
    assert re.match(r"evaluate: 100%.*4/4.*pgd", shown) and capsys.readouterr().out == ""
    for error in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", error)
        with wrapper.Progress("evaluate", 4, shown=False) as progress:
            progress.update(4, "pgd")
        assert error.getvalue() == "" == capsys.readouterr().out


def test_no_line_after_an_error_or_where_nothing_was_left_to_do(monkeypatch, capsys):
    with wrapper.Progress("predict", 0):
        pass
    with pytest.raises(ValueError), wrapper.Progress("predict", 4) as progress:
        progress.update(2)
        raise ValueError
    assert capsys.readouterr().out == ""
