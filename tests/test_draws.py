"""Law 1: a draw is a function of (use, seed, epoch, sample, view), and no two of these share a stream."""

from itertools import product

import numpy as np
import pytest

from schematics.draws import LARGEST, Use, draw


def test_no_two_of_the_four_numbers_share_a_stream():
    quadruples = [(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
    quadruples += [
        (0, 0, 2**32, 0),
        (0, 2**32, 0, 0),
        (2**32, 0, 0, 0),
        (0, 0, 0, 2**32),
        (0, 0, 123456789, 1),
    ]
    first = {draw(Use.VIEWS, *q).integers(2**63) for q in quadruples}
    assert len(first) == len(quadruples)
    # Nor does one stream run into the next: the draws of one are not found shifted in another.
    draws = [draw(Use.VIEWS, 0, 0, 0, view).integers(2**63, size=2000) for view in range(3)]
    assert len(np.unique(draws)) == 6000


def test_no_two_uses_epochs_samples_or_views_share_a_first_block():
    numbers = (0, 1, 2, 3, 2**31, 2**32, 2**63 - 1)
    arguments = list(product(Use, numbers, numbers, numbers, (0, 1, 2)))
    blocks = np.array([draw(*each).bit_generator.random_raw(4) for each in arguments])
    assert len(np.unique(blocks)) == 4 * len(arguments)


def test_a_draw_depends_on_its_arguments_alone():
    first = draw(Use.DETECTION_WINDOW, 2**63 - 1, 4, 5, 6).random(9)
    np.random.seed(0)
    draw(Use.DETECTION_ORDER, 1).random(3)
    np.testing.assert_array_equal(draw(Use.DETECTION_WINDOW, 2**63 - 1, 4, 5, 6).random(9), first)


def test_views_have_the_streams_that_they_always_had():
    for seed, epoch, sample, view in [(0, 0, 0, 0), (7, 1, 12345, 2), (2**63 - 1, 99, 2**40, 1)]:
        before = np.random.Generator(np.random.Philox(key=seed, counter=[0, view, sample, epoch]))
        after = draw(Use.VIEWS, seed, epoch, sample, view)
        np.testing.assert_array_equal(after.integers(2**63, size=50), before.integers(2**63, size=50))


@pytest.mark.parametrize("name", ["seed", "epoch", "sample", "view"])
def test_an_argument_out_of_range_is_an_error(name):
    numbers = {"seed": 1, "epoch": 1, "sample": 1, "view": 1}
    draw(Use.VIEWS, **numbers | {name: LARGEST})
    draw(Use.VIEWS, **numbers | {name: np.int64(3)})
    for wrong in (-1, LARGEST + 1, 2**70):
        with pytest.raises(ValueError, match=f"{name} must be from 0 to"):
            draw(Use.VIEWS, **numbers | {name: wrong})
    with pytest.raises(TypeError):
        draw(Use.VIEWS, **numbers | {name: 1.5})
