"""What gets installed: the wheel with and without a compiler, the sdist, and what an import brings along."""

import json
import re
import shlex
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from rse_fast.kernels.cpu import build

ROOT = Path(__file__).parents[2]
LIBRARY = f"rse_fast/kernels/cpu/{build.library_name()}"
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
PROBLEM = f"rse_fast/kernels/cpu/{build.PROBLEM_FILE}"


@pytest.fixture(scope="module")
def blocked(tmp_path_factory):
    """A folder for PYTHONPATH in which torch and numpy cannot be imported, as in an isolated build."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in ("torch", "numpy"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} must not be needed to build')\n")
    return folder


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources without anything built."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*.dll", build.PROBLEM_FILE)
    folder = tmp_path / "a checkout"
    for name in ("rse_fast", "kernels", "bench", "docs", "examples", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "constraints.txt", "Makefile", "mkdocs.yml"):
        shutil.copy(ROOT / name, folder)
    for path in ROOT.glob("*.md"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def make(checkout, blocked, run_python, tmp_path):
    """``make("wheel" or "sdist", **env)``: what the build backend writes (None if it failed), and all its output."""

    def run(kind, **env):
        out = tmp_path / kind
        code = f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"
        out.mkdir()
        done = run_python("-c", code, cwd=checkout, PYTHONPATH=str(blocked), **env)
        files = list(out.iterdir())
        assert (done.returncode == 0) == bool(files), done.stdout + done.stderr
        return (files[0] if files else None), done.stdout + done.stderr

    return run


def python_modules():
    """Every module of the project, by its place in a wheel."""
    modules = [path.relative_to(ROOT) for folder in ("rse_fast", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")]
    return {(Path("rse_fast") / path if path.parts[0] != "rse_fast" else path).as_posix() for path in modules}


def unpack(wheel):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "unpacked")
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("dist-info/WHEEL"))
        return wheel.parent / "unpacked", set(archive.namelist()), metadata


@pytest.fixture
def hasty(compiler, tmp_path):
    """``CXX`` for a build whose speed is of no matter: the compiler, told not to optimise."""
    script = tmp_path / "hasty"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@" -O0\n')
    script.chmod(0o755)
    return shlex.quote(str(script))


def test_wheel_holds_the_library_and_works_from_anywhere(hasty, make, run_python, tmp_path):
    wheel, output = make("wheel", RSE_FAST_REQUIRE_LIBRARY="1", CXX=hasty)
    assert wheel is not None, output
    folder, names, metadata = unpack(wheel)
    tag = wheel.name.removeprefix(f"rse_fast-{VERSION}-").removesuffix(".whl")
    assert tag.startswith("py3-none-") and tag != "py3-none-any"
    assert "Root-Is-Purelib: false" in metadata
    assert python_modules() <= names
    assert LIBRARY in names and PROBLEM not in names
    strays = [
        name for name in names if not name.startswith(("rse_fast/", f"rse_fast-{VERSION}.dist-info/")) or name.endswith((".cpp", ".h"))
    ]
    assert strays == []

    done = run_python("-m", "rse_fast.cli", "bench", "--help", cwd=tmp_path, PYTHONPATH=str(folder))
    assert done.returncode == 0 and "--compare-ref" in done.stdout, done.stderr

    code = "from rse_fast.kernels.cpu import load; found = load(); print(found.path); print(found.unit)"
    done = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(folder))
    path, unit = done.stdout.splitlines()
    assert Path(path) == folder / LIBRARY and unit in build.UNITS, done.stderr


@pytest.mark.parametrize("how", ["CXX", "PATH"])
def test_without_a_compiler_the_install_succeeds_and_says_so_once(how, make, run_python, tmp_path):
    (tmp_path / "empty").mkdir()
    without = {"CXX": {"CXX": "/nonexistent/c++"}, "PATH": {"PATH": str(tmp_path / "empty")}}[how]
    wheel, output = make("wheel", **without)
    assert wheel is not None, output
    assert wheel.name == f"rse_fast-{VERSION}-py3-none-any.whl"
    folder, names, metadata = unpack(wheel)
    assert "Root-Is-Purelib: true" in metadata
    assert python_modules() <= names and PROBLEM in names and LIBRARY not in names
    assert output.count("rse-fast: the CPU library was not built") == 1
    reason = {"CXX": "the C++ compiler named by CXX, '/nonexistent/c++', was not found", "PATH": "no C++ compiler was found"}[how]
    assert reason in output and reason in (folder / PROBLEM).read_text()

    # Installed so, the noise comes from plain torch, with one warning; the C++ backend asked for by name is an error.
    code = """
