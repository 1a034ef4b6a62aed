"""Every source yields the records it holds, and says in one line what is wrong with the others."""

import json
from itertools import islice

import numpy as np
import pytest
from data_sets import png, write_lines

from qformer_jax.data import sources
from qformer_jax.data.sources import coco, easy_vqa, features, folder
from qformer_jax.errors import UserError


def test_easy_vqa_has_the_official_splits_and_derived_captions():
    train = list(islice(easy_vqa()['train'], 100))
    assert train[1].image_id == '1.png'
    assert all(len(r.questions) == len(r.answers) and r.image.startswith(b'\x89PNG') for r in train)
    for record in train:
        asked = dict(zip(record.questions, record.answers, strict=True))
        for caption in record.captions:
            _, colour, shape = caption.split()
            assert asked.get('what color is the shape?', (colour,)) == (colour,)
            assert asked.get('what shape is in the image?', (shape,)) == (shape,)
    assert {len(r.captions) for r in train} == {0, 1}


@pytest.mark.parametrize('split, total, stated', [('train', 4000, 3542), ('test', 1000, 880)])
def test_easy_vqa_states_shape_and_colour_as_often_as_known(split, total, stated, monkeypatch):
    monkeypatch.setattr(sources, 'read_picture', lambda file: b'')
    records = list(easy_vqa()[split])
    assert (len(records), sum(len(r.captions) for r in records)) == (total, stated)


def test_only_statements_make_a_caption():
    say = sources._easy_caption
    assert say([('is there a red shape?', 'yes'), ('what shape is present?', 'circle')]) == ('a red circle',)
    assert say([('is there not a red shape?', 'no'), ('is a circle present?', 'yes')]) == ('a red circle',)
    assert say([('is there a red shape?', 'no'), ('what shape is present?', 'circle')]) == ()
    assert say([('is there not a red shape?', 'yes'), ('what shape is present?', 'circle')]) == ()


def test_a_folder_is_train_and_sub_folders_are_splits(tmp_path):
    questions = [{'question': 'what is it?', 'answers': ['red', 'a colour']}]
    write_lines(tmp_path / 'train', {'file': 'a.png', 'caption': ' a red half '})
    write_lines(tmp_path / 'test', {'file': 'a.png', 'captions': ['one', 'two'], 'questions': questions})
    for split in ('train', 'test'):
        (tmp_path / split / 'a.png').write_bytes(png('red'))
    assert [r.captions for r in folder(tmp_path / 'train')['train']] == [('a red half',)]
    assert set(folder(tmp_path)) == {'train', 'test'}
    (record,) = folder(tmp_path)['test']
    assert record.image == png('red')
    assert record.captions == ('one', 'two')
    assert (record.questions, record.answers) == (('what is it?',), (('red', 'a colour'),))


