"""Every kernel compiled ahead of time for every target: within budget, and with the instructions that were meant."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import triton
from conftest import POINTERS, kernels

from rse_fast.address import NoiseAddress
from rse_fast.kernels import triton as package
from rse_fast.kernels.triton import aot, config, conv, launcher

TABLE = Path(aot.__file__).resolve().parents[2] / "bench" / "results" / "aot.md"


@pytest.fixture(scope="session")
def results():
    return aot.measure_all(everything=False)


@pytest.fixture(scope="session")
def written():
    """The results in the table of the repository, which has every case on every target."""
    return aot.read_table(TABLE.read_text())


def test_within_budget(results, written):
    assert not aot.complaints(results)
    assert not aot.complaints(written)


def test_the_table_is_of_these_kernels(results, written):
    advice = "python -m rse_fast.kernels.triton.aot writes it anew"
    assert f"Sources: {aot.sources()}." in TABLE.read_text(), advice
    wanted = [(case.name, target) for case in aot.cases() for target in case.targets]
    assert [(r.case, r.target) for r in written] == wanted, advice
    if f"triton {triton.__version__};" in TABLE.read_text():
        lines = set(TABLE.read_text().splitlines())
        assert [r for r in results if aot.row(r) not in lines] == [], advice


def is_on(case, flag):
    return bool(case.arguments[flag])


def test_every_kernel_and_form_has_a_row_for_every_target():
    """A form: an operand's dtype, or an option of a launch (a constexpr that is true or false) on and off."""
    for name, kernel in kernels().items():
        cases = [case for case in aot.cases() if case.kernel is kernel]
        assert cases, name
        for case in cases:
            assert set(case.targets) >= set(aot.EVERY), case.name
        options = {p.name for p in kernel.params if p.is_constexpr} - {"FAST"}
        flags = {name for name in options if any(isinstance(case.arguments.get(name), bool) for case in cases)}
        missing = [
            (flag, on, target)
            for flag, on, target in itertools.product(flags, (True, False), aot.EVERY)
            if not any(is_on(case, flag) == on and target not in case.absent for case in cases)
        ]
        assert not missing, (name, missing)
        assert {option for option in options - flags if option.isupper()} <= NUMBERS, f"{name}: an option that no case sets"
        if name == "_sigma_grad_total_kernel":
            continue  # float32 alone
        kinds = {case.arguments.get("x_ptr", case.arguments.get("g_ptr")) for case in cases}
        taken = (*package.DTYPES, *(package.LOW_PRECISION if kernel is conv._conv_kernel else ()))
        assert kinds >= {POINTERS[dtype] for dtype in taken}, name


# Options that are numbers: tile sizes and shapes.
NUMBERS = {"UNIT", "OUT_UNIT", "TILES_C", "S_BLOCK", "C_BLOCK", "G_BLOCK", "P_BLOCK", "QUADS", "RUN", "LANES", "C", "KH", "KW"}
NUMBERS |= {"PRECISION", "BLOCK_M", "BLOCK_N", "BLOCK_K"}


def test_what_is_said_to_be_absent_cannot_be_compiled():
    """The rows without figures: fp8 before sm_89, and each maker's flavour on the other's devices."""
    absent = {(case.name.split()[2], target) for case in aot.cases() for target in case.absent}
    e4m3 = {("e4m3fn", "sm_80"), ("e4m3fn", "gfx942")}
    assert absent == e4m3 | {("e4m3fnuz", target) for target in ("sm_80", "sm_89", "sm_90", "sm_100")}
    for case in aot.cases():
        for target in set(case.absent) & {"sm_80", "sm_90"}:
            with pytest.raises(triton.CompilationError, match="not supported in this architecture"):
                aot.compile_case(case, target)


def test_the_noise_kernels_move_16_bytes_at_a_time(results):
    for r in results:
        if re.fullmatch(r"add_noise (flat|planar) (bf16|f32)( affine relu)?", r.case):
            assert r.wide_accesses, (r.case, r.target)


def test_results_are_rounded_to_nearest_even():
    case = next(c for c in aot.cases() if c.name == "add_noise flat bf16 affine relu")
    conversions = set(re.findall(r"cvt\.(\w+)\.bf16(?:x2)?\.f32", aot.compile_case(case, "sm_90").asm["ptx"]))
    assert conversions == {"rn"}


def test_no_denormals_are_flushed():
    """Tiny activations must come out as on the CPU. The approximate functions may flush: their arguments are never that small."""
    case = next(c for c in aot.cases() if c.name == "add_noise flat f32 affine relu")
    flushing = set(re.findall(r"\b(\w+)\.\S*ftz", aot.compile_case(case, "sm_90").asm["ptx"]))
    assert flushing <= {"lg2", "sin", "cos", "sqrt"}


