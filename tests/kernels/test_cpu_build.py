"""kernels/cpu/build.py: an object for each kernel and unit, no instruction of a higher set in it, one library, what a failure says.

Instructions are read off the objects: the first bytes of one after its prefixes say which encoding it has, whatever its name. VEX came with
AVX and EVEX with AVX-512, so neither may stand in code that every processor runs.
"""

import itertools
import platform
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from rse_fast.kernels.cpu import build, load

X86 = platform.machine().lower() in ("x86_64", "amd64")
needs_x86 = pytest.mark.skipif(not X86, reason="x86-64 instruction sets")
needs_binutils = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("nm") or not shutil.which("objdump"), reason="reads ELF objects with binutils"
)


def tool(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def test_the_installed_library_is_there_and_runs(compiler):
    found = load()
    assert found.problem is None
    assert found.unit in found.units and set(found.units) <= set(build.UNITS) and found.units[-1] == "baseline"


@needs_binutils
def test_one_object_per_kernel_and_unit(built):
    units = build.supported_units(build.find_compiler(), built[1])
    assert {path.stem for path in built[1].glob("*.o")} == {"dispatch", *(f"{kernel}.{unit}" for kernel in build.KERNELS for unit in units)}
    assert {"baseline", *(["avx2", "avx512"] if X86 else [])} <= set(units)


@needs_binutils
def test_the_library_exports_the_c_interface_only(built):
    defined = {line.split()[-1].partition("@")[0] for line in tool("nm", "-D", "--defined-only", built[0]).splitlines()}
    assert {"rse_abi_version", "rse_units", "rse_active_unit", "rse_select_unit", "rse_add_noise", "rse_winograd"} <= defined
    assert [name for name in defined if not name.startswith("rse_")] == []


def test_a_second_build_in_the_same_folder_compiles_only_what_changed(built):
    library, objects = built
    before = {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}
    library.unlink()
    assert build.build(library.parent, work=objects) == library and library.exists()
    assert {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")} == before


def test_units_that_the_compiler_does_not_know_are_left_out(compiler, monkeypatch, tmp_path):
    monkeypatch.setitem(build.UNITS, "avx9", ("-mavx9",))
    units = build.supported_units(build.find_compiler(), tmp_path)
    assert "avx9" not in units and "baseline" in units


def test_an_order_of_instructions_is_asked_only_of_a_compiler_that_knows_the_flag(compiler, monkeypatch, tmp_path):
    for flag, taken in (("-fno-such-order-of-instructions", ()), ("-O2", ("-O2",))):
        monkeypatch.setitem(build.KERNELS, "add_noise", (flag,))
        assert build.unit_flags("add_noise", "avx2", compiler, tmp_path) == build.UNITS["avx2"] + taken


def test_cxx_is_the_only_candidate_if_set(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    with pytest.raises(build.BuildError, match="CXX, '/nonexistent/c\\+\\+', was not found"):
        build.find_compiler()


def test_cxx_may_carry_arguments(compiler, monkeypatch):
    path = shutil.which(compiler[0])
    monkeypatch.setenv("CXX", f"{path} -pipe")
    assert build.find_compiler() == [path, "-pipe"]


def test_a_broken_source_names_the_compiler_and_repeats_its_message(compiler, tmp_path):
    for name in (*build.KERNELS, "dispatch"):
        (tmp_path / f"{name}.cpp").write_text("#error of this test\n")
    with pytest.raises(build.BuildError, match="failed\n(.|\n)*of this test"):
        build.build(tmp_path / "out", source=tmp_path)
    assert not (tmp_path / "out" / build.library_name()).exists()


def test_runs_as_a_script_without_the_package(run_python, tmp_path):
    script = Path(build.__file__)
    done = run_python("-I", script, "--out", tmp_path, CXX="/nonexistent/c++")
    assert done.returncode == 1
    assert done.stderr == "error: the C++ compiler named by CXX, '/nonexistent/c++', was not found\n"


# --------------------------------------------------------------------------------------------------------------- what objects hold
Instruction = namedtuple("Instruction", "function encoding name operands")


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
_BF16 = re.compile(r"vcvtne2?ps2?\w*bf16\w*|vdpbf16ps|vpdpbusd")  # and VNNI, which every processor with BF16 has


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
    assert {"add_noise.baseline", "add_noise.avx2", "winograd.avx512", "dispatch"} <= set(objects)
    for name, path in objects.items():
        code = list(instructions(path))
        assert len(code) > 100 and all(i.function for i in code)
        assert leaks(name.rpartition(".")[2], path) == [], name
    functions = {i.function for i in instructions(objects["add_noise.avx2"])}
    assert {"_ZN3rse14add_noise_avx2ERKNS_4TaskEll", "_ZN3rse11sample_avx2ERKNS_6SampleE"} <= functions
    assert "_ZN3rse13winograd_avx2ERKNS_11ConvolutionEPfll" in {i.function for i in instructions(objects["winograd.avx2"])}


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
        for kernel in build.KERNELS:
            found = leaks(lower, objects / f"{kernel}.{higher}.o")
            assert any(leak.startswith(f"{why}: ") for leak in found), (lower, higher)
    assert any("zmm" in leak and "rse" in leak for leak in leaks("avx2", objects / "add_noise.avx512.o"))
    if (objects / "add_noise.avx512bf16.o").exists():
        found = leaks("avx512", objects / "add_noise.avx512bf16.o")
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
    entries = {"add_noise": 3, "filters": 4, "winograd": 1}
    for kernel, name in itertools.product(build.KERNELS, build.UNITS):
        path = built[1] / f"{kernel}.{name}.o"
        if not path.exists():
            continue
        assert shared(path) == [], name
        symbols = [line.split()[-2:] for line in tool("nm", "--defined-only", "--extern-only", path).splitlines()]
        assert {kind for kind, _ in symbols} == {"T"} and len(symbols) == entries[kernel], (name, symbols)
        defined += [symbol for _, symbol in symbols]
    assert len(defined) == len(set(defined)) >= 4
