"""What pyproject.toml cannot say: `kernels/` becomes `rse_fast.kernels`, `bench/` `rse_fast.bench`, and the CPU library is built in.

Needs setuptools and ninja, neither torch nor numpy. Without a working compiler the installation still succeeds, as a pure-Python
wheel that says why it holds no library; with RSE_FAST_REQUIRE_LIBRARY=1 that is an error instead.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent.resolve()
CPU = Path("kernels") / "cpu"


def _load_builder():
    # By path: importing the package would run rse_fast/__init__.py, which needs torch.
    spec = importlib.util.spec_from_file_location("rse_fast_cpu_build", ROOT / CPU / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildLibrary(Command):
    """`build` sub-command: the library, or the reason why there is none, beside the modules of rse_fast.kernels.cpu."""

    description = "build the CPU library with ninja"
    user_options = []
    editable_mode = False  # set by setuptools for `pip install -e`: the library then goes beside the sources

    def initialize_options(self):
        self.build_lib = None
        self.build_temp = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))
        self.builder = _load_builder()
        self.directory = ROOT / CPU if self.editable_mode else Path(self.build_lib) / "rse_fast" / CPU

    def run(self):
        library, problem = self.directory / self.builder.library_name(), self.directory / self.builder.PROBLEM_FILE
        for stale in (library, problem):  # build/ outlives a build; what is found later must come from this one
            stale.unlink(missing_ok=True)
        try:
            self.builder.build(self.directory, work=Path(self.build_temp) / "rse_fast_cpu")
        except self.builder.BuildError as error:
            if os.environ.get("RSE_FAST_REQUIRE_LIBRARY") == "1":
                raise SystemExit(f"rse-fast: {error}\nRSE_FAST_REQUIRE_LIBRARY=1 makes this an error.") from None
            reason, _, details = str(error).partition("\n")
            if details:
                print(details, file=sys.stderr)
            advice = "see its messages with `pip install -v`" if details else "install a C++17 compiler (g++ or clang++) and ninja"
            text = (
                f"the CPU library was not built when rse-fast was installed: {reason}. Everything runs, more slowly, on the plain-torch "
                f"path; to get the library, {advice}, then reinstall rse-fast."
            )
            print(f"rse-fast: {text}", file=sys.stderr)
            self.directory.mkdir(parents=True, exist_ok=True)
            problem.write_text(text + "\n")
        self.distribution.library_built = library.exists()

    def get_source_files(self):
        return sorted(str(CPU / path.name) for path in (ROOT / CPU).iterdir() if path.suffix in (".cpp", ".h"))

    def get_outputs(self):
        names = (self.builder.library_name(), self.builder.PROBLEM_FILE)
        return [str(self.directory / name) for name in names if (self.directory / name).exists()]

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_library", None)]


class LibraryDistribution(Distribution):
    """Platform-specific exactly when a library was built."""

    library_built = False

    def has_ext_modules(self):
        return self.library_built or super().has_ext_modules()


class BdistWheel(bdist_wheel):
    def run(self):
        # Build first: only then is it known whether this wheel is of a platform.
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform  # the library is loaded by ctypes and knows no Python version


def packages():
    inner = [f"rse_fast.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))]
    return [*find_packages(str(ROOT), include=["rse_fast", "rse_fast.*"]), "rse_fast.bench", "rse_fast.kernels", *inner]


setup(
    packages=packages(),
    package_dir={"rse_fast": "rse_fast", "rse_fast.bench": "bench", "rse_fast.kernels": "kernels"},
    distclass=LibraryDistribution,
    cmdclass={"build": Build, "build_library": BuildLibrary, "bdist_wheel": BdistWheel},
)
