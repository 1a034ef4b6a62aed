"""Public data sets on disk, each as `split name -> iterator of Record`; `jsonl.py` reads a folder of one's own."""

import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qformer_jax.data.jsonl import features, folder, read_picture
from qformer_jax.data.records import Record
from qformer_jax.errors import UserError

__all__ = ['coco', 'easy_vqa', 'features', 'folder']

_COLOURS = frozenset(('black', 'blue', 'brown', 'gray', 'green', 'red', 'teal', 'yellow'))
_SHAPES = frozenset(('circle', 'rectangle', 'triangle'))
_SPLIT = re.compile(r'[a-z]+')


def easy_vqa() -> dict[str, Iterator[Record]]:
    """Return the easy-VQA data set (PyPI `easy-vqa`, 64 x 64 pictures of one coloured shape), its official split.

    A caption such as `a red circle` is written where questions state both colour and shape. Raises UserError when the
    package is not installed.
    """
    package = importlib.util.find_spec('easy_vqa')
    if package is None:
        raise UserError('easy-VQA is not installed; run: pip install easy-vqa')
    root = Path(package.origin).parent / 'data'
    return {split: _easy_records(root / split) for split in ('train', 'test')}


def _easy_records(root: Path) -> Iterator[Record]:
    asked = defaultdict(list)
    for question, answer, number in read_json(root / 'questions.json'):
        asked[number].append((question, answer))
    for number in range(len(list((root / 'images').glob('*.png')))):
        pairs = asked[number]
        yield Record(
            image_id=f'{number}.png',
            image=read_picture(root / 'images' / f'{number}.png'),
            captions=_easy_caption(pairs),
            questions=tuple(question for question, _ in pairs),
            answers=tuple((answer,) for _, answer in pairs),
        )


def _easy_caption(pairs: list[tuple[str, str]]) -> tuple[str, ...]:
    """Return the caption that questions and answers state together, or none."""
    words = set()
    for question, answer in pairs:
        asked = set(question.rstrip('?').split())
        if answer not in ('yes', 'no') or (answer == 'no') == bool(asked & {'no', 'not'}):
            words |= asked | {answer}
    colours, shapes = words & _COLOURS, words & _SHAPES
    return (f'a {colours.pop()} {shapes.pop()}',) if len(colours) == len(shapes) == 1 else ()


def coco(path: Path | str) -> dict[str, Iterator[Record]]:
    """Return COCO captions (`annotations/captions_NAME.json`, pictures in `NAME/`), with VQAv2's questions if present.

    VQAv2's files are `annotations/*NAME_questions.json` and `*NAME_annotations.json`; all ten answers are kept. The
    split is the leading word of NAME: `train` of `train2017`. Raises UserError for what is missing or unreadable.
    """
    path = Path(path)
    files = sorted((path / 'annotations').glob('captions_*.json'))
    if not files:
        raise UserError(f"{path}: no 'annotations/captions_*.json' in it; give the folder that holds 'annotations'")
    splits: dict[str, Iterator[Record]] = {}
    for file in files:
        name = file.stem.removeprefix('captions_')
        split = (_SPLIT.match(name) or [name])[0]
        if split in splits:
            raise UserError(f"{file}: a second file for split '{split}'; move one of them away")
        splits[split] = _coco_records(file, path / name)
    return splits


def _coco_records(file: Path, pictures: Path) -> Iterator[Record]:
    tree = read_json(file)
    captions = defaultdict(list)
    for row in _rows(tree, 'annotations', file):
        if not row['caption'].strip():
            raise UserError(f'{file}: annotation {row["id"]} has an empty caption; remove it or write one')
        captions[row['image_id']].append(row['caption'].strip())
    asked = _vqa(file.parent, pictures.name)
    for row in _rows(tree, 'images', file):
        pairs = asked[row['id']]
        yield Record(
            image_id=row['file_name'],
            image=read_picture(pictures / row['file_name']),
            captions=tuple(captions[row['id']]),
            questions=tuple(question for question, _ in pairs),
            answers=tuple(answers for _, answers in pairs),
        )


def _vqa(folder: Path, name: str) -> dict[int, list[tuple[str, tuple[str, ...]]]]:
    """Return VQAv2's (question, answers) pairs of every picture; empty when the folder has no questions for `name`."""
    asked = defaultdict(list)
    for questions in sorted(folder.glob(f'*{name}_questions.json')):
        annotations = [f for f in folder.glob(f'*{name}_annotations.json') if not f.name.startswith('captions_')]
        if len(annotations) != 1:
            raise UserError(f"{questions}: expected one '*{name}_annotations.json' beside it, found {len(annotations)}")
        rows = _rows(read_json(annotations[0]), 'annotations', annotations[0])
        answers = {row['question_id']: tuple(a['answer'] for a in row['answers']) for row in rows}
        for row in _rows(read_json(questions), 'questions', questions):
            if row['question_id'] not in answers:
                raise UserError(f'{annotations[0]}: no answers to question {row["question_id"]} of {questions.name}')
            asked[row['image_id']].append((row['question'], answers[row['question_id']]))
    return asked


def read_json(file: Path) -> Any:
    """Return the file's JSON; raises UserError when it is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f'{file}: no such file') from error
    except ValueError as error:
        raise UserError(f'{file}: not JSON ({error}); fetch it again') from error


def _rows(tree: Any, key: str, file: Path) -> list[dict[str, Any]]:
    if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
        raise UserError(f"{file}: expected a JSON object with a list '{key}', as COCO and VQAv2 have")
    return tree[key]
