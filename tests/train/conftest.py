"""What the tests of training share."""

import pytest
from entropy import seeded


@pytest.fixture(scope="module")
def images(request, tmp_path_factory):
    """A data set of random images of three classes, one for each test file."""
    from tiny_training import write_images  # training needs an extra, without which these tests are skipped

    return write_images(tmp_path_factory.mktemp("images") / "images.npz", seeded(request.node.nodeid))
