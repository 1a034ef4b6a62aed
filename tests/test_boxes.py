"""Boxes as words: there and back, against KOSMOS-2's processor, and texts that are no boxes."""

import numpy as np
import pytest
from transformers.models.kosmos2 import processing_kosmos2 as kosmos2

from qformer_jax import boxes
from qformer_jax.errors import UserError

A, B = '<patch_index_0044>', '<patch_index_0863>'
SNOWMAN = (0.390625, 0.046875, 0.984375, 0.828125)  # the centres of cells 44 and 863 of 32 x 32


def drawn(count: int, seed: int = 0) -> list[boxes.Box]:
    """Return boxes of all sizes, thinner than a cell too, and such with corners between cells."""
    draw = np.random.default_rng(seed)
    corner = draw.random((count, 2)) * 0.99
    size = (1 - corner) * draw.random((count, 2)) ** draw.choice([0.5, 1, 4], (count, 1))
    rows = np.concatenate([corner, corner + np.maximum(size, 1e-4)], axis=1)
    rows[::4] = (
        np.stack([np.floor(rows[::4] * 32), np.floor(rows[::4] * 32) + 1], axis=1)[:, [0, 0, 1, 1], range(4)] / 32
    )
    return [tuple(row) for row in rows.tolist()]


@pytest.mark.parametrize('grid', [32, 16])
def test_words_and_boxes_are_those_of_kosmos_2(grid):
    for box in drawn(500):
        pair = boxes.cells(box, grid)
        assert pair == kosmos2.coordinate_to_patch_index(box, grid)
        assert boxes.box_between(*pair, grid) == pytest.approx(kosmos2.patch_index_to_coordinate(*pair, grid))


@pytest.mark.parametrize('grid', [32, 7, 1])
def test_no_side_moves_by_more_than_half_a_cell(grid):
    """Or by a whole one where the corners share a row or a column."""
    thin = 0
    for box in drawn(1000, seed=grid):
        first, last = boxes.cells(box, grid)
        assert 0 <= first <= last < grid * grid
        shared = first // grid == last // grid or first % grid == last % grid
        moved = np.abs(np.subtract(boxes.box_between(first, last, grid), box)).max() * grid
        assert moved <= (1 if shared else 0.5) + 1e-9, box
        thin += shared
    assert thin > 100 and (thin < 900 or grid == 1)


def test_a_corner_on_a_line_belongs_to_the_cell_inside():
    assert boxes.cells((0.25, 0.25, 0.5, 0.5), 4) == (5, 5)
    assert boxes.cells((0.0, 0.0, 1.0, 1.0), 4) == (0, 15)
    assert boxes.cells((0.25, 0.0, 0.51, 1.0), 4) == (1, 14)


@pytest.mark.parametrize(
    'box',
    [(0.0, 0.0, 0.0, 1.0), (0.5, 0.0, 0.4, 1.0), (0.0, 0.0, 1.0, 1.1), (-0.1, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, np.nan)],
)
def test_what_is_no_box_is_named(box):
    with pytest.raises(UserError, match='must be'):
        boxes.cells(box, 32)


def test_texts_are_those_of_kosmos_2():
    text = f'<grounding> An image of<phrase> a snowman</phrase><object>{A}{B}</object> at<phrase> a fire</phrase>'
    text += f'<object>{B[:-5]}0005>{B}</delimiter_of_multi_objects/>{A}{B}</object>.'
    clean, entities = kosmos2.clean_text_and_extract_entities_with_bboxes(text)
    found = boxes.read(text, 32)
    assert found.dropped == 0
    assert [(phrase, list(places)) for phrase, places in found.found] == [
        (name, places) for name, _, places in entities
    ]
    assert boxes.plain(text).strip() == clean
    spelled = boxes.ask('a snowman') + boxes.spell([SNOWMAN, SNOWMAN], 32)
    assert boxes.read(spelled, 32).found == (('a snowman', (SNOWMAN, SNOWMAN)),)
    assert (
        spelled == f'<grounding><phrase>a snowman</phrase><object>{A}{B}</delimiter_of_multi_objects/>{A}{B}</object>'
    )


def test_every_word_is_a_word_once_and_in_the_text():
    words = boxes.words(32)
    assert len(words) == len(set(words)) == 6 + 1024
    assert words[6 + 863] == B
    assert boxes.plain(''.join(words)) == ''


@pytest.mark.parametrize(
    ('text', 'count', 'dropped'),
    [
        ('', 0, 0),
        ('no place', 0, 0),
        (f'<object>{A}{B}</object>', 1, 0),
        (f'<object> {A} {B} </object>', 1, 0),
        (f'<object>{A}{B}', 0, 1),
        (f'{A}{B}</object>', 0, 1),
        (f'{A}{B}', 0, 1),
        (f'<object>{A}</object>', 0, 1),
        (f'<object>{A}{B}{A}</object>', 0, 1),
        ('<object></object>', 0, 1),
        (f'<object>{B}{A}</object>', 0, 1),
        ('<object><patch_index_0044><patch_index_1024></object>', 0, 1),
        ('<object><patch_index_0044><patch_index_999999999></object>', 0, 1),
        (f'<object>{A}<patch_index_{"9" * 5000}></object>', 0, 2),
        ('<object><patch_index_0031><patch_index_0032></object>', 0, 1),
        (f'<object>{A}{B}</delimiter_of_multi_objects/></object>', 1, 1),
        (f'<object>{A}{B}</delimiter_of_multi_objects/>{B}{A}</object>', 1, 1),
        (f'<object><object>{A}{B}</object>', 1, 1),
        (f'<object>{A} red {B}</object>', 0, 2),
        (f'<phrase>a<phrase>b</phrase><object>{A}{B}</object></phrase>', 1, 0),
    ],
)
def test_what_is_malformed_is_dropped_and_counted(text, count, dropped):
    found = boxes.read(text, 32)
    assert sum(len(places) for _, places in found.found) == count
    assert found.dropped == dropped


def test_no_text_is_too_wild():
    """Soups of words never raise, and every box that comes out of one can be spelled again."""
    draw, pieces = np.random.default_rng(0), [*boxes.words(3), ' ', 'red', '<', '<patch_index_', '7>', '</', '\n']
    checked = 0
    for _ in range(2000):
        soup = ''.join(draw.choice(pieces, draw.integers(9)).tolist())
        found = boxes.read(f'{soup}<object>{"".join(draw.choice(pieces[6:15], 2))}</object>{soup}', 3)
        for _, places in found.found:
            checked += len(places)
            assert boxes.read(boxes.spell(places, 3), 3).found == (('', places),)
    assert checked > 200
