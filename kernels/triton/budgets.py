"""What the compiled kernels may cost, by case of `aot` and target; the tests check it. Raise a figure only with a reason."""

# On every target, for every kernel.
EVERYWHERE = {"spills": 0}

# Noise kernels: no layout may be converted through shared memory.
NOISE = {"shared": 0}

BY_CASE = {
    # Rows of 5 channels end inside a quad: one conversion, the price of whole loads.
    "add_noise flat bf16 C=5": {"sm_90": {"shared": 4096}},
    # name: {target: {quantity: limit}}; limits of quantities with text are the text expected
    # Every second pixel is loaded alone, four neighbouring results are stored together.
    "add_noise planar bf16 pool, clean, places": {"sm_90": {"shared": 1024}},
    "add_noise flat bf16": {"sm_90": {"instructions": 23.5, "registers": 64}},
    "add_noise flat bf16 affine relu": {"sm_90": {"instructions": 26, "registers": 64}},
    "add_noise planar bf16": {"sm_90": {"instructions": 23.5, "registers": 64}},
    "add_noise planar bf16 affine relu": {"sm_90": {"instructions": 26, "registers": 64}},
    # Tensor cores in every precision.
    "conv bf16 1x1, noise in": {"sm_80": {"tensor": "HMMA"}, "sm_90": {"tensor": "HGMMA"}, "sm_100": {"tensor": "UTCHMMA"}},
    "conv bf16 1x1 to 256, noise in": {"sm_90": {"tensor": "HGMMA"}},
    "conv f16 first 3x3, noise in": {"sm_90": {"tensor": "HGMMA"}},
    "conv tf32 3x3, noise in": {"sm_90": {"tensor": "HGMMA"}},
    "conv bf16 3x3, noise out": {"sm_80": {"tensor": "HMMA"}, "sm_90": {"tensor": "HGMMA"}, "sm_100": {"tensor": "UTCHMMA"}},
    "conv int8 3x3, noise out": {"sm_90": {"tensor": "IGMMA"}},
    "conv fp8 3x3, noise out": {"sm_90": {"tensor": "QGMMA"}},
}


def budget(case: str, target: str) -> dict:
    """Quantity of `aot.Result` to its limit for one case on one target."""
    shared = NOISE if case.startswith("add_noise") else {}
    return {**EVERYWHERE, **shared, **BY_CASE.get(case, {}).get(target, {})}
