"""Windows: paper is what is most frequent, blank paper is skipped, tiles cover the sheet."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schematics.windows import (
    cut,
    ink_mask,
    ink_windows,
    line_width,
    paper_color,
    starts,
    tile_sheet,
    uneven_paper,
)


def jpeg(image, quality=60):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], -1)


@pytest.mark.parametrize("paper", [255, 0, 33, 247, 248, (20, 30, 45), (250, 248, 235)])
def test_paper_is_the_most_frequent_color_dark_or_light(paper):
    shape = (300, 400) if isinstance(paper, int) else (300, 400, 3)
    image = np.empty(shape, np.uint8)
    image[:] = paper
    image[40:120, 50:90] = 128
    assert paper_color(image) == paper
    noisy = jpeg(image)
    np.testing.assert_allclose(paper_color(noisy), paper, atol=3)


@pytest.mark.parametrize("paper, ink", [(255, 0), (15, 200), ((20, 30, 45), (200, 60, 60))])
def test_ink_survives_jpeg_and_paper_gives_none(paper, ink):
    image = np.empty((256, 256) if isinstance(paper, int) else (256, 256, 3), np.uint8)
    image[:] = paper
    image[100:102, 20:220] = ink
    drawn = ink_mask(image)
    assert drawn.sum() == 400
    seen = ink_mask(jpeg(image, 75))
    assert (seen & drawn).sum() >= 380  # the line is found
    assert seen[:90].sum() + seen[112:].sum() == 0  # and no noise far from it


def test_ink_in_one_color_channel_counts():
    image = np.full((64, 64, 3), 255, np.uint8)
    image[30:32, :, 2] = 0  # yellow on white
    assert ink_mask(image).sum() == 128


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 120), st.integers(4, 60), st.integers(0, 999))
def test_ink_windows_equal_a_count_of_every_window(width, height, side, stride, seed):
    rng = np.random.default_rng(seed)
    image = np.where(rng.random((height, width)) < 0.002, 0, 255).astype(np.uint8)
    got = ink_windows(image, side, stride, min_ink=0.003, paper=255).tolist()
    want = [
        [x, y]
        for y in starts(height, side, stride)
        for x in starts(width, side, stride)
        if (image[y : y + side, x : x + side] == 0).sum() >= max(1, 0.003 * side * side)
    ]
    assert got == want


def test_blank_paper_has_no_window_and_a_small_sheet_has_one():
    blank = np.full((1000, 1000), 255, np.uint8)
    assert ink_windows(blank, 256, 128, 0.001).shape == (0, 2)
    small = np.full((90, 120), 255, np.uint8)
    small[40:44, 10:110] = 0
    assert ink_windows(small, 256, 128, 0.001).tolist() == [[0, 0]]


def test_cut_pads_with_paper_and_copies():
    image = np.full((50, 80, 3), (10, 20, 30), np.uint8)
    image[5, 5] = 255
    window = cut(image, -4, 3, 96)
    assert window.shape == (96, 96, 3)
    assert (window[2, 9] == 255).all() and (window == [10, 20, 30]).all(axis=2).sum() == 96 * 96 - 1
    inside = cut(image, 0, 0, 40)
    inside[:] = 0
    assert image.max() == 255


def squared_paper(color: bool, dark: bool = False, shadow: float = 0.35) -> tuple[np.ndarray, np.ndarray]:
    """Squared paper of 600 x 800 px with a shadow and lines drawn by a pen; and where the pen was."""
    paper = np.full((600, 800), 235.0)
    paper[::20], paper[:, ::20] = 190, 190
    pen = np.zeros((600, 800), np.uint8)
    for k in range(5):
        cv2.circle(pen, (100 + 140 * k, 150 + 70 * k), 40, 1, 4)
        cv2.rectangle(pen, (60 + 140 * k, 420), (150 + 140 * k, 470), 1, 3)
    paper[pen == 1] = 50
    paper *= np.linspace(shadow, 1, 800)[None]
    image = (255 - paper if dark else paper).astype(np.uint8)
    return (np.dstack([image, image // 8 * 7, image // 8 * 6]) if color else image), pen == 1


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("dark", [False, True])
def test_ink_on_shaded_squared_paper_is_what_the_pen_drew(color, dark):
    image, pen = squared_paper(color, dark)
    assert ink_mask(image).mean() > 5 * pen.mean()  # one color of paper takes the shadow for ink
    uneven = uneven_paper(image)
    ink = ink_mask(image, uneven.paper(0, *image.shape[:2]), uneven.tolerance)
    assert (ink & pen).sum() > (0.6 if dark else 0.9) * pen.sum() and (ink & ~pen).sum() < 0.1 * pen.sum()


def test_paper_of_one_color_is_even_be_there_much_ink_or_none():
    for image in (np.full((500, 700), 255, np.uint8), np.full((500, 700, 3), 30, np.uint8)):
        assert uneven_paper(image) is None
        for at in range(0, 500, 20):
            image[at : at + 5] = 128
        assert uneven_paper(image) is None


def test_windows_of_an_uneven_sheet_are_those_with_ink_on_the_whole_of_it():
    image, _ = squared_paper(color=True)
    uneven = uneven_paper(image)
    ink = ink_mask(image, uneven.paper(0, 600, 800), uneven.tolerance)
    got = ink_windows(image, 90, 37, 0.003, uneven=uneven).tolist()
    places = [[x, y] for y in starts(600, 90, 37) for x in starts(800, 90, 37)]
    assert got == [[x, y] for x, y in places if ink[y : y + 90, x : x + 90].sum() >= 0.003 * 90 * 90]
    assert len(got) < 0.9 * len(ink_windows(image, 90, 37, 0.003))


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_the_width_of_lines(width):
    ink = np.zeros((300, 400), bool)
    ink[100 : 100 + width, 20:380] = ink[20:280, 200 : 200 + width] = True
    assert abs(line_width(ink) - width) < 0.1
    assert line_width(np.zeros((9, 9), bool)) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(200, 1000), st.data())
def test_tiles_cover_the_sheet_with_the_asked_overlap(width, height, side, data):
    overlap = data.draw(st.integers(0, side // 2))
    tiles = tile_sheet(width, height, side, overlap)
    assert tiles.dtype == np.int64
    for low, high, length in ((0, 2, width), (1, 3, height)):
        spans = np.unique(tiles[:, [low, high]], axis=0)
        assert spans[0, 0] == 0 and spans[-1, 1] == length
        assert (spans[:, 1] - spans[:, 0] == min(side, length)).all()
        assert (spans[:-1, 1] - spans[1:, 0] >= overlap).all()
    assert len(np.unique(tiles, axis=0)) == len(tiles)


def test_a_small_sheet_is_one_tile():
    assert tile_sheet(300, 200, 512, 64).tolist() == [[0, 0, 300, 200]]


def test_impossible_overlap_is_refused():
    with pytest.raises(ValueError, match="overlap"):
        tile_sheet(100, 100, 64, 64)
