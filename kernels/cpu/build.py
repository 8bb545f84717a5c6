"""Builds the CPU library with ninja. Standard library only, so it runs inside an isolated build: ``python kernels/cpu/build.py --out DIR``.

Each kernel (`KERNELS`) is compiled once per instruction set ("unit") into one object each, `dispatch.cpp` once with the baseline's flags;
all objects are linked into one library, which picks a unit by cpuid when it is loaded. Only a unit's own object gets its ``-m``
flags: a flag on the whole target would put such instructions into code that every processor runs.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

# What a unit adds to COMMON. CXXFLAGS is not read: a ``-march`` in it would leak one unit's instructions into the baseline.
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
UNITS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": _AVX512,
    "avx512bf16": (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
}
COMMON = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
# Every path through a unit must round alike, whatever the compiler could fuse (see madd in vec.h).
COMMON += ("-ffp-contract=off",)
# GCC's own AVX-512 headers read an undefined vector on purpose, and older versions warn of it at every inlined use.
COMMON += ("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
OPENMP = "-fopenmp"
# GCC orders instructions after it has given them registers, which chains what shares one. Ordered before as well, the normals of a block
# overlap with the words of the next: 1.35 times the normals in the baseline unit, 1.5 times in AVX2. A compiler that does not know the
# flags does without. A product that fills the registers is spilled by the same order.
ORDER = ("-fschedule-insns", "-fsched-pressure", "--param=sched-pressure-algorithm=2")
KERNELS = {"add_noise": ORDER, "filters": (), "winograd": ()}

# Left beside the modules when there is no library: the reason, which the loader and `rse-fast doctor` repeat.
PROBLEM_FILE = "library_problem.txt"


class BuildError(Exception):
    """The library could not be built; the text is one sentence saying why, the compiler's own words may follow on further lines."""


def library_name() -> str:
    """File name of the library on this platform."""
    return "librse_fast_cpu" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def find_compiler() -> list[str]:
    """The C++ compiler as an argument list: ``CXX`` if set (never anything else then), or else the first of c++, g++, clang++."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise BuildError(f"the C++ compiler named by CXX, {command[0]!r}, was not found")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler was found (looked for $CXX, c++, g++ and clang++)")


def find_ninja() -> str:
    """Path of ninja: on PATH, or where the running interpreter keeps its scripts (an environment that is not activated)."""
    path = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if path is None:
        raise BuildError("ninja was not found (pip install ninja)")
    return path


def _accepts(compiler: list[str], flags: tuple[str, ...], body: str, work: Path, link: bool = False) -> bool:
    """Whether the compiler takes the flags and compiles (or links into a shared library) the given text without an error."""
    source = work / "probe.cpp"
    source.write_text(body)
    mode = ("-shared", "-fPIC") if link else ("-c",)
    command = [*compiler, "-std=c++17", *flags, *mode, str(source), "-o", str(work / "probe.out")]
    return subprocess.run(command, capture_output=True).returncode == 0


def supported_units(compiler: list[str], work: Path) -> list[str]:
    """The units that this compiler, for its target, can build. The macros are asked for because some compilers only warn."""

    def body(flags):
        return "".join(f"#ifndef __{flag[2:].upper()}__\n#error {flag}\n#endif\n" for flag in flags) + "int probe() { return 0; }\n"

    return [name for name, flags in UNITS.items() if not flags or _accepts(compiler, flags, body(flags), work)]


def unit_flags(kernel: str, unit: str, compiler: list[str], work: Path) -> tuple[str, ...]:
    """What the compiler is given for a kernel in a unit beside COMMON. ``work`` is a folder for a trial."""
    flags = KERNELS[kernel]
    return UNITS[unit] + (flags if _accepts(compiler, ("-O3", "-Werror", *flags), "int probe() { return 0; }\n", work) else ())


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(compiler: list[str], source: Path, work: Path, library: Path) -> Path:
    """Writes ``work/build.ninja``: one compile edge per kernel and unit, one for the dispatcher, one link edge."""
    openmp = "#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"
    threads = (OPENMP,) if _accepts(compiler, (OPENMP,), openmp, work, link=True) else ()
    units = supported_units(compiler, work)
    quoted = " ".join(shlex.quote(part).replace("$", "$$") for part in compiler)
    common = " ".join((*COMMON, *threads))
    lines = [
        "rule compile",
        f"  command = {quoted} {common} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {quoted} -shared {' '.join(threads)} $in -o $out",
        "  description = link $out",
    ]
    objects = []
    have = " ".join(f"-DRSE_HAVE_{name.upper()}" for name in units)
    edges = [("dispatch", "dispatch.cpp", have)]
    for unit in units:
        for kernel in KERNELS:
            flags = " ".join((*unit_flags(kernel, unit, compiler, work), f"-DRSE_UNIT={unit}"))
            edges.append((f"{kernel}.{unit}", f"{kernel}.cpp", flags))
    for name, file, flags in edges:
        objects.append(f"{name}.o")
        lines += [f"build {name}.o: compile {_ninja_path(source / file)}", f"  flags = {flags}"]
    lines += [f"build {_ninja_path(library)}: link {' '.join(objects)}", f"default {_ninja_path(library)}", ""]
    ninja_file = work / "build.ninja"
    ninja_file.write_text("\n".join(lines))
    return ninja_file


def build(out: Path, source: Path | None = None, work: Path | None = None) -> Path:
    """Builds the library into directory ``out`` and returns its path.

    ``source`` holds the C++ files (default: beside this file); ``work`` keeps objects and build.ninja (default: a temporary
    directory; a kept one makes the next build incremental). Raises BuildError with one clear sentence.
    """
    source = Path(source or Path(__file__).parent).resolve()
    library = Path(out).resolve() / library_name()
    compiler, ninja = find_compiler(), find_ninja()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        write_ninja(compiler, source, work, library)
        done = subprocess.run([ninja, "-C", str(work)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        raise BuildError(f"the C++ compiler {shlex.join(compiler)} failed\n{done.stdout[-4000:].strip()}")
    return library


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="build the CPU library of rse-fast")
    parser.add_argument("--out", type=Path, required=True, help="directory the library goes to")
    parser.add_argument("--work", type=Path, help="directory for objects, kept for the next build (default: a temporary one)")
    args = parser.parse_args(argv)
    try:
        print(build(args.out, work=args.work))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
