"""The attention masks against the drawings in their own docstring, and the decoder's against a loop."""

import jaxtyping
import numpy as np
import pytest

from qformer_jax.models import masks

NAMES = {'ITC': masks.unimodal, 'ITM': masks.bidirectional, 'ITG': masks.multimodal_causal}
WIDTH = 26  # characters a drawing takes in the docstring


def drawings() -> dict[str, np.ndarray]:
    """Return {'ITC': [5, 5] bool, ...}: an x means "may be seen"."""
    lines = masks.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if 'ITC' in line)
    titles, header, *rows = lines[start : start + 7]
    found = {}
    for name in NAMES:
        left = titles.index(name)
        columns = [i for i in range(left, min(left + WIDTH, len(header))) if header[i] != ' ']
        assert ''.join(header[i] for i in columns) == 'qqtt.'
        found[name] = np.array([[row.ljust(90)[i] == 'x' for i in columns] for row in rows])
    return found


@pytest.mark.parametrize('name', NAMES)
def test_mask_is_as_drawn(name):
    mask = NAMES[name](2, np.array([[True, True, False]]))
    np.testing.assert_array_equal(mask[0, 0], drawings()[name])


def test_the_drawings_differ():
    assert len({drawing.tobytes() for drawing in drawings().values()}) == 3


@pytest.mark.parametrize('mask', NAMES.values())
def test_rows_have_masks_of_their_own(mask):
    valid = np.array([[True, False, False], [True, True, True]])
    both = mask(2, valid)
    for row in range(2):
        np.testing.assert_array_equal(both[row], mask(2, valid[row : row + 1])[0])


def test_decoder_mask_worked_example():
    mask = masks.decoder(np.array([[False, True, True, True]]), 2, 2)
    np.testing.assert_array_equal(mask[0, 0], [[0, 1, 1, 0], [0, 1, 1, 1]])


def test_positions_skip_padding_on_either_side():
    valid = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(masks.positions(valid), [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])


def test_shapes_in_signatures_are_checked_while_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError, match='text_mask'):
        masks.unimodal(2, np.ones((1, 3, 1), bool))
