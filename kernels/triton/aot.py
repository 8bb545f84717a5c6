"""Compiles every kernel for several GPUs without one and reads registers, spills, shared memory and instructions from the result.

``python -m rse_fast.kernels.triton.aot`` writes the table. What it says about speed is a prediction: instructions, not time.
"""

import argparse
import ast
import collections
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import add_noise, conv, sigma_grad
from .budgets import budget
from .config import FUSED

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
EVERY = ("sm_80", "sm_90", "sm_100", "gfx942")  # what every kernel and form has a row for; sm_89 is where fp8 begins

# SASS opcodes (up to the first dot) by class; what starts with U runs once a warp, in the uniform datapath.
CLASSES = {
    "multiply": {"IMAD", "VIADD", "IADD3", "LEA", "IADD"},
    "logic": {"LOP3", "SHF", "PRMT", "SGXT", "BMSK"},
    "float": {"FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "FSETP", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HADD2", "HMUL2", "FMNMX3"},
    "special": {"MUFU"},
    "convert": {"I2FP", "F2FP", "F2F", "I2F", "F2I", "F2IP", "I2I"},
    "memory": {"LDG", "STG", "LDGSTS", "LDC", "LDCU"},
    "shared": {"LDS", "STS", "LDSM", "STSM", "BAR", "SHFL"},
}
TENSOR = re.compile(r"HGMMA|QGMMA|IGMMA|HMMA|IMMA|QMMA|UTC[A-Z]*MMA|v_s?mfma\w*")


@dataclass(frozen=True)
class Case:
    """A kernel as some launch of it would compile it.

    arguments: constexprs and options by name, pointers as their types ("*bf16"), None for absent ones; everything else is an int32.
    elements: of one tile. trips: tiles that one program takes, the number of times the kernel's one loop runs. absent: targets that
    cannot have this form, with the reason. main: compiled for all its targets by the tests, the others for sm_90 there.
    """

    name: str
    kernel: triton.JITFunction
    arguments: dict = field(hash=False)
    elements: int = 0
    trips: int = 1
    targets: tuple = EVERY
    absent: dict = field(default_factory=dict, hash=False)
    main: bool = False


@dataclass(frozen=True)
class Result:
    """What one case compiled to on one target, or why it cannot be there; instructions are for one thread, per element where the case
    has elements."""

    case: str
    target: str
    absent: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: float = 0.0
    classes: dict = field(default_factory=dict)
    tensor: str = ""
    wide_accesses: bool = False


# ------------------------------------------------------------------------------------------------------------------------ cases
_BITS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def _noise_case(
    name, dtype, flat, channels, width, *, lines=1, rows=4096, affine=False, pool=False, lazy=False, main=False, **flags
) -> Case:
    plan = add_noise.plan_flat if flat else add_noise.plan_planar
    # The price of a tile: the prologue, the same for all tiles of a program, is spread over several.
    kernel, _, shape = plan(channels, lines, width, rows, dtype.itemsize, not affine, flags.get("SIGMA_VARIES", False), pool, FUSED)
    pointer = _BITS[dtype]
    arguments = dict(
        x_ptr=pointer, y_ptr=pointer, clean_ptr=pointer if flags.get("CLEAN") else None, sigma_ptr="*fp32", seed_ptr="*i64",
        scale_ptr="*fp32" if affine else None, shift_ptr="*fp32" if affine else None, ids_ptr="*i64" if flags.get("HAS_IDS") else None,
        SIGMA_VARIES=False, HAS_SCALE=affine, HAS_SHIFT=affine, RELU=affine, HAS_IDS=False, CLEAN=False, POOL=pool, WIDE=False, FAST=True,
    )  # fmt: skip
    arguments.update(shape)
    arguments.update(flags, **{} if lazy else {"repeats": 1})
    trips = shape["steps"]
    for scalar in ("tiles", "steps", "parts", "width", "lines", "channel_units", "position_units", "C"):
        arguments.pop(scalar, None)
    elements = shape["S_BLOCK"] * (shape["C_BLOCK"] if flat else 4 * shape["G_BLOCK"])
    return Case(name, kernel, arguments, elements, trips, main=main)


