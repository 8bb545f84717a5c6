"""What several test files need: a compiler, a fresh Python process, each backend in turn, and inputs that differ from run to run."""

import contextlib
import os
import random
import subprocess
import sys

import entropy
import pytest
import torch

from rse_fast.kernels import cpu
from rse_fast.kernels.cpu import build


def pytest_addoption(parser):
    parser.addoption("--random-order", type=int, metavar="SEED", help="files, and the tests within each, in an order that SEED gives")


def pytest_collection_modifyitems(config, items):
    if (seed := config.getoption("--random-order")) is None:
        return
    shuffled, place = random.Random(seed), {}
    for item in sorted(items, key=lambda item: item.nodeid):  # the same for every process of a run
        place[item] = place.setdefault(item.path, shuffled.random()), shuffled.random()
    items.sort(key=place.get)


@pytest.fixture(scope="session")
def compiler():
    """The C++ compiler as an argument list. Without one the test is skipped, unless RSE_FAST_REQUIRE_LIBRARY=1 asks for one."""
    try:
        return build.find_compiler()
    except build.BuildError as error:
        if os.environ.get("RSE_FAST_REQUIRE_LIBRARY") == "1":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def built(compiler, tmp_path_factory):
    """The library from the project's sources and the folder of its objects, names with spaces and dollars in the path."""
    folder = tmp_path_factory.mktemp("out $x y")
    return build.build(folder / "library", work=folder / "objects"), folder / "objects"


@pytest.fixture(scope="session")
def run_python():
    """``run_python(*args, cwd=None, timeout=300, **env)`` runs this Python and returns the finished process (text).

    RSE_FAST_* and CXX come from env alone.
    """

    def run(*args, cwd=None, timeout=300, **env):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RSE_FAST_") and name != "CXX"}
        return subprocess.run(
            [sys.executable, *map(str, args)], cwd=cwd, env={**inherited, **env}, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture(scope="session")
def library():
    """The CPU library. Without one the test is skipped, unless RSE_FAST_REQUIRE_LIBRARY=1 asks for one."""
    found = cpu.load()
    if found.handle is None:
        (pytest.fail if os.environ.get("RSE_FAST_REQUIRE_LIBRARY") == "1" else pytest.skip)(found.problem)
    return found


@contextlib.contextmanager
def _in_use(unit, library):
    if unit not in library.units:
        pytest.skip(f"this library on this processor has no unit {unit}")
    assert library.handle.rse_select_unit(unit.encode()) == 0
    yield
    assert library.handle.rse_select_unit(library.unit.encode()) == 0


@pytest.fixture(params=list(build.UNITS))
def unit(request, library):
    """The name of each unit of the CPU library that this processor runs; it is in use for the test."""
    with _in_use(request.param, library):
        yield request.param


@pytest.fixture(params=["torch", *build.UNITS])
def backend(request):
    """The name of each backend; "cpu" once for each unit, which is in use for the test."""
    if request.param == "torch":
        yield "torch"
    else:
        with _in_use(request.param, request.getfixturevalue("library")):
            yield "cpu"


def pytest_fixture_setup(fixturedef, request):
    """What several tests share begins with generators of its own, too: it is made before the first of them, whichever that is."""
    if fixturedef.scope != "function":
        entropy.seeded(f"{request.node.nodeid}::{fixturedef.argname}")


@pytest.fixture(autouse=True)
def rng(request):
    """A numpy generator for inputs, all global generators seeded alike: new values at every run, the printed entropy repeats them."""
    print(f"to repeat these inputs: {entropy.VARIABLE}={entropy.ENTROPY}")
    return entropy.seeded(request.node.nodeid)


@pytest.fixture(params=["regenerated", "stored"])
def gradients_of_small_inputs(request, monkeypatch):
    """For tests of gradients, whose inputs are small: the noise is made again in backward, as for large ones, then as it is for them."""
    if request.param == "regenerated":
        monkeypatch.setattr("rse_fast.autograd.STORED", -1)


@pytest.fixture
def one_thread():
    """For tests of many small tensors: waking other threads would cost more than it brings, above all on busy machines."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_cache_elsewhere(monkeypatch, tmp_path_factory):
    """For tests that read data sets: they never touch the user's cache."""
    monkeypatch.delenv("RSE_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
