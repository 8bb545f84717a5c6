"""What several test files need: a compiler, and a fresh Python process."""

import os
import subprocess
import sys

import pytest

from rse_fast.kernels.cpu import build


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
def run_python():
    """``run_python(*args, cwd=None, **env)`` runs this Python and returns the finished process (text); RSE_FAST_* and CXX only from env."""

    def run(*args, cwd=None, **env):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RSE_FAST_") and name != "CXX"}
        return subprocess.run(
            [sys.executable, *map(str, args)], cwd=cwd, env={**inherited, **env}, capture_output=True, text=True, timeout=300
        )

    return run
