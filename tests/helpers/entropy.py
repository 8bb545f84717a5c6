"""Where all random inputs of the tests come from: one number for each process, which a failing test prints, and the name of the test."""

import os
import secrets
import zlib

import numpy as np
import torch

VARIABLE = "RSE_FAST_TEST_ENTROPY"
ENTROPY = int(os.environ.get(VARIABLE) or secrets.randbits(63))


def seeded(name: str) -> np.random.Generator:
    """A generator for the test or file ``name``. torch's generator and numpy's global one are seeded from it as well.

    So the inputs of a test do not depend on which tests ran before it.
    """
    generator = np.random.default_rng((ENTROPY, zlib.crc32(name.encode())))
    torch.manual_seed(int(generator.integers(2**63)))
    np.random.seed(int(generator.integers(2**32)))
    return generator