def _sigma_case(name, dtype, flat, channels, width, per_channel, main=False, **flags) -> Case:
    kernel, _, shape, _ = sigma_grad.plan(channels, width, dtype.itemsize, flat, sigma_grad.DEFAULT)
    arguments = dict(
        g_ptr=_BITS[dtype], part_ptr="*fp32", seed_ptr="*i64", ids_ptr="*i64" if flags.get("HAS_IDS") else None,
        HAS_IDS=False, PER_CHANNEL=per_channel, WIDE=False, FAST=True,
    )  # fmt: skip
    elements = shape["S_BLOCK"] * (shape["C_BLOCK"] if flat else 4 * shape["G_BLOCK"])
    arguments.update({k: v for k, v in shape.items() if k.isupper() or k == "num_warps"}, **flags)
    for scalar in ("S", "C"):
        arguments.pop(scalar, None)
    return Case(name, kernel, arguments, elements, 16, main=main)


def _conv_case(name, kind, channels, c_out, kernel, noise_in, targets=EVERY, absent=None, main=False, **flags) -> Case:
    itemsize = {"*i8": 1, "*fp8e4nv": 1, "*fp8e4b8": 1, "*fp32": 4}.get(kind, 2)
    tile = conv.default_tile(c_out, channels, itemsize, noise_in)
    arguments = dict(
        x_ptr=kind, w_ptr=kind, y_ptr=kind, scale_ptr=None if noise_in else "*fp32", shift_ptr=kind if noise_in else "*fp32",
        sigma_ptr="*fp32", seed_ptr="*i64", ids_ptr="*i64" if flags.get("HAS_IDS") else None, C=channels, KH=kernel, KW=kernel,
        NOISE_IN=noise_in, NOISE_OUT=not noise_in, LAZY=False, SIGMA_VARIES=False, HAS_SCALE=not noise_in, HAS_SHIFT=True,
        RELU=not noise_in, HAS_IDS=False, EVEN_N=c_out % tile.channels == 0, OUT_UNIT=min(c_out & -c_out, 16), PRECISION="tf32", FAST=True,
        **tile.arguments(),
    )  # fmt: skip
    if flags.pop("BARE", False):
        arguments.update(scale_ptr=None, shift_ptr=None, HAS_SCALE=False, HAS_SHIFT=False, RELU=False)
    return Case(name, conv._conv_kernel, {**arguments, **flags}, targets=targets, absent=absent or {}, main=main)


