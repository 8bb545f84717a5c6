"""kernels/cpu/build.py: one object for each unit, one library of them, and what a failure says (test_cpu_units.py: what objects hold)."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rse_fast.kernels.cpu import build, load

X86 = platform.machine().lower() in ("x86_64", "amd64")
needs_binutils = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("nm") or not shutil.which("objdump"), reason="reads ELF objects with binutils"
)


def tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_installed_library_is_there_and_runs(compiler):
    found = load()
    assert found.problem is None
    assert found.unit in found.units and set(found.units) <= set(build.UNITS) and found.units[-1] == "baseline"


@needs_binutils
def test_one_object_per_unit(built):
    units = {path.stem for path in built[1].glob("*.o")} - {"dispatch"}
    assert units == set(build.supported_units(build.find_compiler(), built[1]))
    assert {"baseline", *(["avx2", "avx512"] if X86 else [])} <= units


@needs_binutils
def test_the_library_exports_the_c_interface_only(built):
    defined = {line.split()[-1].partition("@")[0] for line in tool("nm", "-D", "--defined-only", str(built[0])).splitlines()}
    assert {"rse_abi_version", "rse_units", "rse_active_unit", "rse_select_unit", "rse_add_noise"} <= defined
    assert [name for name in defined if not name.startswith("rse_")] == []


def test_a_second_build_in_the_same_folder_compiles_only_what_changed(built):
    library, objects = built
    before = {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}
    library.unlink()
    assert build.build(library.parent, work=objects) == library and library.exists()
    assert {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")} == before


def test_units_that_the_compiler_does_not_know_are_left_out(compiler, monkeypatch, tmp_path):
    monkeypatch.setitem(build.UNITS, "avx9", ("-mavx9",))
    units = build.supported_units(build.find_compiler(), tmp_path)
    assert "avx9" not in units and "baseline" in units


def test_an_order_of_instructions_is_asked_only_of_a_compiler_that_knows_the_flag(compiler, monkeypatch, tmp_path):
    for flag, taken in (("-fno-such-order-of-instructions", ()), ("-O2", ("-O2",))):
        monkeypatch.setattr(build, "ORDER", (flag,))
        assert build.unit_flags("avx2", compiler, tmp_path) == build.UNITS["avx2"] + taken


def test_cxx_is_the_only_candidate_if_set(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    with pytest.raises(build.BuildError, match="CXX, '/nonexistent/c\\+\\+', was not found"):
        build.find_compiler()


def test_cxx_may_carry_arguments(compiler, monkeypatch):
    path = shutil.which(compiler[0])
    monkeypatch.setenv("CXX", f"{path} -pipe")
    assert build.find_compiler() == [path, "-pipe"]


def test_a_broken_source_names_the_compiler_and_repeats_its_message(compiler, tmp_path):
    for name in ("add_noise.cpp", "dispatch.cpp"):
        (tmp_path / name).write_text("#error of this test\n")
    with pytest.raises(build.BuildError, match="failed\n(.|\n)*of this test"):
        build.build(tmp_path / "out", source=tmp_path)
    assert not (tmp_path / "out" / build.library_name()).exists()


def test_runs_as_a_script_without_the_package(run_python, tmp_path):
    script = Path(build.__file__)
    done = run_python("-I", script, "--out", tmp_path, CXX="/nonexistent/c++")
    assert done.returncode == 1
    assert done.stderr == "error: the C++ compiler named by CXX, '/nonexistent/c++', was not found\n"
