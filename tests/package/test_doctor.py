"""The command line and `rse-fast doctor`, run as a user runs them."""

import json
import sys
from importlib import metadata

import pytest
import torch

from rse_fast import cli, doctor
from rse_fast.kernels.cpu import load


@pytest.fixture(scope="module")
def rse_fast(run_python):
    return lambda *args, **env: run_python("-m", "rse_fast.cli", *args, **env)


def test_json_report_tells_what_is_true(rse_fast):
    done = rse_fast("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found, library = json.loads(done.stdout), load()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["rse-fast"] == metadata.version("rse-fast")
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["devices"]["cpu"]["torch_threads"] >= 1 and found["devices"]["cpu"]["model"]
    assert len(found["devices"]["cuda"]["devices"]) == torch.cuda.device_count()
    assert found["cpu_library"] == {
        "path": str(library.path), "unit": library.unit, "units": list(library.units), "problem": library.problem
    }  # fmt: skip
    assert found["backends"]["cpu"] == {"backend": "cpu" if library.unit else "torch", "unit": library.unit}
    assert set(found["backends"]) == {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    assert "deterministic" in found["seeds"]["fixed"] and "manual_seed" in found["seeds"]["ambient"]
    assert [entry["name"] for entry in found["environment"] if entry["name"].startswith("RSE_FAST_")] == []


def test_text_report_has_every_section(rse_fast):
    done = rse_fast("doctor")
    assert done.returncode == 0, done.stderr
    sections = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert sections == ["Versions", "Devices", "CPU library", "Active backend", "Seeds", "Environment"]
    assert str(load().path) in done.stdout and "deterministic" in done.stdout


def test_the_environment_in_force_is_shown(rse_fast):
    done = rse_fast("doctor", "--json", RSE_FAST_CPU_UNIT="baseline", RSE_FAST_NO_SUCH="1", OMP_NUM_THREADS="1")
    found = json.loads(done.stdout)
    shown = {entry["name"]: entry for entry in found["environment"]}
    assert shown["RSE_FAST_CPU_UNIT"]["value"] == "baseline" and shown["RSE_FAST_CPU_UNIT"]["meaning"]
    assert shown["RSE_FAST_NO_SUCH"]["meaning"] == "not a variable that rse-fast knows"
    assert shown["OMP_NUM_THREADS"]["value"] == "1" and found["devices"]["cpu"]["torch_threads"] == 1
    if load().units:
        assert found["backends"]["cpu"] == {"backend": "cpu", "unit": "baseline"}


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_unit_that_is_not_there_is_reported_with_status_1(rse_fast, form):
    done = rse_fast("doctor", *form, RSE_FAST_CPU_UNIT="sse9")
    assert done.returncode == 1 and "RSE_FAST_CPU_UNIT='sse9'" in done.stdout, done.stderr


def test_a_missing_library_is_reported_once_and_torch_takes_over(rse_fast, tmp_path):
    done = rse_fast("doctor", "--json", RSE_FAST_CPU_LIBRARY=str(tmp_path / "none.so"))
    found = json.loads(done.stdout)
    assert done.returncode == 1 and done.stderr == ""
    assert "does not exist" in found["cpu_library"]["problem"]
    assert found["backends"]["cpu"] == {"backend": "torch", "unit": None}


def test_triton_is_looked_up_and_not_imported(run_python):
    code = "import sys; from rse_fast import doctor; print(doctor.report()['versions']['triton']); print('triton' in sys.modules)"
    done = run_python("-c", code)
    try:
        expected = metadata.version("triton")
    except metadata.PackageNotFoundError:
        expected = None
    assert done.stdout.split() == [str(expected), "False"], done.stderr


def test_a_driver_that_fails_is_a_problem_not_an_error(monkeypatch, capsys):
    def broken():
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", broken)
    found = doctor.report()
    assert found["devices"]["cuda"]["problem"] == "the driver is too old"
    assert doctor.main([]) == 0 and "none (the driver is too old)" in capsys.readouterr().out


def test_help_lists_the_commands_and_imports_none_of_them(run_python):
    code = """
import sys
from rse_fast import cli
try:
    cli.main(["--help"])
finally:
    print([module for module, _, _ in cli.COMMANDS.values() if module in sys.modules])
"""
    done = run_python("-c", code)
    assert done.returncode == 0 and done.stdout.strip().endswith("[]"), done.stderr
    assert all(f"    {name} " in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    assert not left.value.code and f"usage: rse-fast {name}" in capsys.readouterr().out


@pytest.mark.parametrize("args", [(), ("nonsense",), ("doctor", "--nonsense"), ("doctor", "extra")])
def test_a_wrong_call_is_status_2_with_the_usage(args, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(list(args))
    assert left.value.code == 2 and capsys.readouterr().err.startswith("usage: rse-fast")


def test_version(rse_fast):
    assert rse_fast("--version").stdout == f"rse-fast {metadata.version('rse-fast')}\n"


def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "needs_more.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "more", ("needs_more", "plot", "for this test"))
    assert cli.main(["more"]) == 1
    assert capsys.readouterr().err == "rse-fast more: needs no_such_package_at_all: pip install 'rse-fast[plot]'\n"


@pytest.mark.parametrize(("policy", "said"), [("passive", "passive: "), ("active", "set OMP_WAIT_POLICY=passive")])
def test_doctor_says_how_threads_wait(policy, said, run_python):
    done = run_python("-m", "rse_fast.cli", "doctor", OMP_WAIT_POLICY=policy)
    assert said in next(line for line in done.stdout.splitlines() if line.startswith("  threads "))
