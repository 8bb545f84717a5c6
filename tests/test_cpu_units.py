"""The units of the CPU library: each can be forced, and none holds an instruction of a higher set.

The second is read off the objects (one for each unit): the first bytes of an instruction after its prefixes say which encoding it
has, whatever its name. VEX came with AVX and EVEX with AVX-512, so neither may stand in code that every processor runs.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch

from rse_fast import functional, reference
from rse_fast.kernels.cpu import build

needs_binutils = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("nm") or not shutil.which("objdump"), reason="reads ELF objects with binutils"
)
needs_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86-64 instruction sets")

# ------------------------------------------------------------------------------------------------------------------- forced by name
NOISE = """
import json, torch
from rse_fast import functional
from rse_fast.kernels import cpu

noise = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for x in (torch.zeros(2, 5, 37), torch.zeros(2, 8, 3, 40), torch.zeros(2, 8, 3, 40).to(memory_format=torch.channels_last)):
        y = functional.add_noise(x.to(dtype), 1.0, seed=-7, stream=2**32 - 1, images=2, draws=2, image0=3, draw0=9, backend="cpu")
        noise.append(y.contiguous().float().flatten().tolist())
print(json.dumps([cpu.load().unit, noise]))
"""


def test_a_unit_forced_by_the_environment_computes_the_noise(unit, run_python):
    done = run_python("-c", NOISE, RSE_FAST_CPU_UNIT=unit)
    assert done.returncode == 0, done.stderr
    used, noise = json.loads(done.stdout)
    assert used == unit
    here = {}
    exec(NOISE.replace("print", "str"), here)  # this process has the unit selected by hand: the same bits
    assert noise == here["noise"]
    for values, shape in zip(noise[:3], ((5, 37), (8, 120), (8, 120)), strict=True):
        eps = reference.gaussian(-7, 2**32 - 1, 2, 2, *shape, image0=3, draw0=9).transpose(0, 2, 1)
        assert np.abs(np.array(values) - eps.ravel()).max() <= 1e-6


def test_units_differ_by_roundings_only(library):
    x = torch.zeros(4, 64, 200)
    results = {}
    try:
        for name in library.units:
            assert library.handle.rse_select_unit(name.encode()) == 0
            results[name] = functional.add_noise(x, 1.0, seed=8, backend="cpu")
    finally:
        library.handle.rse_select_unit(library.unit.encode())
    for name, y in results.items():
        assert (y - results["baseline"]).abs().max() <= 2e-6, name
    if {"avx2", "avx512"} <= set(library.units):  # and they are not one unit under several names
        assert not torch.equal(results["avx2"], results["baseline"]) and not torch.equal(results["avx2"], results["avx512"])


def test_an_unknown_unit_is_an_error_and_nothing_changes(library, run_python):
    assert library.handle.rse_select_unit(b"avx1024") == -1
    assert library.handle.rse_active_unit().decode() == library.unit
    done = run_python("-c", NOISE, RSE_FAST_CPU_UNIT="avx1024")
    assert done.returncode != 0 and re.search(r"ValueError: RSE_FAST_CPU_UNIT='avx1024' .*baseline", done.stderr)


# --------------------------------------------------------------------------------------------------------------- what objects hold
Instruction = namedtuple("Instruction", "function encoding name operands")


def tool(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def instructions(path):
    """The instructions of an object file, each with the function it stands in and its encoding: "legacy", "VEX", "EVEX" or "FP16"."""
    function = None
    for line in tool("objdump", "-d", "-w", path).splitlines():
        if label := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = label[1]
        elif match := re.fullmatch(r"\s*[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t(\S+)\s*(.*)", line):
            code = bytes.fromhex(match[1])
            code = code.lstrip(b"\x66\xf2\xf3\xf0\x2e\x36\x3e\x26\x64\x65\x67")
            encoding = {0xC4: "VEX", 0xC5: "VEX", 0x62: "EVEX"}.get(code[0], "legacy")  # in 64-bit code these bytes mean nothing else
            if encoding == "EVEX" and code[1] & 7 > 3:
                encoding = "FP16"  # opcode maps 5 and 6
            name, operands = match[2], match[3]
            while name in ("rep", "repz", "repnz", "lock", "data16", "bnd", "notrack", "cs", "ds", "es", "ss", "fs", "gs"):
                name, _, operands = operands.partition(" ")
            yield Instruction(function, encoding, name, operands)


# What x86-64 does not promise every processor, by name: in the legacy encoding, then in the other two.
_SSE3_AND_LATER = re.compile(
    r"h(add|sub)p[sd]|addsubp[sd]|mov(ddup|s[hl]dup)|lddqu|p(abs|h(add|sub)|shufb|alignr|maddubs|mulhrs|sign)\w*|round[ps][sd]|d?pp[sd]"
    r"|blendv?p[sd]|p(blend|insr[bdq]|extr[bdq]|mov[sz]x|m(in|ax)(s[bd]|u[wd])|mulld|muldq|packusdw|cmp(eq|gt)q|test|cmp[ei]str)\w*"
    r"|insertps|extractps|mpsadbw|movntdqa|crc32\w*|popcnt\w*|lzcnt\w*|tzcnt\w*|movbe\w*|aes\w+|sha\w+|pclmul\w*|gf2p8\w+|ad[co]x\w*"
)
_BEYOND_F_BW_DQ_VL = re.compile(
    r"v(p(erm([it]2)?b|multishiftqb|(compress|expand)[bw]|sh[lr]dv?[wdq]|dp(bu|ws?)\w+|popcnt\w+|shufbitqmb|madd52\w+|conflict\w+|lzcnt\w+"
    r"|broadcastm\w+|clmul\w+)|exp2\w+|rcp28\w+|rsqrt28\w+|(cvtne|dpbf16|gf2p8|aes)\w+)"
)
_BF16 = re.compile(r"vcvtne2?ps2?\w*bf16\w*|vdpbf16ps")


def beyond(unit, instruction):
    """Why the instruction may not stand in the unit, or None."""
    _, encoding, name, operands = instruction
    if encoding == "legacy":
        return "an extension of SSE2" if _SSE3_AND_LATER.fullmatch(name) else None
    if unit in ("baseline", "dispatch"):
        return f"{encoding} encoding"
    if unit == "avx2":
        if encoding != "VEX" or re.search(r"%zmm|%k\d|%[xy]mm(1[6-9]|[23]\d)", operands):
            return "AVX-512"
        known = name.startswith("v") and not re.fullmatch(r"v(pdp|pmadd52|aes|gf2p8|pclmul|cvtne)\w+", name)
        return None if known else "beyond AVX2, FMA and F16C"
    if encoding == "FP16" or not name.startswith(("v", "k")):  # the latter is BMI
        return "beyond AVX-512"
    if unit == "avx512bf16" and _BF16.fullmatch(name):
        return None
    return "beyond AVX-512 F, BW, DQ and VL" if _BEYOND_F_BW_DQ_VL.fullmatch(name) else None


def leaks(unit, path):
    found = ((beyond(unit, instruction), instruction) for instruction in instructions(path))
    return [f"{why}: {i.name} {i.operands} in {i.function}" for why, i in found if why]


def shared(path):
    """Symbols that the linker would merge with their namesakes in other objects."""
    symbols = (line.rsplit(maxsplit=2) for line in tool("nm", "--defined-only", path).splitlines())
    return [name for *_, kind, name in symbols if kind in "WwVvuC"]


@needs_binutils
@needs_x86
def test_no_instruction_of_a_higher_set_in_a_lower_unit(built):
    objects = {path.stem: path for path in built[1].glob("*.o")}
    assert {"baseline", "avx2", "avx512", "dispatch"} <= set(objects)
    for unit, path in objects.items():
        code = list(instructions(path))
        assert len(code) > 100 and all(i.function for i in code)
        assert leaks(unit, path) == [], unit
    functions = {i.function for i in instructions(objects["avx2"])}
    assert {"_ZN3rse14add_noise_avx2ERKNS_4TaskEll", "_ZN3rse11sample_avx2ERKNS_6SampleE"} <= functions


@needs_binutils
@needs_x86
def test_the_check_finds_what_it_looks_for(built, compiler, tmp_path):
    objects = built[1]
    for lower, higher, why in (
        ("baseline", "avx2", "VEX encoding"),
        ("baseline", "avx512", "EVEX encoding"),
        ("dispatch", "avx512", "EVEX encoding"),
        ("avx2", "avx512", "AVX-512"),
    ):
        found = leaks(lower, objects / f"{higher}.o")
        assert any(leak.startswith(f"{why}: ") for leak in found), (lower, higher)
    assert any("zmm" in leak and "rse" in leak for leak in leaks("avx2", objects / "avx512.o"))
    if (objects / "avx512bf16.o").exists():
        found = leaks("avx512", objects / "avx512bf16.o")
        assert found and all(re.search(": vcvtne2?ps2bf16 ", leak) for leak in found)
    # What a flag on a whole target does, in each direction that the objects above do not show.
    body = (
        "inline int shared(int* a) { static int calls; int s = ++calls; for (int i = 0; i < 999; ++i) s += a[i] * a[i]; return s; }\n"
        "int (*use)(int*) = shared; int f(unsigned long x) { return __builtin_popcountl(x); }\n"
        "unsigned g(unsigned a, unsigned b) { return a & ~b; }\n"
    )
    (tmp_path / "probe.cpp").write_text(body)
    for flags, unit, name in ((("-msse4.2", "-mpopcnt"), "baseline", "p(mulld|opcnt)"), (("-mavx2", "-mbmi"), "avx2", "andn")):
        path = tmp_path / f"{unit}.o"
        subprocess.run([*compiler, "-O3", *flags, "-c", str(tmp_path / "probe.cpp"), "-o", str(path)], check=True)
        assert any(re.search(f": {name}", leak) for leak in leaks(unit, path)), unit
        assert any("shared" in symbol for symbol in shared(path))


@needs_binutils
def test_units_share_no_symbol(built):
    # A weak symbol (an inline function, a template, its static variable) is kept once, and possibly in its AVX-512 form.
    defined = []
    for name in build.UNITS:
        path = built[1] / f"{name}.o"
        if not path.exists():
            continue
        assert shared(path) == [], name
        symbols = [line.split()[-2:] for line in tool("nm", "--defined-only", "--extern-only", path).splitlines()]
        assert {kind for kind, _ in symbols} == {"T"} and len(symbols) == 2, (name, symbols)
        defined += [symbol for _, symbol in symbols]
    assert len(defined) == len(set(defined)) >= 2
