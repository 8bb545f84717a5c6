"""Random inputs: a failing test prints one number that repeats them, whichever tests run before it, also what the tests of a file share."""

import os
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
FILE = """
import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def shared():
    return [np.random.rand(), torch.rand(()).item()]


def test_before():
    torch.rand(5)


@pytest.mark.parametrize("case", [1, 2])
def test_it(case, shared, rng):
    assert False, ["inputs", case, rng.random(), torch.rand(()).item(), np.random.rand(), *shared]
"""


def test_the_printed_number_repeats_the_inputs_of_a_test_alone(run_python, tmp_path):
    (tmp_path / "test_random.py").write_text(FILE)

    def inputs(name, entropy=""):
        options = ["-p", "conftest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", ".", "--tb", "line"]
        path = os.pathsep.join([str(TESTS), str(TESTS / "helpers"), os.environ.get("PYTHONPATH", "")])
        done = run_python("-m", "pytest", *options, "-rA", name, cwd=tmp_path, PYTHONPATH=path, RSE_FAST_TEST_ENTROPY=entropy)
        numbers = set(re.findall(r"RSE_FAST_TEST_ENTROPY=(\d+)", done.stdout))
        return dict(re.findall(r"AssertionError: \['inputs', (\d), (.*)\]$", done.stdout, re.M)), numbers

    whole, (number,) = inputs("test_random.py")
    assert whole.keys() == {"1", "2"} and whole["1"] != whole["2"]
    assert inputs("test_random.py::test_it[2]", number) == ({"2": whole["2"]}, {number})
    other, _ = inputs("test_random.py")
    assert other["1"] != whole["1"]
