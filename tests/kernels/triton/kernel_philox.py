"""Device functions: words and uniforms bit for bit, normals within the contract."""

import ctypes
import json
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

from rse_fast import reference
from rse_fast.kernels.triton import philox as device
from rse_fast.kernels.triton.config import fast_math

COUNT = 4096
N = tl.constexpr(COUNT)
TOP = 2**32
LOW, MIDDLE = [0, 1, 2, 63, 64, 127, 128, 2**23, 2**24 + 1], [2**31 - 1, 2**31, 2**31 + 1]
EXTREME = np.array([*LOW, *MIDDLE, TOP - 257, TOP - 256, TOP - 129, TOP - 2, TOP - 1], np.uint32)


@triton.jit
def _sample_kernel(counter_ptr, seed_ptr, words_ptr, uniforms_ptr, normals_ptr, GIVEN: tl.constexpr, FAST: tl.constexpr):
    i = tl.arange(0, N)
    w0 = tl.load(counter_ptr + 4 * i).to(tl.uint32, bitcast=True)
    w1 = tl.load(counter_ptr + 4 * i + 1).to(tl.uint32, bitcast=True)
    w2 = tl.load(counter_ptr + 4 * i + 2).to(tl.uint32, bitcast=True)
    w3 = tl.load(counter_ptr + 4 * i + 3).to(tl.uint32, bitcast=True)
    if not GIVEN:
        k0, k1 = device.key_words(seed_ptr)
        w0, w1, w2, w3 = device.philox(w0, w1, w2, w3, k0, k1)
    words = device.channels_last(w0[None, :], w1[None, :], w2[None, :], w3[None, :])
    u0, v0 = device.uniforms(w0, w1)
    u1, v1 = device.uniforms(w2, w3)
    z0, z1 = device.box_muller(w0, w1, FAST)
    z2, z3 = device.box_muller(w2, w3, FAST)
    j = tl.arange(0, 4 * N)[None, :]
    tl.store(words_ptr + j, words.to(tl.int32, bitcast=True))
    tl.store(uniforms_ptr + j, device.channels_last(u0[None, :], v0[None, :], u1[None, :], v1[None, :]))
    tl.store(normals_ptr + j, device.channels_last(z0[None, :], z1[None, :], z2[None, :], z3[None, :]))


@triton.jit
def _run_kernel(seed_ptr, out_ptr, RUN: tl.constexpr, FAST: tl.constexpr):
    k0, k1 = device.key_words(seed_ptr)
    quad = tl.arange(0, 64 // RUN) * RUN * 3
    image, draw, stream = tl.full((), 5, tl.uint32), tl.full((), 6, tl.uint32), tl.full((), 7, tl.uint32)
    z = device.normals_run(quad.to(tl.uint32)[None, :], tl.full((), 3, tl.uint32), image, draw, stream, k0, k1, RUN, FAST)
    for lane in tl.static_range(4):
        tl.store(out_ptr + lane * 64 + tl.arange(0, 64)[None, :], z[lane])


def sample(counter, seed=0, given=False):
    """Words, uniforms and normals [COUNT, 4] of counters [COUNT, 4], or of given words."""
    words, uniforms, normals = torch.zeros(COUNT, 4, dtype=torch.int32), torch.full((COUNT, 4), np.nan), torch.full((COUNT, 4), np.nan)
    counter = torch.tensor(np.ascontiguousarray(counter).view(np.int32))
    _sample_kernel[(1,)](counter, torch.tensor(seed), words, uniforms, normals, given, fast_math())
    return words.cpu().numpy().view(np.uint32), uniforms.cpu().numpy(), normals.cpu().numpy()


def expected(words):
    u, v = reference.uniforms(words)
    radius, angle = np.sqrt(-2 * np.log(u.astype(np.float64))), np.pi * v.astype(np.float64)
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, 4)
    return np.stack([u, v], -1).reshape(-1, 4), normals, np.repeat(radius, 2, axis=-1)


def test_known_answers():
    for vector in json.loads(Path(__file__).parents[2].joinpath("helpers", "kat_philox.json").read_text())["vectors"]:
        counter, key, words = (np.array([int(w, 16) for w in vector[k].split()], np.uint32) for k in ("counter", "key", "words"))
        seed = int(key[0]) + (int(key[1]) << 32)
        got, _, _ = sample(np.tile(counter, (COUNT, 1)), seed - 2**64 if seed >= 2**63 else seed)
        assert (got == words).all()


def test_words_equal_numpys_and_the_librarys(rng, library):
    for seed in (-1, int(rng.integers(-(2**63), 2**63))):
        image, draw, stream = (int(w) for w in rng.integers(0, TOP, 3))
        quad = int(rng.integers(0, TOP - COUNT))
        counter = np.empty((COUNT, 4), np.uint32)
        counter[:, 0], counter[:, 1:] = quad + np.arange(COUNT), (image, draw, stream)
        words, uniforms, _ = sample(counter, seed)
        key = np.array([seed % TOP, (seed >> 32) % TOP], np.uint32)
        assert (words == reference.philox(counter, key)).all()
        planes = [np.empty((4, COUNT), t) for t in (np.uint32, np.float32, np.float32)]
        function, pointer = library.handle.rse_sample, ctypes.c_void_p
        function.argtypes = (pointer, *[ctypes.c_uint32] * 3, *[ctypes.c_int64] * 2, *[pointer] * 4)
        function.restype = None
        function(np.array([seed], np.int64).ctypes.data, stream, image, draw, quad, COUNT, None, *(p.ctypes.data for p in planes))
        assert (words == planes[0].T).all() and (uniforms == planes[1].T).all()


def test_uniforms_are_bit_identical_and_normals_within_the_contract(rng):
    words = rng.integers(0, TOP, (COUNT, 4), dtype=np.uint64).astype(np.uint32)
    pairs = np.stack(np.meshgrid(EXTREME, EXTREME), -1).reshape(-1, 2)
    words[: len(pairs), :2], words[: len(pairs), 2:] = pairs, pairs[::-1]
    same, uniforms, normals = sample(words, given=True)
    assert (same == words).all()
    exact_uniforms, exact, radius = expected(words)
    assert (uniforms.view(np.uint32) == exact_uniforms.view(np.uint32)).all()
    assert np.isfinite(normals).all() and np.abs(normals).max() <= 6.77
    assert np.abs(normals - exact)[radius >= 0.05].max() <= 2e-5 and np.abs(normals - exact).max() <= 1e-3
    assert (normals[np.repeat(exact_uniforms[:, ::2] == 1, 2, axis=-1)] == 0).all()


def test_a_run_holds_its_quads_in_order(seed):
    single = torch.full((4, 64), np.nan)
    _run_kernel[(1,)](seed, single, 1, fast_math())
    counter = np.empty((64, 4), np.uint32)
    counter[:, 0], counter[:, 1:] = 3 * np.arange(64), (5, 6, 7)
    words = reference.philox(counter, np.array([int(seed) % TOP, (int(seed) >> 32) % TOP], np.uint32))
    assert np.abs(single.cpu().numpy().T - expected(words)[1]).max() <= 1e-3
    for run in (2, 4, 8):
        out = torch.full((4, 64), np.nan)
        _run_kernel[(1,)](seed, out, run, fast_math())
        assert torch.equal(out, single), run