def cases() -> list[Case]:
    """Every kernel in its main forms and dtypes; each option of a launch is on in one of them and off in another."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    last, planar, affine, pooled = (True, 64, 2**14), (False, 64, 2**14), dict(affine=True), dict(affine=True, pool=True, lines=16)
    total = dict(part_ptr="*fp32", out_ptr="*fp32", P_BLOCK=16, C_BLOCK=64)
    fp8 = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
    no_e4m3 = {"sm_80": "fp8 begins with sm_89", "gfx942": "this device multiplies e4m3fnuz: the next case"}
    no_fnuz = {target: "AMD's flavour of fp8: the case before" for target in fp8[:-1]}
    return [
        _noise_case("add_noise flat bf16", bf16, *last),
        _noise_case("add_noise flat bf16 affine relu", bf16, *last, **affine, main=True),
        _noise_case("add_noise flat bf16 affine relu, lazy, sample_ids", bf16, *last, **affine, lazy=True, HAS_IDS=True),
        _noise_case("add_noise flat f16 affine relu, sigma[C], clean", f16, *last, **affine, SIGMA_VARIES=True, CLEAN=True),
        _noise_case("add_noise flat f32 affine relu", f32, *last, **affine),
        _noise_case("add_noise flat bf16 C=5", bf16, True, 5, 33 * 31, **affine),
        _noise_case("add_noise flat bf16 pool", bf16, True, 64, 16, **pooled),
        _noise_case("add_noise flat bf16, 64-bit offsets", bf16, *last, WIDE=True),
        _noise_case("add_noise planar bf16", bf16, *planar),
        _noise_case("add_noise planar bf16 affine relu", bf16, *planar, **affine, main=True),
        _noise_case("add_noise planar f32 affine relu", f32, *planar, **affine),
        _noise_case("add_noise planar f16 C=3, lazy", f16, False, 3, 1024, lazy=True),
        _noise_case("add_noise planar bf16 16x16, sigma[C]", bf16, False, 64, 256, **affine, SIGMA_VARIES=True),
        _noise_case("add_noise planar bf16 7x7", bf16, False, 512, 49, **affine),
        _noise_case("add_noise planar bf16 pool, clean, sample_ids", bf16, False, 64, 16, **pooled, CLEAN=True, HAS_IDS=True),
        _noise_case("add_noise planar bf16, 64-bit offsets", bf16, *planar, WIDE=True),
        _sigma_case("sigma_grad flat bf16 per channel", bf16, True, 64, 1024, True, main=True),
        _sigma_case("sigma_grad flat f32", f32, True, 64, 1024, False),
        _sigma_case("sigma_grad flat f16, sample_ids, 64-bit offsets", f16, True, 64, 1024, False, HAS_IDS=True, WIDE=True),
        _sigma_case("sigma_grad planar bf16 per channel", bf16, False, 64, 1024, True, main=True),
        _sigma_case("sigma_grad planar f32", f32, False, 64, 1024, False),
        _sigma_case("sigma_grad planar f16, sample_ids, 64-bit offsets", f16, False, 64, 1024, False, HAS_IDS=True, WIDE=True),
        Case("sigma_grad total", sigma_grad._sigma_grad_total_kernel, total, main=True),
        _conv_case("conv bf16 1x1, noise in", "*bf16", 64, 256, 1, True, main=True),
        _conv_case("conv bf16 1x1 to 256, noise in", "*bf16", 128, 256, 1, True),
        _conv_case("conv f16 first 3x3, noise in", "*fp16", 3, 64, 3, True),
        _conv_case("conv tf32 3x3, noise in", "*fp32", 64, 64, 3, True),
        _conv_case("conv bf16 5x5 to 20, noise in, lazy, sample_ids, sigma[C]", "*bf16", 16, 20, 5, True,
                   LAZY=True, HAS_IDS=True, SIGMA_VARIES=True),
        _conv_case("conv bf16 3x3, noise out", "*bf16", 64, 128, 3, False, main=True),
        _conv_case(
            "conv f16 3x3, noise out, bare, sample_ids, sigma[C]", "*fp16", 64, 64, 3, False, BARE=True, HAS_IDS=True, SIGMA_VARIES=True
        ),
        _conv_case("conv tf32 1x1, noise out", "*fp32", 64, 64, 1, False),
        _conv_case("conv int8 3x3, noise out", "*i8", 128, 128, 3, False, main=True),
        _conv_case("conv fp8 e4m3fn 3x3, noise out", "*fp8e4nv", 128, 128, 3, False, fp8, no_e4m3, main=True),
        _conv_case("conv fp8 e4m3fnuz 3x3, noise out", "*fp8e4b8", 128, 128, 3, False, fp8, no_fnuz, main=True),
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- compiling
def compile_case(case: Case, target: str):
    """Triton's compiled kernel of `case` for the named target."""
    gpu, kernel = TARGETS[target], case.kernel
    options = {k: v for k, v in case.arguments.items() if k in ("num_warps", "num_stages", "maxnreg")}
    arguments = {k: v for k, v in case.arguments.items() if k not in options}
    if gpu.backend == "hip":
        options.pop("maxnreg", None)
        options["num_warps"] = max(1, options.get("num_warps", 4) // 2)  # as `config.warps` has it
        options["num_stages"] = min(2, options.get("num_stages", 2))  # as `config.stages` has it
        arguments["FAST"] = False
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments.get(parameter.name, "i32")
        if not isinstance(value, str) or parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = value
        if value.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu, options=options)