import torch, rse_fast
x = torch.zeros(2, 3, 5)
for _ in range(2):
    y = rse_fast.functional.add_noise(x, 0.1, seed=7)
assert torch.equal(y, rse_fast.functional.add_noise(x, 0.1, seed=7, backend="torch"))
assert y.count_nonzero() == y.numel()
try:
    rse_fast.functional.add_noise(x, 0.1, seed=7, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    done = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1 and reason in done.stderr
    assert "backend 'cpu' is not available" in done.stdout and reason in done.stdout

    done = run_python("-m", "rse_fast.cli", "doctor", "--json", cwd=tmp_path, PYTHONPATH=str(folder))
    found = json.loads(done.stdout)
    assert reason in found["cpu_library"]["problem"] and found["backends"]["cpu"] == {"backend": "torch", "unit": None}


def test_a_compiler_that_fails_is_reported_with_its_words(compiler, checkout, make):
    (checkout / "kernels/cpu/add_noise.cpp").write_text("this is not C++\n")
    wheel, output = make("wheel")
    assert wheel is not None and wheel.name.endswith("py3-none-any.whl")
    assert output.count("rse-fast: the CPU library was not built") == 1
    assert "add_noise.cpp:1" in output  # the compiler's own message


def test_a_library_built_earlier_is_not_shipped_by_a_build_that_failed(checkout, make):
    stale = checkout / "build/lib" / LIBRARY
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"stale")
    wheel, output = make("wheel", CXX="/nonexistent/c++")
    assert LIBRARY not in zipfile.ZipFile(wheel).namelist(), output


def test_type_checkers_find_the_annotations(make):
    wheel, output = make("wheel", CXX="/nonexistent/c++")
    assert wheel is not None, output
    assert "rse_fast/py.typed" in unpack(wheel)[1]


def test_one_version_stands_everywhere():
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == VERSION
    assert re.search(r"^## ([0-9.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == VERSION


def test_the_library_can_be_required(make):
    wheel, output = make("wheel", CXX="/nonexistent/c++", RSE_FAST_REQUIRE_LIBRARY="1")
    assert wheel is None
    assert "RSE_FAST_REQUIRE_LIBRARY=1" in output and "/nonexistent/c++" in output


def test_sdist_is_complete(make):
    sdist, output = make("sdist")
    assert sdist is not None, output
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    folders = [ROOT / name for name in ("rse_fast", "kernels", "bench")]
    sources = [path for folder in folders for end in ("*.py", "*.cpp", "*.c", "*.h") for path in folder.rglob(end)]
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    assert {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "DESIGN.md", "README.md", "Makefile"} <= names
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml", "rse_fast/py.typed", "docs/index.md", "docs/assets/front.png"} <= names
    assert not [name for name in names if name.endswith((".so", ".dylib", ".dll", build.PROBLEM_FILE))]
    assert sdist.stat().st_size < 1_000_000


def test_import_brings_nothing_heavy_and_opens_nothing(run_python):
    code = """
import sys, torch
before = set(sys.modules)
import rse_fast, rse_fast.kernels.cpu.loader
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "scipy", "matplotlib", "PIL", "sklearn", "foolbox", "rich", "tqdm"}))
print(torch.cuda.is_initialized(), rse_fast.kernels.cpu.loader._library)
"""
    done = run_python("-c", code)
    assert done.stdout.splitlines() == ["[]", "False None"], done.stderr


def test_import_works_where_the_extras_are_missing(run_python):
    code = """
import sys
for name in ("triton", "scipy", "matplotlib", "PIL", "sklearn", "foolbox", "rich", "tqdm"):
    sys.modules[name] = None  # an import of it raises ImportError
import torch, rse_fast
print(rse_fast.functional.add_noise(torch.zeros(1, 4), 0.1, seed=1).shape)
"""
    done = run_python("-c", code)
    assert done.stdout.strip() == "torch.Size([1, 4])", done.stderr
