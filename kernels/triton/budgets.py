"""What the compiled kernels may cost, by case of `aot` and target; the tests check it. Raise a figure only with a reason."""

# On every target, for every kernel.
EVERYWHERE = {"spills": 0}

# Bytes of shared memory that a program can have at most.
SHARED = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# Noise kernels: no layout may be converted through shared memory.
NOISE = {"shared": 0}

# Tensor cores in every precision: dtype (second word of a convolution's name) to target to instruction, a regular expression.
_HALF = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": r"v_mfma_f32_\w+_b?f16"}
TENSOR = {
    "bf16": _HALF,
    "f16": _HALF,
    "tf32": {**_HALF, "gfx942": r"v_mfma_f32_\w+_x?f32"},
    "int8": {"sm_80": "IMMA", "sm_90": "IGMMA", "sm_100": "IMMA", "gfx942": r"v_mfma_i32_\w+_i8"},
    "fp8": {"sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA", "gfx942": r"v_mfma_f32_\w+_fp8_fp8"},
}

# name: {target, or "" for every one: {quantity: limit}}
BY_CASE = {
    # Rows of 5 channels end inside a quad: one conversion, the price of whole loads.
    # 5 channels take two Philox calls, 8 normals: 1.6 times the noise's share of 21 instructions is in the contract.
    "add_noise flat bf16 C=5": {"": {"shared": 4096}, "sm_90": {"instructions": 39}},
    # A pooled value stands for four loads and a store: 10 bytes against 4, so 77 issue slots pass while memory moves them, not 31.
    "add_noise flat bf16 pool": {"sm_90": {"instructions": 43, "registers": 64}},
    # Every second pixel is loaded alone, four neighbouring results are stored together. 12 bytes with the clean value: 93 slots.
    "add_noise planar bf16 pool, clean, sample_ids": {"": {"shared": 1024}, "sm_90": {"instructions": 56}},
    # Planes of 49 values share no alignment, so each value is loaded and stored alone; channels last has no such planes.
    "add_noise planar bf16 7x7": {"sm_90": {"instructions": 54}},
    "add_noise flat bf16": {"sm_90": {"instructions": 23.5, "registers": 64}},
    "add_noise flat bf16 affine relu": {"sm_90": {"instructions": 26, "registers": 64}},
    "add_noise planar bf16": {"sm_90": {"instructions": 23.5, "registers": 64}},
    "add_noise planar bf16 affine relu": {"sm_90": {"instructions": 26, "registers": 64}},
}


def budget(case: str, target: str) -> dict:
    """Quantity of `aot.Result` to its limit (a number at most, or the expression that a text matches) for one case on one target."""
    kind, dtype = case.split()[:2]
    found = EVERYWHERE | {"shared": SHARED[target]}
    if kind == "add_noise":
        found.update(NOISE)
    if kind == "conv":
        found["tensor"] = TENSOR[dtype][target]
    for named in ("", target):
        found.update(BY_CASE.get(case, {}).get(named, {}))
    return found
