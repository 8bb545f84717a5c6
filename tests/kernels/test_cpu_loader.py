"""kernels/cpu/loader.py: what load() gives in every state that the library and the environment can be in."""

import ctypes
import subprocess
import threading
import warnings

import pytest

from rse_fast.kernels.cpu import build, loader

STUB = """
extern "C" int rse_abi_version() { return ABI; }
extern "C" const char* rse_units() { return "avx2,baseline"; }
extern "C" const char* rse_active_unit() { return "avx2"; }
extern "C" int rse_select_unit(const char* name) { return name[0] == 'b' ? 0 : -1; }
"""


@pytest.fixture
def fresh(monkeypatch):
    """The loader as in a new process."""
    for name in (loader.UNIT_VARIABLE, loader.LIBRARY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loader, "_library", None)
    return monkeypatch


@pytest.fixture
def stub(compiler, tmp_path, fresh):
    """``stub(abi)`` compiles a library with this ABI version and makes it the one to load."""

    def make(abi):
        source, path = tmp_path / "stub.cpp", tmp_path / build.library_name()
        source.write_text(STUB)
        subprocess.run([*compiler, f"-DABI={abi}", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
        fresh.setenv(loader.LIBRARY_VARIABLE, str(path))
        return path

    return make


def load_quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return loader.load()


def test_a_library_that_fits(stub):
    path = stub(loader.ABI_VERSION)
    found = loader.load()
    assert isinstance(found.handle, ctypes.CDLL)
    assert (found.path, found.units, found.unit, found.problem) == (path, ("avx2", "baseline"), "avx2", None)


def test_another_abi_version_is_a_problem(stub):
    path = stub(loader.ABI_VERSION + 1)
    with pytest.warns(RuntimeWarning, match="ABI version"):
        found = loader.load()
    assert (found.handle, found.unit, found.units) == (None, None, ())
    assert f"{path} has ABI version {loader.ABI_VERSION + 1}, expected {loader.ABI_VERSION}; reinstall" in found.problem


def test_a_file_that_is_no_library_is_a_problem(fresh, tmp_path):
    (tmp_path / "text.so").write_text("not a library")
    fresh.setenv(loader.LIBRARY_VARIABLE, str(tmp_path / "text.so"))
    found = load_quietly()
    assert found.handle is None and "could not be opened" in found.problem and "reinstall" in found.problem


def test_another_library_is_a_problem(compiler, fresh, tmp_path):
    (tmp_path / "other.cpp").write_text('extern "C" int other() { return 0; }\n')
    subprocess.run([*compiler, "-shared", "-fPIC", str(tmp_path / "other.cpp"), "-o", str(tmp_path / "other.so")], check=True)
    fresh.setenv(loader.LIBRARY_VARIABLE, str(tmp_path / "other.so"))
    found = load_quietly()
    assert found.handle is None and "rse_abi_version" in found.problem


def test_a_missing_library_named_by_the_environment_is_a_problem(fresh, tmp_path):
    fresh.setenv(loader.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    found = load_quietly()
    assert found.handle is None and loader.LIBRARY_VARIABLE in found.problem and "does not exist" in found.problem


@pytest.mark.parametrize("message", ["because of this", None])
def test_a_library_that_was_never_built_says_why(fresh, tmp_path, message):
    fresh.setattr(loader, "__file__", str(tmp_path / "loader.py"))
    if message:
        (tmp_path / build.PROBLEM_FILE).write_text(message + "\n")
    found = load_quietly()
    assert found.handle is None and found.path == tmp_path / build.library_name()
    assert found.problem == message if message else "there is no CPU library at" in found.problem


def test_the_problem_is_warned_of_once(fresh, tmp_path):
    fresh.setenv(loader.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = loader.load(), loader.load()
    assert first is second
    assert [str(warning.message) for warning in caught] == [f"rse-fast: {first.problem}"]


def test_a_unit_can_be_forced(stub, fresh):
    stub(loader.ABI_VERSION)
    fresh.setenv(loader.UNIT_VARIABLE, "baseline")
    assert loader.load().unit == "baseline"


@pytest.mark.parametrize("unit", ["avx512", "sse9"])
def test_a_forced_unit_that_is_not_there_is_an_error_each_time(stub, fresh, unit):
    stub(loader.ABI_VERSION)
    fresh.setenv(loader.UNIT_VARIABLE, unit)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"RSE_FAST_CPU_UNIT='{unit}' .*available here: avx2, baseline"):
            loader.load()


def test_a_forced_unit_that_the_library_refuses_is_an_error(stub, fresh):
    stub(loader.ABI_VERSION)
    fresh.setenv(loader.UNIT_VARIABLE, "avx2")  # the stub lists it and refuses it
    with pytest.raises(ValueError, match="RSE_FAST_CPU_UNIT='avx2' was refused"):
        loader.load()


def test_a_forced_unit_without_a_library_is_an_error(fresh, tmp_path):
    fresh.setenv(loader.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    fresh.setenv(loader.UNIT_VARIABLE, "baseline")
    with pytest.raises(ValueError, match="RSE_FAST_CPU_UNIT='baseline' .*none is available: RSE_FAST_CPU_LIBRARY"):
        loader.load()


def test_every_unit_of_this_machine_can_be_forced(compiler, run_python):
    units = loader.load().units
    for unit in units:
        done = run_python("-c", "from rse_fast.kernels.cpu import load; print(load().unit)", RSE_FAST_CPU_UNIT=unit)
        assert done.stdout.strip() == unit, done.stderr


def test_threads_share_one_library(stub, fresh):
    stub(loader.ABI_VERSION)
    opened, barrier, found = [], threading.Barrier(8), []
    plain = loader._open
    fresh.setattr(loader, "_open", lambda path: opened.append(path) or plain(path))

    def work():
        barrier.wait()
        found.append(loader.load())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1 and len(found) == 8 and all(library is found[0] for library in found)
