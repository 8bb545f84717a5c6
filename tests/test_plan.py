"""Cutting images x draws into packed batches: every pair once, never more rows than allowed, and the order that the engine sums in."""

import pytest

from rse_fast.ensemble import plan

EDGES = [(images, draws, rows) for images in (1, 2, 7) for draws in (1, 2, 7) for rows in (1, 2, 6, 7, 8, 14, 1000)]


@pytest.fixture
def cases(rng):
    """(images, draws, rows)"""
    return EDGES + rng.integers(1, (60, 60, 200), (300, 3)).tolist()


def length(s):
    return s.stop - s.start


def test_chunks_cover_each_draw_of_each_image_once_within_the_rows(cases):
    for images, draws, rows in cases:
        pieces = list(plan.chunks(images, draws, rows))
        pairs = [(i, d) for image, draw in pieces for i in range(images)[image] for d in range(draws)[draw]]
        assert sorted(pairs) == [(i, d) for i in range(images) for d in range(draws)], (images, draws, rows)
        assert all(1 <= length(image) * length(draw) <= rows for image, draw in pieces), (images, draws, rows)


def test_chunks_go_image_by_image_and_keep_the_draws_together(cases):
    for images, draws, rows in cases:
        pieces = list(plan.chunks(images, draws, rows))
        starts = [(image.start, draw.start) for image, draw in pieces]
        assert starts == sorted(starts)
        if rows >= draws:
            assert all(draw == slice(0, draws) for _, draw in pieces)
        else:
            assert all(length(image) == 1 for image, _ in pieces)
        for sizes in ({length(image) for image, _ in pieces}, {length(draw) for _, draw in pieces}):
            assert max(sizes) - min(sizes) <= 1, (images, draws, rows)
        # As few pieces as the rows allow: in each direction, one piece fewer would not hold everything.
        assert len({image.start for image, _ in pieces}) == -(-images // max(1, rows // draws))
        assert len({draw.start for _, draw in pieces}) == -(-draws // rows)


def test_no_images_no_chunks():
    assert list(plan.chunks(0, 10, 80)) == []
