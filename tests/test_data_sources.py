"""Every source yields the records it holds, and says in one line what is wrong with the others."""

import hashlib
import io
import json
from itertools import islice

import numpy as np
import pytest
from data_sets import png, write_lines
from PIL import Image

from qformer_jax.data import jsonl, sources
from qformer_jax.data.jsonl import read_features
from qformer_jax.data.sources import coco, easy_vqa, features, folder
from qformer_jax.errors import UserError


def test_easy_vqa_has_the_official_splits_and_derived_captions():
    train = list(islice(easy_vqa()['train'], 100))
    assert train[1].image_id == '1.png'
    assert all(len(r.questions) == len(r.answers) and r.image.startswith(b'\x89PNG') for r in train)
    for record in train:
        questions = dict(zip(record.questions, record.answers, strict=True))
        for caption in record.captions:
            _, colour, shape = caption.split()
            assert questions.get('what color is the shape?', (colour,)) == (colour,)
            assert questions.get('what shape is in the image?', (shape,)) == (shape,)
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
        (
            {'file': 'a.png', 'questions': [{'question': 'x'}]},
            r'line 2: .*required field `answers` - at `questions\[0\]`',
        ),
        ({'file': 'a.png', 'questions': [{'question': 'x', 'answers': 'yes'}]}, r'line 2: .* - at `questions\[0\].ans'),
        (
            {'file': 'a.png', 'questions': [{'question': 'x', 'answers': [1]}]},
            r'got `int` - at `questions\[0\].answers',
        ),
        ({'file': 'a.png', 'questions': [{'question': ' ', 'answers': ['x']}]}, r'line 2: an empty question, or'),
        ({'file': 'a.png', 'questions': [{'question': 'x', 'answers': ['x', ' ']}]}, r'line 2: an empty question, or'),
        (
            {'file': 'a.png', 'questions': [{'question': 'x', 'answers': ['x'], 'file': 1}]},
            r'`file` - at `questions\[0',
        ),
        ({'file': 'a.png', 'questions': {'question': 'x', 'answers': ['x']}}, r'`array`, got `object` - at `questions'),
        ({'file': 'a.png', 'questions': None, 'caption': 'x'}, r'got `null` - at `questions`'),
        ({'file': 'a.png', 'caption': None, 'captions': ['x']}, r'got `null` - at `caption`'),
        ({'file': 'a.png', 'captions': 'a text'}, r'got `str` - at `captions`'),
        ({'file': 'a.png', 'captions': ['x', '']}, r'line 2: an empty caption'),
        ({'file': 'a.png', 'caption': 'x', 'captions': ['y']}, r'line 2: "caption" beside "captions"'),
        ({'file': '', 'caption': 'x'}, r'line 2: no frame, or an empty name'),
        ({'frames': ['a.png', ''], 'caption': 'x'}, r'line 2: no frame, or an empty name'),
        ({'frames': 'a.png', 'caption': 'x'}, r'got `str` - at `frames`'),
        ({'file': 'a\0.png', 'caption': 'x'}, r'no such picture'),
        ({'file': 'a' * 300, 'caption': 'x'}, r'no such picture'),
        ({'file': 'a.png/b', 'caption': 'x'}, r'no such picture'),
        ({'file': '.', 'caption': 'x'}, r'no such picture'),
        ('[]', r'line 2: Expected `object`, got `array`'),
        ('null', r'line 2: Expected `object`, got `null`'),
        ('{"file": "a.png", "caption": "\\ud800"}', r'line 2: holds half of a surrogate pair'),
        ('{"file": "a.png", "caption": ' + '[' * 5000 + ']' * 5000 + '}', r'line 2: nested deeper than 100 levels'),
        ('{"file": "a.png", "phrases": ' + '9' * 5000 + '}', r'line 2: holds a whole number of thousands of digits'),
        ('\u2028', r'line 2: not JSON'),
        ({'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': '0011'}]}, r'got `str` - at `phrases\[0\].box`'),
        ({'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': [False, 0, True, 1]}]}, r'got `bool` - at `phrases'),
        ({'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': [0, 0, 10**400, 1]}]}, r'out of range - at `phrases\[0'),
        ('{"file": "a.png", "phrases": [{"phrase": "x", "box": [NaN, 0, 1, 1]}]}', r"line 2: 'x' has box \[nan"),
        ('{"file": "a.png", "phrases": [{"phrase": "x", "box": [0, 0, 1, 1e999]}]}', r"line 2: 'x' has box \[0.*inf\]"),
        ({'file': 'a.png', 'questions': [{'question': 'x', 'answers': []}]}, r'line 2: an empty question, or'),
        (
            {'file': 'a.png', 'phrases': [{'phrase': 'x'}]},
            r'required field `box` - at `phrases\[0\]`.*"phrase": "a cat"',
        ),
        ({'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': ['a']}]}, r'got `str` - at `phrases\[0\].box'),
        ({'file': 'a.png', 'phrases': [{'phrase': ' ', 'box': [0, 0, 1, 1]}]}, r'line 2: an empty phrase'),
        (
            {'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': [0, 0, 1]}]},
            r"line 2: 'x' has box \[0\.0, 0\.0, 1\.0\]",
        ),
        ({'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': [0, 9, 24, 24]}]}, r'as shares of width and height'),
        ({'file': 'a.png', 'phrases': [{'phrase': 'x', 'box': [0, 0.5, 1, 0.5]}]}, r'left < right, top < bottom'),
        ({'file': 'a.png', 'frames': ['a.png'], 'caption': 'x'}, r'line 2: expected an object with "file" \(or a list'),
        ({'frames': [], 'caption': 'x'}, r'line 2: no frame, or an empty name'),
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


