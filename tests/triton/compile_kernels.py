"""Every kernel compiled ahead of time for every target: within budget, and with the instructions that were meant."""

import itertools
import re

import pytest
import torch
import triton
from conftest import kernels

from rse_fast.kernels.triton import aot, conv, launcher


@pytest.fixture(scope="session")
def results():
    return aot.measure_all()


def test_within_budget(results):
    assert not aot.complaints(results)


def test_every_kernel_is_compiled_for_every_target(results):
    for name, kernel in kernels().items():
        cases = [case for case in aot.cases() if case.kernel is kernel]
        assert {target for case in cases for target in case.targets} >= set(aot.TARGETS), name
    assert len(results) == sum(len(case.targets) for case in aot.cases())


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


def test_the_table_names_every_result(results):
    table = aot.table(results)
    for r in results:
        assert f"| {r.case} | {r.target} | {r.registers} | {r.spills} |" in table


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
    seed, places = torch.tensor(3), torch.zeros(4, 2, dtype=torch.int64)
    for shape, layout in itertools.product(((4, 64, 32, 32), (4, 3, 9, 8)), (torch.clone, channels_last)):
        x, channels, flat = layout(torch.zeros(shape, dtype=torch.bfloat16)), shape[1], layout is channels_last
        out, pooled = x.repeat(2, 1, 1, 1), layout(x[:, :, ::2, ::2][:, :, : shape[2] // 2])
        each = torch.rand(channels)
        launcher("add_noise")(x, layout(out), flat, torch.tensor(0.1), seed, 2**32 - 1, 4, 2, 0, 2**31)
        launcher("add_noise")(x, pooled, flat, each, seed, 1, 4, 1, 1, 1, each, each, True, places, pooled, True)
        for per_channel in (False, True):
            launcher("sigma_grad")(x, flat, seed, 16, 4, 1, 0, 2, per_channel)
    assert len(compiled_launches) == 4 * (2 + 2 * 2)


def test_convolutions_pass_what_their_kernel_takes(compiled_launches):
    seed, one, pair = torch.tensor(3), torch.tensor(0.1), (1, 1)
    for channels, c_out, kernel in ((3, 64, 3), (64, 20, 1)):
        x = channels_last(torch.zeros(2, channels, 8, 8)).bfloat16()
        weight, scale = torch.zeros(c_out, channels, kernel, kernel), torch.ones(c_out)
        where = (seed, 2**32 - 1, 2, 2, 0, 2**31, pair, (0, 0), pair)
        places = torch.zeros(2, 2, dtype=torch.int64)
        conv.noisy_conv(x, weight.bfloat16(), scale.bfloat16(), torch.rand(channels), *where, places)
        for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
            y = conv.conv_noise(x.to(dtype), weight.to(dtype), scale, scale, True, one, *where)
            assert y.dtype == dtype and y.shape == (4, c_out, 9 - kernel, 9 - kernel)
    assert len(compiled_launches) == 8
