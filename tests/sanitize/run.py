"""``make sanitize``: the C++ library with AddressSanitizer and UndefinedBehaviorSanitizer, called with random arguments on every unit.

``python tests/sanitize/run.py [SEED [CASES]]`` builds the library and `sanitize.cpp` in build/sanitize, one file at a time, and runs it.
"""

import os
import secrets
import subprocess
import sys
from pathlib import Path

from rse_fast.kernels.cpu import build

ROOT = Path(__file__).parents[2]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def main(seed: str = "", cases: str = "2000") -> int:
    seed = seed or str(secrets.randbits(63))
    folder = ROOT / "build" / "sanitize"
    compiler = build.find_compiler()
    os.environ["CXX"] = " ".join([*compiler, *SANITIZERS])
    build.COMMON += ("-O1", "-g", "-fno-omit-frame-pointer")  # -O3 takes minutes a file with sanitizers
    library = build.build(folder, work=folder / "objects")
    program = folder / "sanitize"
    flags = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", build.OPENMP)
    source = Path(__file__).with_name("sanitize.cpp")
    command = [*compiler, *SANITIZERS, *flags, str(source), str(library), f"-Wl,-rpath,{folder}", "-o", str(program)]
    subprocess.run(command, check=True)
    print(f"to repeat these calls: {Path(sys.argv[0]).name} {seed} {cases}", flush=True)
    return subprocess.run([str(program), seed, cases]).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