@pytest.mark.parametrize(
    'line, message',
    [
        ('{"file": "a.png"', r'line 2: not JSON'),
        ({'file': 'a.png'}, r'line 2: neither a caption nor a question nor a phrase'),
        ({'file': 'a.png', 'caption': '  '}, r'line 2: an empty caption'),
        ({'file': 'a.png', 'captions': []}, r'line 2: neither a caption nor a question'),
        ({'file': 'a.png', 'captoin': 'x'}, r"line 2: unknown key 'captoin' \(nearest: 'caption'\)"),
        ({'caption': 'x'}, r'line 2: expected an object with "file"'),
        ({'file': 'b.png', 'caption': 'x'}, r"b\.png: no such picture \(nearest: 'bad\.png'\) \(named in .*line 2\)"),
        ({'file': 'bad.png', 'caption': 'x'}, r'bad\.png: .*\(named in .*line 2\)'),
        ({'file': 'a.png', 'questions': [{'question': 'x'}]}, r'line 2: expected "questions"'),
        ({'file': 'a.png', 'questions': [{'question': 'x', 'answers': []}]}, r'line 2: an empty question, or'),
        ({'file': 'a.png', 'phrases': [{'phrase': 'x'}]}, r'line 2: expected "phrases": \[\{"phrase": "a cat"'),
        ({'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': ['a']}]}, r'line 2: expected "phrases"'),
        ({'file': 'a.png', 'phrases': [{'phrase': ' ', 'box': [0, 0, 1, 1]}]}, r'line 2: an empty phrase'),
        (
            {'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': [0, 0, 1]}]},
            r"line 2: 'x' has box \[0\.0, 0\.0, 1\.0\]",
        ),
        ({'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': [0, 9, 24, 24]}]}, r'as shares of width and height'),
        ({'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': [0, 0.5, 1, 0.5]}]}, r'left < right, top < bottom'),
        ({'file': 'a.png', 'frames': ['a.png'], 'caption': 'x'}, r'line 2: expected an object with "file" \(or a list'),
        ({'frames': [], 'caption': 'x'}, r'line 2: expected an object with "file"'),
        ({'frames': ['a.png', 'b.png'], 'caption': 'x'}, r'b\.png: no such picture'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    write_lines(tmp_path, {'file': 'a.png', 'caption': 'fine'}, line)
    (tmp_path / 'a.png').write_bytes(png('red'))
    (tmp_path / 'bad.png').write_bytes(png('red')[:-30])
    with pytest.raises(UserError, match=message) as error:
        list(folder(tmp_path)['train'])
    assert '\n' not in str(error.value)


def test_phrases_come_with_boxes_and_videos_with_frames(tmp_path):
    phrase = {'phrase': ' red half', 'box': [0, 0, 0.5, 1]}
    write_lines(tmp_path / 'train', {'file': 'a.png', 'phrases': [phrase]})
    write_lines(tmp_path / 'test', {'frames': ['b.png', 'a.png'], 'caption': 'red comes'})
    for split in ('train', 'test'):
        (tmp_path / split / 'a.png').write_bytes(png('red'))
        (tmp_path / split / 'b.png').write_bytes(png('blue'))
    found = folder(tmp_path)
    (still,) = found['train']
    assert (still.image, still.frames, still.phrases) == (png('red'), (), (('red half', (0.0, 0.0, 0.5, 1.0)),))
    (video,) = found['test']
    assert (video.image_id, video.image, video.frames) == ('b.png', None, (png('blue'), png('red')))
    with pytest.raises(UserError, match='"frames" are pictures'):
        list(features(tmp_path / 'test')['train'])


def test_a_folder_without_captions_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no 'captions\.jsonl' in it"):
        folder(tmp_path)
    write_lines(tmp_path / 'train', {'file': 'a.png', 'caption': 'x'})
    (tmp_path / 'val').mkdir()
    with pytest.raises(UserError, match=r"no 'captions\.jsonl' in sub folder 'val'"):
        folder(tmp_path)
    with pytest.raises(UserError, match=r"no such folder \(nearest: 'train'\)"):
        folder(tmp_path / 'trian')


def test_feature_arrays_are_read_with_their_dtype(tmp_path):
    write_lines(tmp_path, {'file': 'a.npy', 'caption': 'x'}, {'file': 'b.npy', 'caption': 'y'})
    np.save(tmp_path / 'a.npy', np.ones((3, 4), np.float64))
    np.save(tmp_path / 'b.npy', np.ones((5, 4), np.float16))
    a, b = features(tmp_path)['train']
    assert (a.features.shape, a.features.dtype, a.image) == ((3, 4), np.float32, None)
    assert (b.features.shape, b.features.dtype) == ((5, 4), np.float16)


@pytest.mark.parametrize(
    'array, message',
    [
        (np.ones((3, 5), np.float32), r'has 5 columns \(V\), the files before it 4'),
        (np.ones(4, np.float32), r'b\.npy: expected floats \[P, V\], found float32 \[4\]'),
        (np.ones((3, 4), np.int32), r'b\.npy: expected floats'),
        (np.full((3, 4), np.nan, np.float32), r'b\.npy: holds values that are not finite'),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    write_lines(tmp_path, {'file': 'a.npy', 'caption': 'x'}, {'file': 'b.npy', 'caption': 'y'})
    np.save(tmp_path / 'a.npy', np.ones((3, 4), np.float32))
    np.save(tmp_path / 'b.npy', array)
    with pytest.raises(UserError, match=message):
        list(features(tmp_path)['train'])


@pytest.fixture
def coco_folder(tmp_path):
    """A COCO folder of two pictures, with VQAv2 questions for the first."""
    for sub in ('annotations', 'train2014'):
        (tmp_path / sub).mkdir()
    for number in (1, 2):
        (tmp_path / 'train2014' / f'{number}.jpg').write_bytes(png('red'))
    write = lambda name, tree: (tmp_path / 'annotations' / name).write_text(json.dumps(tree))  # noqa: E731
    images = [{'id': i, 'file_name': f'{i}.jpg'} for i in (1, 2)]
    captions = [{'id': 7, 'image_id': 2, 'caption': 'two\n'}, {'id': 8, 'image_id': 2, 'caption': 'a pair'}]
    write('captions_train2014.json', {'images': images, 'annotations': captions})
    asked = [{'question_id': 10, 'image_id': 1, 'question': 'what?'}]
    write('v2_OpenEnded_mscoco_train2014_questions.json', {'questions': asked})
    answers = [{'question_id': 10, 'answers': [{'answer': 'a'}, {'answer': 'a'}, {'answer': 'b'}]}]
    write('v2_mscoco_train2014_annotations.json', {'annotations': answers})
    return tmp_path


def test_coco_joins_captions_and_questions(coco_folder):
    splits = coco(coco_folder)
    first, second = splits['train']
    assert (first.captions, first.questions, first.answers) == ((), ('what?',), (('a', 'a', 'b'),))
    assert (second.image_id, second.captions, second.questions) == ('2.jpg', ('two', 'a pair'), ())


def test_coco_with_a_missing_part_is_refused(coco_folder):
    (coco_folder / 'annotations' / 'v2_mscoco_train2014_annotations.json').unlink()
    with pytest.raises(UserError, match=r'expected one .*train2014_annotations'):
        list(coco(coco_folder)['train'])
    with pytest.raises(UserError, match='captions_'):
        coco(coco_folder / 'train2014')
