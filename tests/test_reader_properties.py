"""What readers of a user's files do with anything: it is read as it says, or refused in one line (hypothesis)."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from data_sets import png, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from qformer_jax.data import arrays, sources
from qformer_jax.errors import UserError

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)  # the same examples every time
texts = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=40)  # no halves of surrogate pairs
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

KEYS = 'id', 'file_name', 'image_id', 'caption'


@contextmanager
def picture_folder(*lines: object) -> Iterator[Path]:
    """Lend a folder with one picture and a captions.jsonl of these lines."""
    with tempfile.TemporaryDirectory() as folder:
        write_lines(Path(folder), *lines)
        (Path(folder) / 'a.png').write_bytes(png('red'))
        yield Path(folder)


def read(folder: Path) -> list | None:
    """Return the records of `train`, or None where they are refused, in one line."""
    try:
        return list(sources.folder(folder)['train'])
    except UserError as error:
        assert '\n' not in str(error)
        return None


@few
@given(texts, st.booleans())
def test_any_text_is_a_caption(text, escaped):
    """Also one that holds what Unicode calls an end of a line; blanks around it go."""
    with picture_folder(json.dumps({'file': 'a.png', 'caption': text}, ensure_ascii=escaped)) as folder:
        records = read(folder)
    assert records is None if not text.strip() else [record.captions for record in records] == [(text.strip(),)]


@few
@given(st.lists(st.floats(-0.5, 1.5) | st.sampled_from([0.0, 1.0, float('nan'), float('inf')]), max_size=5))
def test_a_box_is_four_shares_in_order(box):
    legal = len(box) == 4 and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
    with picture_folder({'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': box}]}) as folder:
        records = read(folder)
    assert records is None if not legal else records[0].phrases == (('x', tuple(box)),)


@few
@given(st.sampled_from(['file', 'frames', 'caption', 'captions', 'questions', 'phrases', 'box', 'other']), json_values)
def test_any_value_of_a_key_is_read_as_it_says_or_refused(key, value):
    line = {'file': 'a.png', 'caption': 'x'} | {key: value}
    with picture_folder(line) as folder:
        records = read(folder)
    if records:
        assert list(records[0].captions) == [text.strip() for text in line.get('captions', [line.get('caption')])]
        assert isinstance(line.get('questions', []), list) and isinstance(line.get('phrases', []), list)


@few
@given(st.sampled_from(['images', 'annotations']), st.sampled_from(KEYS), json_values)
def test_any_value_of_a_row_of_coco_is_read_as_it_says_or_refused(table, key, value):
    tree = {'images': [{'id': 1, 'file_name': 'a.png'}], 'annotations': [{'image_id': 1, 'caption': 'x'}]}
    tree[table][0][key] = value
    with picture_folder() as folder:
        (folder / 'annotations').mkdir()
        (folder / 'train').mkdir()
        (folder / 'a.png').rename(folder / 'train' / 'a.png')
        (folder / 'annotations' / 'captions_train.json').write_text(json.dumps(tree))
        try:
            (record,) = sources.coco(folder)['train']
        except UserError as error:
            assert '\n' not in str(error)
            return
    assert record.captions == (tree['annotations'][0]['caption'].strip(),)


@few
@given(
    arrays_of.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, '>f4']),
        arrays_of.array_shapes(max_dims=3, min_side=0, max_side=3),
    )
)
def test_an_array_is_finite_and_has_two_axes_or_is_refused(array):
    with np.errstate(all='ignore'):
        finite = np.isfinite(array.astype(np.float32)).all()
    if array.ndim == 2 and array.size and finite:
        np.testing.assert_array_equal(arrays.checked(array, 'x'), array.astype(np.float32))
    else:
        with pytest.raises(UserError, match=r'^x: '):
            arrays.checked(array, 'x')
