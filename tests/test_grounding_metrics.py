"""IoU and what is made of it, against pixels that are counted."""

import numpy as np
import pytest

from qformer_jax.boxes import Grounded
from qformer_jax.evaluation import grounding

SIDE = 40


def drawn(count: int, seed: int) -> np.ndarray:
    """Return boxes with corners on a grid of SIDE, so that pixels count areas exactly."""
    ends = np.sort(np.random.default_rng(seed).permuted(np.tile(np.arange(SIDE + 1), (2 * count, 1)), axis=1)[:, :2])
    return ends.reshape(count, 2, 2).transpose(0, 2, 1).reshape(count, 4) / SIDE


def painted(box: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = np.round(box * SIDE).astype(int)
    pixels = np.zeros((SIDE, SIDE), bool)
    pixels[y0:y1, x0:x1] = True
    return pixels


def test_iou_is_that_of_painted_boxes():
    a, b = drawn(300, 0), drawn(300, 1)
    expected = [(painted(x) & painted(y)).sum() / (painted(x) | painted(y)).sum() for x, y in zip(a, b, strict=True)]
    found = grounding.iou(a, b)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found == 0).any() and (found > 0.5).any()
    np.testing.assert_allclose(grounding.iou(a, a), 1)
    np.testing.assert_array_equal(found, grounding.iou(b, a))


def test_an_answer_is_as_good_as_the_true_box_that_it_fits_best():
    half, all_, corner = (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0), (0.9, 0.9, 1.0, 1.0)
    answers = [half, half, None, corner]
    found = grounding.fits(answers, [[all_], [corner, all_, half], [all_], [half]])
    np.testing.assert_allclose(found, [0.5, 1, 0, 0])


def test_the_first_box_of_a_text_counts():
    a, b = (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)
    assert grounding.first(Grounded((('x', (a, b)), ('y', (b,))), 1)) == a
    assert grounding.first(Grounded((), 2)) is None


def test_the_blind_box_fits_most():
    """Where boxes lie in two places the mean lies between them and fits none."""
    left, right = (0.0, 0.0, 0.2, 0.2), (0.8, 0.8, 1.0, 1.0)
    assert grounding.blind([right, *[left] * 3]) == pytest.approx(left)
    assert grounding.blind([left, *[right] * 3]) == pytest.approx(right)