CAT = b'{"file": "a.png", "caption": "a %scat"}'


@pytest.mark.parametrize(
    'data, captions',
    [
        (CAT % '\u2028\u2029\x85'.encode(), ['a \u2028\u2029\x85cat']),
        (b'\xef\xbb\xbf' + CAT % b'' + b'\r\n \t\r\n' + CAT % b'red ' + b'\r\n', ['a cat', 'a red cat']),
        (CAT % b'\\ud83d\\ude00', ['a \U0001f600cat']),
        (b'{"file": "b.png", "file": "a.png", "caption": "a cat"}', ['a cat']),
    ],
    ids=['line ends of Unicode', 'as Windows writes it', 'a whole surrogate pair', 'a key twice'],
)
def test_lines_end_at_line_feeds_and_a_byte_order_mark_is_skipped(tmp_path, data, captions):
    (tmp_path / 'captions.jsonl').write_bytes(data)
    (tmp_path / 'a.png').write_bytes(png('red'))
    assert [r.captions for r in folder(tmp_path)['train']] == [(caption,) for caption in captions]


@pytest.mark.parametrize('encoding', ['latin-1', 'utf-16'])
def test_a_text_of_another_encoding_is_refused_with_its_line(tmp_path, encoding):
    lines = '{"file": "a.png", "caption": "plain"}\n{"file": "a.png", "caption": "caf\xe9"}\n'
    (tmp_path / 'captions.jsonl').write_bytes(lines.encode(encoding))
    (tmp_path / 'a.png').write_bytes(png('red'))
    line = {'latin-1': 'line 2: not UTF-8 text .byte 34', 'utf-16': 'line 1: not UTF-8 text .byte 1'}[encoding]
    with pytest.raises(UserError, match=line):
        list(folder(tmp_path)['train'])


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
        (np.full((3, 4), -np.inf, np.float16), r'b\.npy: holds values that are not finite'),
        (np.full((3, 4), 1e300), r'b\.npy: holds values that are not finite in float32'),
        (np.full((3, 4), np.longdouble('1e4000')), r'b\.npy: holds values that are not finite in float32'),
        (np.ones((0, 4)), r'b\.npy: '),
        (np.ones((3, 4), complex), r'b\.npy: expected floats'),
        (np.ones((3, 4), bool), r'b\.npy: expected floats'),
        (np.array([['a', 'b', 'c', 'd']]), r'b\.npy: expected floats'),
        (np.array([[1.0, None, 2.0, 3.0]]), r'b\.npy: not an \.npy array of numbers'),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    write_lines(tmp_path, {'file': 'a.npy', 'caption': 'x'}, {'file': 'b.npy', 'caption': 'y'})
    np.save(tmp_path / 'a.npy', np.ones((3, 4), np.float32))
    np.save(tmp_path / 'b.npy', array)
    with pytest.raises(UserError, match=message):
        list(features(tmp_path)['train'])


