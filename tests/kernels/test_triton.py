"""The Triton kernels without a GPU. Interpreting and compiling need processes of their own: an interpreted function cannot be compiled.

Each test function of these processes is a test here.
"""

import ast
import importlib.util
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rse_fast

KERNELS = Path(rse_fast.__file__).parents[1] / "kernels" / "triton"
HERE = Path(__file__).parent / "triton"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="triton is not installed here",
)


@pytest.fixture(scope="module")
def proof(run_python, tmp_path_factory):
    """Runs each test file of one kind in a fresh process, two at a time; returns (finished process by file, forms of kernels launched)."""

    def run(kind, **env):
        folder = tmp_path_factory.mktemp(kind)
        files = sorted(HERE.glob(f"{kind}_*.py"), key=lambda file: -file.stat().st_size)
        assert files

        def one(file):
            record = folder / file.stem
            options = dict(RSE_FAST_TEST_LAUNCHED=str(record), OMP_NUM_THREADS="1", **env)
            done = run_python("-m", "pytest", "-v", file, timeout=1200, **options)
            return done, record.read_text().splitlines() if record.exists() else []

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(one, files))
        processes = {file.name: done for file, (done, _) in zip(files, found, strict=True)}
        return processes, {form for _, forms in found for form in forms}

    return run


@pytest.fixture(scope="module")
def interpreted(proof):
    return proof("kernel", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(proof):
    return proof("compile")


def kernels_in_the_sources() -> set:
    """Names of the functions under @triton.jit that are called ``*_kernel``, read from the text."""
    found = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                if node.name.endswith("_kernel"):
                    found.add(node.name)
    return found


def inner_tests(kind: str) -> list:
    """(file, test function) of the test files of one kind, read from the text."""
    functions = ((path, node) for path in sorted(HERE.glob(f"{kind}_*.py")) for node in ast.parse(path.read_text()).body)
    return [
        pytest.param(path.name, node.name, id=f"{path.stem}-{node.name}")
        for path, node in functions
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def check(done, name: str) -> None:
    """Every case of the test ``name`` has run in the finished process, and none has failed."""
    verdicts = re.findall(rf"::{name}(?:\[.*\])? (PASSED|SKIPPED|FAILED|ERROR)", done.stdout)
    assert verdicts and set(verdicts) <= {"PASSED", "SKIPPED"}, done.stdout[-8000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize(("file", "name"), inner_tests("kernel"))
def test_in_the_interpreter(file, name, interpreted):
    check(interpreted[0][file], name)


@needs_triton
@pytest.mark.parametrize(("file", "name"), inner_tests("compile"))
def test_ahead_of_time(file, name, compiled):
    check(compiled[0][file], name)


@needs_triton
def test_every_kernel_and_form_is_interpreted_and_compiled(interpreted, run_python):
    """A kernel, a dtype of its operand or an option that lacks one of the proofs fails here, whoever adds it.

    That each has a row for every target is in tests/kernels/triton/compile_kernels.py.
    """
    kernels = kernels_in_the_sources()
    assert len(kernels) >= 5
    code = "from conftest import forms; from rse_fast.kernels.triton import aot;"
    code += "print(*sorted({form for case in aot.cases() for form in forms(case.kernel.__name__, case.arguments)}), sep='\\n')"
    listed = run_python("-c", code, cwd=HERE)
    compiled = set(listed.stdout.splitlines())
    assert kernels - compiled == set(), f"no case in aot.py {listed.stderr}"
    assert kernels - interpreted[1] == set(), "never launched in the interpreter"
    assert compiled == {form for form in interpreted[1] if form.split()[0] in kernels}, "in one proof only"


def test_launched_functions_are_called_kernels():
    """What is subscripted with a grid is a kernel by name, so that the rule above reaches it."""
    for path in KERNELS.glob("*.py"):
        tree = ast.parse(path.read_text())
        jitted = {
            n.name
            for n in ast.walk(tree)
            if isinstance(n, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in n.decorator_list)
        }
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name):
                name = call.func.value.id
                assert name not in jitted or name.endswith("_kernel"), (path.name, name)


def test_nothing_imports_triton_before_a_kernel_runs(run_python):
    code = (
        "import sys; sys.modules['triton'] = None; import torch, rse_fast; from rse_fast import functional;"
        "functional.add_noise(torch.zeros(2, 3), 0.1, seed=1); print('fine')"
    )
    done = run_python("-c", code)
    assert done.stdout.strip() == "fine", done.stderr


def test_the_named_backend_never_falls_back():
    import torch

    from rse_fast import functional

    x = torch.zeros(2, 3, 4, 4)
    for call in (
        lambda **options: functional.add_noise(x, 0.1, seed=1, **options),
        lambda **options: functional.noisy_conv2d(x, torch.zeros(4, 3, 3, 3), None, 0.1, seed=1, **options),
        lambda **options: functional.noisy_linear(x, torch.zeros(5, 4), None, 0.1, seed=1, **options),
    ):
        with pytest.raises(ValueError, match="backend 'triton' needs tensors on a CUDA device from sm_80 on or a ROCm device, got cpu"):
            call(backend="triton")
    with pytest.raises(TypeError, match="backend 'triton' takes float32, bfloat16 or float16, got torch.float64"):
        functional.add_noise(x.double(), 0.1, seed=1, backend="triton")