def measure(case: Case, target: str) -> Result:
    if target in case.absent:
        return Result(case.name, target, case.absent[target])
    compiled = compile_case(case, target)
    read = _read_cuda if TARGETS[target].backend == "cuda" else _read_hip
    return read(case, target, compiled)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def sass(compiled) -> str:
    """The disassembly of a kernel compiled for CUDA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return _tool("nvdisasm", "-c", file.name)


_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


def executed(text: str, trips: int) -> tuple[collections.Counter, list[str]]:
    """(opcodes by how often one thread executes them when loops run `trips` times, all opcodes once) of a disassembly.

    Branches back mark the loops; what leaves early counts as if it did not. Padding after the last instruction is left out.
    """
    opcodes, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label.group(1)] = len(opcodes)
        elif found := _INSTRUCTION.match(line):
            opcode, rest = found.groups()
            goal = re.search(r"`\((\.L_\w+)\)", rest)
            opcodes.append(opcode)
            # A branch to itself ends every kernel and never runs.
            if opcode.startswith("BRA") and goal and labels.get(goal.group(1), len(opcodes)) < len(opcodes) - 1:
                loops.append((labels[goal.group(1)], len(opcodes)))
    while opcodes and opcodes[-1].startswith(("NOP", "BRA")):
        opcodes.pop()
    counts = collections.Counter()
    for index, opcode in enumerate(opcodes):
        counts[opcode] += trips if any(first <= index < last for first, last in loops) else 1
    return counts, opcodes


def _read_cuda(case, target, compiled) -> Result:
    counts, opcodes = executed(sass(compiled), case.trips)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
    threads = 32 * compiled.metadata.num_warps
    share = case.trips * case.elements / threads if case.elements else 1
    classes = collections.Counter()
    for opcode, count in counts.items():
        stem = opcode.split(".")[0]
        kind = next((name for name, stems in CLASSES.items() if stem in stems), "uniform" if stem.startswith("U") else "other")
        classes["tensor" if TENSOR.match(stem) else kind] += count
    moves = [op for op in opcodes if op.startswith(("LDG", "STG"))]
    return Result(
        case.name, target,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spills=sum(op.startswith(("LDL", "STL")) for op in opcodes),
        shared=compiled.metadata.shared,
        instructions=sum(counts.values()) / share,
        classes={kind: count / share for kind, count in sorted(classes.items())},
        tensor=next((m.group(0) for op in opcodes if (m := TENSOR.match(op))), ""),
        wide_accesses=any(".128" in op for op in moves),
    )  # fmt: skip


def _read_hip(case, target, compiled) -> Result:
    text = compiled.asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # noqa: E731
    opcodes = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat)_\w+)", text, re.MULTILINE)
    share = case.elements / (64 * compiled.metadata.num_warps) if case.elements else 1
    return Result(
        case.name, target, registers=number("vgpr_count"), spills=number("vgpr_spill_count"), shared=compiled.metadata.shared,
        instructions=len(opcodes) / share, classes={},
        tensor=next((m.group(0) for op in opcodes if (m := TENSOR.match(op))), ""),
        wide_accesses=any("dwordx4" in op for op in opcodes),
    )  # fmt: skip


def measure_all(everything: bool = True, workers: int | None = None) -> list[Result]:
    """Every case on each of its targets, in order; without `everything` what `Case.main` says."""
    chosen = [
        (index, target) for index, case in enumerate(cases()) for target in case.targets if everything or case.main or target == "sm_90"
    ]
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_measure_named, chosen))


def _measure_named(what: tuple[int, str]) -> Result:
    return measure(cases()[what[0]], what[1])


# ------------------------------------------------------------------------------------------------------------------------ table
def sources() -> str:
    """A digest of the code that decides what is compiled, comments and layout of the text apart: whether a table is of these kernels."""
    here = Path(__file__).parent
    names = ("philox", "add_noise", "conv", "sigma_grad", "config", "aot")
    code = [ast.dump(ast.parse(here.joinpath(f"{name}.py").read_text())) for name in names]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def complaints(results: list[Result]) -> list[str]:
    """What is over its budget, one line each."""
    found = []
    for r in results:
        for quantity, limit in ({} if r.absent else budget(r.case, r.target)).items():
            value = getattr(r, quantity)
            if isinstance(limit, str):
                if not re.fullmatch(limit, value):
                    found.append(f"{r.case}, {r.target}: {quantity} is {value or 'none'}, expected {limit}")
            elif value > limit:
                found.append(f"{r.case}, {r.target}: {quantity} {value:.4g} is over the budget of {limit:g}")
    return found


_NOT_THERE = "not there: "
_KINDS = [*CLASSES, "tensor", "uniform", "other"]
_HEAD = ["kernel", "target", "registers", "spills", "shared bytes", "16-byte accesses", "tensor instruction", "instructions", *_KINDS]


def table(results: list[Result]) -> str:
    lines = [
        "# What the kernels compile to",
        "",
        f"Written by `python -m rse_fast.kernels.triton.aot` with triton {triton.__version__}; no GPU was there, no figure is a time.",
        f"Sources: {sources()}. Budgets: `kernels/triton/budgets.py`.",
        "",
        "Instructions are those one thread executes, per element for the noise kernels (prologue included, the loop counted as often as a",
        "program of a large tensor runs it) and static for the others; on gfx942 always static, one pass of the loop, without classes.",
        "Tensor instructions: HMMA, IMMA, QMMA take operands from registers (sm_80, sm_89); HGMMA, IGMMA, QGMMA are a warp group's",
        "(sm_90); UTCHMMA and UTCQMMA those of sm_100, where this compiler has none for int8 and takes IMMA; v_mfma AMD's.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|" + "---|" * len(_HEAD),
        *map(row, results),
    ]
    return "\n".join(lines) + "\n"


def row(r: Result) -> str:
    """One line of the table."""
    if r.absent:
        cells = [r.case, r.target, _NOT_THERE + r.absent, *[""] * (len(_HEAD) - 3)]
    else:
        numbers = [f"{r.classes[k]:.4g}" if k in r.classes else "" for k in _KINDS]
        wide = "yes" if r.wide_accesses else "no"
        cells = [r.case, r.target, r.registers, r.spills, r.shared, wide, r.tensor, f"{r.instructions:.4g}", *numbers]
    return "| " + " | ".join(map(str, cells)) + " |"


def read_table(text: str) -> list[Result]:
    """The results in a table, without what it does not show."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != len(_HEAD) or cells == _HEAD or set(line) <= set("|-"):
            continue
        case, target, registers, spills, shared, wide, tensor, instructions, *numbers = cells
        if registers.startswith(_NOT_THERE):
            found.append(Result(case, target, registers.removeprefix(_NOT_THERE)))
            continue
        classes = {kind: float(number) for kind, number in zip(_KINDS, numbers, strict=True) if number}
        rest = dict(tensor=tensor, wide_accesses=wide == "yes")
        found.append(Result(case, target, "", int(registers), int(spills), int(shared), float(instructions), classes, **rest))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rse_fast.kernels.triton.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/aot.md"), help="file for the table (default: %(default)s)")
    args = parser.parse_args(argv)
    results = measure_all()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(table(results))
    found = complaints(results)
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    print(args.out)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