def npy(shape: str, descr: str = "'<f4'") -> bytes:
    """Return an .npy file of 48 bytes whose header claims a shape."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header + bytes(48)


def npz() -> bytes:
    np.savez(file := io.BytesIO(), x=np.ones((3, 4), np.float32))
    return file.getvalue()


@pytest.mark.parametrize(
    'data',
    [
        npz(),
        npy('(100000, 100000)'),
        npy('(4611686018427387904, 4611686018427387904)'),
        npy('(-3, 4)'),
        npy('(3, 4.0)'),
        npy('None'),
        npy('(3, 4)', 'None'),
        npy('(3, 4)', "'O'"),
        npy('((((('),
        npy('(3, 5)'),
        npy('(3, 4)')[:40],
        b'',
        b'\x93NUMPY\x09\x00',
        b'no array',
        b'\x80\x04N.',
    ],
)
def test_what_is_no_array_of_numbers_is_said_in_one_line(tmp_path, data):
    (tmp_path / 'a.npy').write_bytes(data)
    with pytest.raises(UserError, match=r'a\.npy: not an \.npy array of numbers; write it with numpy\.save'):
        read_features(tmp_path / 'a.npy')
    with pytest.raises(UserError, match=r"b\.npy: no such array \(nearest: 'a\.npy'\)"):
        read_features(tmp_path / 'b.npy')


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
    questions = [{'question_id': 10, 'image_id': 1, 'question': 'what?'}]
    write('v2_OpenEnded_mscoco_train2014_questions.json', {'questions': questions})
    answers = [{'question_id': 10, 'answers': [{'answer': 'a'}, {'answer': 'a'}, {'answer': 'b'}]}]
    write('v2_mscoco_train2014_annotations.json', {'annotations': answers})
    return tmp_path


def test_coco_joins_captions_and_questions(coco_folder):
    splits = coco(coco_folder)
    first, second = splits['train']
    assert (first.captions, first.questions, first.answers) == ((), ('what?',), (('a', 'a', 'b'),))
    assert (second.image_id, second.captions, second.questions) == ('2.jpg', ('two', 'a pair'), ())


CAPTIONS, ASKED, ANSWERED = (
    f'{name}.json'
    for name in ('captions_train2014', 'v2_OpenEnded_mscoco_train2014_questions', 'v2_mscoco_train2014_annotations')
)
TWO = [{'question_id': i, 'answers': [{'answer': 'a'}]} for i in (10, 11)]


@pytest.mark.parametrize(
    'name, change, message',
    [
        (CAPTIONS, None, 'Expected `object`, got `null`'),
        (CAPTIONS, {'images': None}, 'Expected `array`, got `null` - at `images`'),
        (CAPTIONS, {'images': [{'id': 1}]}, r'required field `file_name` - at `images\[0\]`'),
        (CAPTIONS, {'images': [{'file_name': '1.jpg'}]}, r'required field `id` - at `images\[0\]`'),
        (CAPTIONS, {'images': [{'id': 1.5, 'file_name': '1.jpg'}]}, r'got `float` - at `images\[0\].id`'),
        (CAPTIONS, {'images': [{'id': True, 'file_name': '1.jpg'}]}, r'got `bool` - at `images\[0\].id`'),
        (CAPTIONS, {'images': [{'id': [], 'file_name': '1.jpg'}]}, r'got `array` - at `images\[0\].id`'),
        (CAPTIONS, {'images': [{'id': 1, 'file_name': None}]}, r'got `null` - at `images\[0\].file_name`'),
        (CAPTIONS, {'images': [{'id': 1, 'file_name': ''}], 'annotations': []}, 'image 1 has an empty file_name'),
        (CAPTIONS, {'images': [{'id': 1, 'file_name': '1.jpg'}] * 2}, 'two rows for image 1; remove'),
        (CAPTIONS, {'images': [{'id': 1, 'file_name': '1.jpg'}]}, r'`annotations\[0\]` is of picture 2, which is not'),
        (CAPTIONS, {'images': [{'id': 2, 'file_name': '2.jpg'}]}, r'question 10 is of picture 1, which is not'),
        (CAPTIONS, {'annotations': [{'image_id': 1}]}, r'required field `caption` - at `annotations\[0\]`'),
        (CAPTIONS, {'annotations': [{'caption': 'a'}]}, r'required field `image_id` - at `annotations\[0\]`'),
        (CAPTIONS, {'annotations': [{'image_id': 1, 'caption': 7}]}, r'got `int` - at `annotations\[0\].caption`'),
        (CAPTIONS, {'annotations': [{'image_id': 1, 'caption': ' '}]}, r'`annotations\[0\]` has an empty caption'),
        (CAPTIONS, {'annotations': {}}, 'Expected `array`, got `object` - at `annotations`'),
        (ASKED, {'questions': 'none'}, 'Expected `array`, got `str` - at `questions`'),
        (ASKED, {'questions': [{'question_id': 10, 'image_id': 1}]}, r'field `question` - at `questions\[0\]`'),
        (ASKED, {'questions': [{'question_id': 10, 'image_id': 1, 'question': ''}]}, 'question 10 is empty'),
        (ASKED, {'questions': [{'question_id': 10, 'image_id': '1', 'question': 'a'}]}, 'question 10 is of picture 1,'),
        (ASKED, {'questions': [{'question_id': 10, 'image_id': 1, 'question': 'a'}] * 2}, 'two rows for question 10'),
        (ASKED, {'questions': []}, f'{ANSWERED}: answers to question 10, which is not in {ASKED}'),
        (ANSWERED, {'annotations': []}, f'{ANSWERED}: no answers to question 10 of {ASKED}'),
        (ANSWERED, {'annotations': TWO[:1] * 2}, 'two rows for question 10'),
        (ANSWERED, {'annotations': TWO}, 'answers to question 11, which is not in'),
        (ANSWERED, {'annotations': [{'question_id': 10, 'answers': []}]}, f'{ANSWERED}: question 10 has no answer'),
        (ANSWERED, {'annotations': [{'question_id': 10, 'answers': [{'answer': ''}]}]}, 'or an empty one'),
        (ANSWERED, {'annotations': [{'question_id': 10, 'answers': 'yes'}]}, r'got `str` - at `annotations\[0\].answ'),
        (ANSWERED, {'annotations': [{'question_id': 10, 'answers': ['yes']}]}, r'got `str` - at `.*answers\[0\]`'),
        (ANSWERED, {'annotations': [{'question_id': 10, 'answers': [{}]}]}, r'required field `answer` - at'),
        (ANSWERED, {'annotations': [{'question_id': 10, 'answers': [{'answer': 1}]}]}, r'got `int` - at'),
        (ANSWERED, {'annotations': [{'answers': []}]}, r'required field `question_id` - at `annotations\[0\]`'),
    ],
)
def test_coco_names_what_is_odd(coco_folder, name, change, message):
    file = coco_folder / 'annotations' / name
    file.write_text(json.dumps(change and json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        list(coco(coco_folder)['train'])
    assert str(error.value).startswith(f'{coco_folder / "annotations"}') and '\n' not in str(error.value)


@pytest.mark.parametrize('data', [b'', b'{', b'{"images": [], "annotations": [\xff]}'])
@pytest.mark.parametrize('name', [CAPTIONS, ASKED, ANSWERED])
def test_coco_names_a_damaged_file(coco_folder, name, data):
    (coco_folder / 'annotations' / name).write_bytes(data)
    with pytest.raises(UserError, match=f'{name}: not (JSON|UTF-8 text) .*; fetch it again'):
        list(coco(coco_folder)['train'])


def test_coco_with_a_missing_part_is_refused(coco_folder):
    (coco_folder / 'annotations' / ASKED).with_stem('MultipleChoice_train2014_questions').write_text('{}')
    with pytest.raises(UserError, match='the questions of train2014 are in MultipleChoice_train2014_questions'):
        list(coco(coco_folder)['train'])
    (coco_folder / 'annotations' / 'MultipleChoice_train2014_questions.json').unlink()
    (coco_folder / 'annotations' / ANSWERED).unlink()
    with pytest.raises(UserError, match=r'expected one .*train2014_annotations'):
        list(coco(coco_folder)['train'])
    with pytest.raises(UserError, match='captions_'):
        coco(coco_folder / 'train2014')


def flat_folder(root, count: int, lines_of: int = 1) -> list[dict]:
    """Write so many pictures, each in so many lines; return the lines, in an order of their own."""
    root.mkdir()
    rows = []
    for number in range(count):
        pixels = np.full((4, 4, 3), number, np.uint8)
        Image.fromarray(pixels).save(root / f'{number}.png')
        rows += [{'file': f'{number}.png', 'caption': f'text {line}'} for line in range(lines_of)]
    return rows


def test_a_part_of_a_folder_without_splits_is_held_out_by_content(tmp_path, capsys):
    """Neither names nor the order of lines decide, and a picture in several lines is in one part."""
    rows = flat_folder(tmp_path / 'a', 40, lines_of=2)
    parts = folder(write_lines(tmp_path / 'a', *rows))
    images = {split: [record.image for record in records] for split, records in parts.items()}
    assert {split: len(found) for split, found in images.items()} == {'train': 72, 'test': 8}
    assert "held out: 4 of 40 contents as the split 'test', those whose SHA-256 is lowest" in capsys.readouterr().err
    assert not set(images['train']) & set(images['test'])
    lowest = sorted(hashlib.sha256(image).hexdigest() for image in {*images['train'], *images['test']})[:4]
    assert {hashlib.sha256(image).hexdigest() for image in images['test']} == set(lowest)
    flat_folder(tmp_path / 'b', 40)
    for number in range(40):
        (tmp_path / 'b' / f'{number}.png').rename(tmp_path / 'b' / f'{99 - number}.jpg')
    renamed = [{'file': f'{99 - number}.jpg', 'caption': 'x'} for number in range(39, -1, -1)]
    again = folder(write_lines(tmp_path / 'b', *renamed))
    assert {record.image for record in again['test']} == set(images['test'])


@pytest.mark.parametrize('share, count, held_out', [(0.0, 9, 0), (0.5, 9, 4), (0.01, 9, 2), (1.0, 9, 7), (0.1, 3, 0)])
def test_how_much_is_held_out(share, count, held_out, tmp_path):
    rows = flat_folder(tmp_path / 'a', count)
    parts = folder(write_lines(tmp_path / 'a', *rows), share)
    assert len(list(parts.get('test', ()))) == held_out
    assert len(list(parts['train'])) == count - held_out


def test_splits_of_ones_own_stay_as_they_are(tmp_path, capsys):
    rows = flat_folder(tmp_path / 'train', 8)
    write_lines(tmp_path / 'train', *rows)
    assert len(list(folder(tmp_path)['train'])) == 8 and folder(tmp_path).keys() == {'train'}
    assert not capsys.readouterr().err


def test_files_that_no_line_names_are_found(tmp_path):
    rows = flat_folder(tmp_path / 'train', 3)
    write_lines(tmp_path / 'train', *rows[:1])
    (tmp_path / 'train' / 'notes.txt').write_text('mine')
    (tmp_path / 'train' / '.hidden.png').write_bytes(b'')
    assert [file.name for file in jsonl.unnamed(tmp_path, {'.png'})] == ['1.png', '2.png']


def test_a_missing_file_is_named_before_anything_is_held_out(tmp_path):
    rows = flat_folder(tmp_path / 'a', 5)
    (tmp_path / 'a' / '3.png').unlink()
    with pytest.raises(UserError, match=r"3\.png: no such picture \(nearest: '.*line 4\)"):
        folder(write_lines(tmp_path / 'a', *rows))


def test_coco_pictures_stay_below_their_folder(tmp_path):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'train').mkdir()
    (tmp_path / 'a.png').write_bytes(png('red'))
    tree = {'images': [{'id': 1, 'file_name': '../a.png'}], 'annotations': [{'image_id': 1, 'caption': 'x'}]}
    (tmp_path / 'annotations' / 'captions_train.json').write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"image 1: '\.\./a\.png' may lie outside the folder"):
        list(coco(tmp_path)['train'])
    assert len(list(coco(tmp_path, allow_outside=True)['train'])) == 1
