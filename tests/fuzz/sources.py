"""Folders of one's own and COCO's files: what is accepted holds what the files say, by another reading of them."""

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.robustness import mutations
from qformer_jax.data import sources

LINES = (
    {'file': '0.png', 'caption': 'a red square'},
    {'file': '1.png', 'captions': ['one', 'zwei'], 'questions': [{'question': 'what?', 'answers': ['a', 'b']}]},
    {'file': '2.png', 'phrases': [{'phrase': 'a cat', 'box': [0.1, 0.25, 0.5, 1.0]}]},
    {'frames': ['3.png', '4.png'], 'caption': 'it jumps\u2028high'},
)
ARRAYS = ({'file': '0.npy', 'caption': 'a'}, {'file': '1.npy', 'captions': ['b', 'c']})


def make(home: Path) -> None:
    """Write a folder of pictures, one of arrays, and COCO's files with VQAv2's."""
    for name in ('pictures', 'arrays', 'coco/train', 'coco/annotations'):
        (home / name).mkdir(parents=True, exist_ok=True)
    for number in range(5):
        for folder in ('pictures', 'coco/train'):
            Image.new('RGB', (8, 8), (number * 40, 0, 0)).save(home / folder / f'{number}.png')
        np.save(home / 'arrays' / f'{number}.npy', np.full((2, 3), number, np.float32))
    _write(home / 'pictures', LINES[:3])
    _write(home / 'arrays', ARRAYS)
    trees = {
        'captions_train': {
            'images': [{'id': n, 'file_name': f'{n}.png'} for n in range(3)],
            'annotations': [{'image_id': n % 3, 'id': n, 'caption': f'text {n}'} for n in range(4)],
        },
        'v2_train_questions': {
            'questions': [{'question_id': 10 + n, 'image_id': n % 3, 'question': f'what {n}?'} for n in range(4)]
        },
        'v2_train_annotations': {
            'annotations': [{'question_id': 10 + n, 'answers': [{'answer': 'yes'}, {'answer': 'no'}]} for n in range(4)]
        },
    }
    for name, tree in trees.items():
        (home / 'coco' / 'annotations' / f'{name}.json').write_text(json.dumps(tree))


def _write(folder: Path, lines: tuple) -> None:
    (folder / 'captions.jsonl').write_text('\n'.join(json.dumps(line) for line in lines) + '\n')


def read_folder(folder: Path, kind: str) -> None:
    """Read a folder, and compare its texts with those that its lines hold."""
    parts = (sources.folder if kind == 'pictures' else sources.features)(folder, 0.0)
    records = list(parts['train'])
    lines = (folder / 'captions.jsonl').read_bytes().split(b'\n')
    trees = [json.loads(line.decode('utf-8-sig')) for line in lines if line.decode('utf-8-sig').strip(' \t\r')]
    assert len(records) == len(trees)
    for record, tree in zip(records, trees, strict=True):
        said = tree.get('captions', [tree['caption']] if 'caption' in tree else [])
        assert list(record.captions) == [text.strip() for text in said], record.captions
        questions = [(q['question'].strip(), tuple(a.strip() for a in q['answers'])) for q in tree.get('questions', [])]
        assert list(zip(record.questions, record.answers, strict=True)) == questions
        assert all(isinstance(q['answers'], list) for q in tree.get('questions', []))
        assert [list(box) for _, box in record.phrases] == [p['box'] for p in tree.get('phrases', [])]
        files = [tree['file']] if 'file' in tree else tree['frames']
        if record.features is not None:
            stored = np.load(folder / files[0])
            assert np.isfinite(record.features).all()
            np.testing.assert_allclose(record.features, stored.astype(np.float64), rtol=1e-6)
        else:
            shown = [record.image] if record.frames == () else list(record.frames)
            assert shown == [(folder / file).read_bytes() for file in files]


def read_coco(folder: Path) -> None:
    """Read COCO's files, and compare with what they say."""
    records = list(sources.coco(folder)['train'])
    read = lambda name: json.loads((folder / 'annotations' / f'{name}.json').read_text('utf-8-sig'))  # noqa: E731
    tree, captions, questions = read('captions_train'), defaultdict(list), defaultdict(list)
    for row in tree['annotations']:
        captions[row['image_id']].append(row['caption'].strip())
    answers = {row['question_id']: [a['answer'] for a in row['answers']]
               for row in read('v2_train_annotations')['annotations']}  # fmt: skip
    for row in read('v2_train_questions')['questions']:
        questions[row['image_id']].append((row['question'], tuple(answers[row['question_id']])))
    assert [record.image_id for record in records] == [row['file_name'] for row in tree['images']]
    for record, row in zip(records, tree['images'], strict=True):
        assert list(record.captions) == captions[row['id']]
        assert list(zip(record.questions, record.answers, strict=True)) == questions[row['id']]


