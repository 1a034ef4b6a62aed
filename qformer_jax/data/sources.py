"""Public data sets on disk, each as `split name -> iterator of Record`; `jsonl.py` reads a folder of one's own."""

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .. import json_file
from ..errors import UserError
from .jsonl import check_below, features, folder, read_picture
from .records import Record

__all__ = ['coco', 'easy_vqa', 'features', 'folder']

_COLOURS = frozenset(('black', 'blue', 'brown', 'gray', 'green', 'red', 'teal', 'yellow'))
_SHAPES = frozenset(('circle', 'rectangle', 'triangle'))
_SPLIT = re.compile(r'[a-z]+')
_FETCH = 'fetch it again, or write it as COCO and VQAv2 do'


Id = int | str
Row = TypeVar('Row')


class _Image(msgspec.Struct):
    id: Id
    file_name: str


class _Caption(msgspec.Struct):
    image_id: Id
    caption: str


class _Captions(msgspec.Struct):
    """What is read of captions_NAME.json; these files have more."""

    images: list[_Image]
    annotations: list[_Caption]


class _Question(msgspec.Struct):
    question_id: Id
    image_id: Id
    question: str


class _Questions(msgspec.Struct):
    """What is read of NAME_questions.json."""

    questions: list[_Question]


class _Answer(msgspec.Struct):
    answer: str


class _Answers(msgspec.Struct):
    question_id: Id
    answers: list[_Answer]


class _Answered(msgspec.Struct):
    """What is read of NAME_annotations.json."""

    annotations: list[_Answers]


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
    questions = defaultdict(list)
    for question, answer, number in json_file.read(root / 'questions.json', list, 'install easy-vqa again'):
        questions[number].append((question, answer))
    for number in range(len(list((root / 'images').glob('*.png')))):
        pairs = questions[number]
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
        question_words = set(question.rstrip('?').split())
        if answer not in ('yes', 'no') or (answer == 'no') == bool(question_words & {'no', 'not'}):
            words |= question_words | {answer}
    colours, shapes = words & _COLOURS, words & _SHAPES
    return (f'a {colours.pop()} {shapes.pop()}',) if len(colours) == len(shapes) == 1 else ()


def coco(path: Path | str, allow_outside: bool = False) -> dict[str, Iterator[Record]]:
    """Return COCO captions (`annotations/captions_NAME.json`, pictures in `NAME/`), with VQAv2's questions if present.

    VQAv2's files are `annotations/*NAME_questions.json` and `*NAME_annotations.json`; all ten answers are kept. The
    split is the leading word of NAME: `train` of `train2017`. `allow_outside` lets pictures lie outside `NAME/`. Raises
    UserError for what is missing or unreadable.
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
        splits[split] = _coco_records(file, path / name, allow_outside)
    return splits


def _coco_records(file: Path, pictures: Path, allow_outside: bool) -> Iterator[Record]:
    tree = json_file.read(file, _Captions, _FETCH)
    images = _by_id(tree.images, 'id', file, 'image')
    captions, questions = _captions(tree, images, file), _vqa(file.parent, pictures.name, images)
    for number, image in images.items():
        if not image.file_name:
            raise UserError(f'{file}: image {number} has an empty file_name; write it, or remove the image')
        check_below(image.file_name, f'{file}: image {number}', allow_outside)
        yield Record(
            image_id=image.file_name,
            image=read_picture(pictures / image.file_name),
            captions=tuple(captions[number]),
            questions=tuple(question for question, _ in questions[number]),
            answers=tuple(answers for _, answers in questions[number]),
        )


def _captions(tree: _Captions, images: dict[Id, Any], file: Path) -> dict[Id, list[str]]:
    """Return the captions of every picture."""
    captions = defaultdict(list)
    for place, row in enumerate(tree.annotations):
        if not row.caption.strip():
            raise UserError(f'{file}: `annotations[{place}]` has an empty caption; remove it or write one')
        _check_known(row.image_id, images, f'{file}: `annotations[{place}]`', file)
        captions[row.image_id].append(row.caption.strip())
    return captions


def _vqa(folder: Path, name: str, images: dict[Id, Any]) -> dict[Id, list[tuple[str, tuple[str, ...]]]]:
    """Return VQAv2's (question, answers) pairs of every picture; empty when the folder has no questions for `name`."""
    by_picture = defaultdict(list)
    files = sorted(folder.glob(f'*{name}_questions.json'))
    if len(files) > 1:
        raise UserError(f'{files[1]}: the questions of {name} are in {files[0].name} too; move one of them away')
    for file in files:
        questions = _by_id(json_file.read(file, _Questions, _FETCH).questions, 'question_id', file, 'question')
        answers = _answers(file, folder, name, questions)
        for number, row in questions.items():
            if not row.question.strip():
                raise UserError(f'{file}: question {number} is empty; write it, or remove it with its answers')
            _check_known(row.image_id, images, f'{file}: question {number}', folder / f'captions_{name}.json')
            by_picture[row.image_id].append((row.question, answers[number]))
    return by_picture


def _answers(file: Path, folder: Path, name: str, questions: dict[Id, Any]) -> dict[Id, tuple[str, ...]]:
    """Return the answers to each question of `file`, all of them."""
    found = [f for f in folder.glob(f'*{name}_annotations.json') if not f.name.startswith('captions_')]
    if len(found) != 1:
        raise UserError(f"{file}: expected one '*{name}_annotations.json' beside it, found {len(found)}")
    rows = _by_id(json_file.read(found[0], _Answered, _FETCH).annotations, 'question_id', found[0], 'question')
    for number in questions.keys() - rows.keys():
        raise UserError(f'{found[0]}: no answers to question {number} of {file.name}; add them, or remove the question')
    for number in rows.keys() - questions.keys():
        raise UserError(f'{found[0]}: answers to question {number}, which is not in {file.name}; remove them')
    for number, row in rows.items():
        if not row.answers or not all(x.answer.strip() for x in row.answers):
            raise UserError(f'{found[0]}: question {number} has no answer, or an empty one; complete it or remove it')
    return {number: tuple(x.answer for x in row.answers) for number, row in rows.items()}


def _by_id(rows: list[Row], key: str, file: Path, what: str) -> dict[Id, Row]:
    """Return rows by their id; raises UserError where two have the same."""
    found: dict[Id, Row] = {}
    for row in rows:
        if (number := getattr(row, key)) in found:
            raise UserError(f'{file}: two rows for {what} {number}; remove one of them')
        found[number] = row
    return found


def _check_known(number: Id, images: dict[Id, Any], where: str, file: Path) -> None:
    if number not in images:
        raise UserError(f"{where} is of picture {number}, which is not among the 'images' of {file.name}; "
                        'add the picture there, or remove the row')  # fmt: skip