def test_counting_weighs_loops():
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IMAD.WIDE.U32 R2, R3, R4, RZ ;
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
        /*0060*/                   NOP;
"""
    counts, opcodes = aot.executed(text, trips=10)
    assert counts == {"MOV": 1, "IMAD.WIDE.U32": 10, "LDG.E.128": 10, "BRA": 10, "EXIT": 1} and len(opcodes) == 5


def test_a_table_is_read_as_it_was_written(results):
    text = aot.table(results)
    assert len(aot.read_table(text)) == len(results) and aot.table(aot.read_table(text)) == text


def test_what_autotuning_finds_is_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv(config.CACHE_VARIABLE, str(tmp_path / "new"))
    default, *others = (conv.Tile(64, 64, 64, 128, stages) for stages in (3, 2, 4, 1))
    milliseconds, measured = {3: 2.0, 2: 1.0, 4: 3.0}, []

    def measure(run, warmup, rep):
        return run()

    def run(tile):
        measured.append(tile.stages)
        if tile.stages == 1:
            raise triton.runtime.errors.OutOfResources(10, 1, "shared memory")
        return milliseconds[tile.stages]

    assert config.searched("a", default, others, run, None) == default and not measured  # while a graph is captured
    assert config.searched("a", default, others, run, measure).stages == 2 and sorted(measured) == [1, 2, 3, 4]
    config._found.clear()  # another process
    assert config.searched("a", default, [], run, measure).stages == 2 and len(measured) == 4
    assert config.searched("b", default, others[2:], run, measure) == default  # what does not fit the device is passed over
    config._found.clear()
    config._write_cache({**config._read_cache(), "a": {"width": 3}})  # written by a version that described launches otherwise
    assert config.searched("a", default, others, run, measure).stages == 2 and len(measured) == 10
    assert set(config._read_cache()) == {"a", "b"} and [path.name for path in (tmp_path / "new").iterdir()] == ["autotune.json"]


class Driver:
    """As much of a driver as compiling for a device takes, where there is no device."""

    def get_current_target(self):
        return aot.TARGETS["sm_90"]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled_launches(monkeypatch):
    """Launchers compile for sm_90, with the arguments they pass, and stop before the launch; gives the list of what was compiled."""
    done, run = [], triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert all(0 < n < 2**31 for n in grid)
        done.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return done


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def test_launches_pass_what_their_kernels_take(compiled_launches):
    seed, sample_ids = torch.tensor(3), torch.zeros(4, 2, dtype=torch.int64)
    for shape, layout in (((4, 64, 32, 32), channels_last), ((4, 3, 9, 8), torch.clone)):
        x, channels, flat = layout(torch.zeros(shape, dtype=torch.bfloat16)), shape[1], layout is channels_last
        out, pooled = x.repeat(2, 1, 1, 1), layout(x[:, :, ::2, ::2][:, :, : shape[2] // 2])
        each = torch.rand(channels)
        launcher("add_noise")(x, layout(out), flat, torch.tensor(0.1), NoiseAddress(seed, 2**32 - 1, 4, 2, 0, 2**31))
        at = NoiseAddress(seed, 1, 4, 1, 1, 1, sample_ids)
        launcher("add_noise")(x, pooled, flat, each, at, each, each, True, pooled, True)
        for per_channel in (False, True):
            launcher("sigma_grad")(x, flat, NoiseAddress(seed, 16, 4, draw_offset=2), per_channel)
    assert len(compiled_launches) == 2 * (2 + 2 * 2)


def test_convolutions_pass_what_their_kernel_takes(compiled_launches):
    seed, one, pair = torch.tensor(3), torch.tensor(0.1), (1, 1)
    for channels, c_out, kernel in ((3, 64, 3), (64, 20, 1)):
        x = channels_last(torch.zeros(2, channels, 8, 8)).bfloat16()
        weight, scale = torch.zeros(c_out, channels, kernel, kernel), torch.ones(c_out)
        at, geometry = NoiseAddress(seed, 2**32 - 1, 2, 2, 0, 2**31), (pair, (0, 0), pair)
        own = at._replace(sample_ids=torch.zeros(2, 2, dtype=torch.int64))
        conv.noisy_conv(x, weight.bfloat16(), scale.bfloat16(), torch.rand(channels), own, *geometry)
        for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
            y = conv.conv_activate_noise(x.to(dtype), weight.to(dtype), one, at, scale, scale, True, *geometry)
            assert y.dtype == dtype and y.shape == (4, c_out, 9 - kernel, 9 - kernel)
    assert len(compiled_launches) == 8