def odd_line(file: Path, draw: random.Random) -> mutations.Verdict:
    """Change a value, a key or a letter of one line."""
    lines = file.read_bytes().split(b'\n')
    number = draw.randrange(len(lines) - 1)
    beside = file.with_suffix('.line')
    beside.write_bytes(lines[number])
    kinds = [mutations.another_value] * 4 + [mutations.one_key_less, mutations.one_key_more, mutations.another_letter]
    change = draw.choice([*kinds, mutations.another_number, mutations.latin, mutations.mark])
    try:
        change(beside, draw)
        lines[number] = beside.read_bytes()
    except IndexError:  # a line without numbers
        pass
    beside.unlink()
    file.write_bytes(b'\n'.join(lines))
    return 'either'


def odd_name(file: Path, draw: random.Random) -> mutations.Verdict:
    """Name a file that is not there, or outside the folder."""
    name = draw.choice(('/etc/hostname', '../pictures/0.png', 'x.png', '', '.', '0.png/', 'a\0', 'a' * 300, '~/0.png'))
    lines = file.read_bytes().split(b'\n')
    lines[0] = json.dumps({'file': name, 'caption': 'a'}).encode()
    file.write_bytes(b'\n'.join(lines))
    return 'either' if name == '0.png/' else 'refused'


def odd_array(file: Path, draw: random.Random) -> mutations.Verdict:
    """Put another array in the place of one."""
    x = np.ones((2, 3), np.float32)
    odd = {
        'refused': [x[0], x[None], x[:0], x.astype(int), x * np.nan, x * 1e39, x.astype(np.complex64), np.ones((2, 4)),
                    np.array([[1, None]]), x.astype('S3'), x > 0, np.full((2, 3), 1e300)],
        'same': [x.astype(np.float64), x.astype(np.float16), x.astype('>f4'), np.asfortranarray(x), x[:1]],
    }  # fmt: skip
    verdict = draw.choice(list(odd))
    with (file.parent / '1.npy').open('wb') as out:
        np.save(out, draw.choice(odd[verdict]), allow_pickle=True)
    return verdict


def split(file: Path, draw: random.Random) -> mutations.Verdict:
    """Put the file's own bytes apart: other ends of lines, blank lines, a mark in front."""
    data = file.read_bytes()
    change = draw.choice((lambda d: d.replace(b'\n', b'\r\n'), lambda d: b'\n\n' + d, lambda d: b'\xef\xbb\xbf' + d,
                          lambda d: d.rstrip(b'\n'), lambda d: d + b'   \t\r\n'))  # fmt: skip
    file.write_bytes(change(data))
    return 'same'


def cases(home: Path, draw: random.Random) -> Iterator[tuple[str, mutations.Verdict, Callable[[], None]]]:
    """Yield without end: a name, its verdict, and the function that reads the damaged folder."""
    damaged = home / 'damaged'
    while True:
        shutil.rmtree(damaged, ignore_errors=True)
        kind = draw.choice(('pictures', 'pictures', 'arrays', 'coco'))
        shutil.copytree(home / kind, damaged / kind)
        if kind == 'coco':
            file = draw.choice(sorted((damaged / kind / 'annotations').iterdir()))
            damage = draw.choice((*mutations.JSON, *mutations.TEXT, mutations.flip, mutations.noise, mutations.cut,
                                  mutations.emptied, mutations.itself, mutations.folder, mutations.longer))  # fmt: skip
            read = partial(read_coco, damaged / kind)
        else:
            kinds = [odd_line] * 8 + [odd_array] * (4 if kind == 'arrays' else 0)
            kinds += [odd_name, split, mutations.flip, mutations.noise, mutations.cut, mutations.emptied]
            damage = draw.choice([*kinds, mutations.itself, mutations.folder, mutations.longer, mutations.latin])
            file = damaged / kind / 'captions.jsonl'
            read = partial(read_folder, damaged / kind, kind)
        verdict = damage(file, draw)
        sure = damage in (mutations.itself, mutations.folder, odd_name, odd_array, split)
        yield f'{kind}/{file.name}: {damage.__name__}', verdict if sure else 'either', read
