"""How an ensemble's images x draws are cut into packed batches."""

from collections.abc import Iterator

# Rows of a packed batch where throughput peaks: on a CPU the activations of more rows leave the cache, on a GPU fewer leave it idle.
SWEET_SPOT = {"cpu": 80, "cuda": 1024}


def chunks(images: int, draws: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Cuts ``images x draws`` into (image slice, draw slice) pairs of at most ``rows`` packed rows each, images outermost.

    All draws of an image stay together where they fit, so that what precedes the first noise runs once an image; pieces differ by at
    most one image or draw, so no last piece is left tiny.
    """
    for image in _pieces(images, max(1, rows // draws)):
        for draw in _pieces(draws, rows):
            yield image, draw


def _pieces(total, most):
    count = -(-total // most)
    for i in range(count):
        yield slice(total * i // count, total * (i + 1) // count)
