"""What all tests of training train on."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from tiny_training import write_images  # training needs an extra, without which these tests are skipped

    return write_images(tmp_path_factory.mktemp("images") / "images.npz", np.random.default_rng())
