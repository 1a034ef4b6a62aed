"""A folder of one's own: pictures or feature arrays beside a `captions.jsonl`, one JSON object a line.

    {"file": "0001.jpg", "caption": "a cat", "questions": [{"question": "what is it?", "answers": ["cat"]}]}

`captions` may take the place of `caption`, and hold several. Parts of a picture are named by phrases, each with its
box, the left, top, right and bottom edge as shares of width and height. A line says at least one of all these.

    {"file": "0002.jpg", "phrases": [{"phrase": "a cat", "box": [0.1, 0.25, 0.5, 1.0]}]}

A video is a list of pictures in place of `file`; it goes by the name of the first.

    {"frames": ["0003/0.png", "0003/1.png"], "caption": "a cat jumps"}
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qformer_jax.data.records import Box, Record
from qformer_jax.data.transforms import decode
from qformer_jax.errors import UserError, nearest

_LIST = 'captions.jsonl'
_KEYS = ('file', 'frames', 'caption', 'captions', 'questions', 'phrases')


def folder(path: Path | str) -> dict[str, Iterator[Record]]:
    """Return the pictures of a folder: one sub folder a split, or the folder itself as `train`.

    Raises UserError, naming file and line, for bad JSON, missing captions, and missing or damaged pictures.
    """
    return {split: _picture_records(root) for split, root in _split_folders(Path(path)).items()}


def features(path: Path | str) -> dict[str, Iterator[Record]]:
    """Return the feature arrays of a folder: as `folder`, but every `file` is an `.npy` array of floats, [P, V].

    P may differ from file to file, V may not. Raises UserError for arrays of another kind or with values not finite.
    """
    return {split: _feature_records(root) for split, root in _split_folders(Path(path)).items()}


def read_picture(file: Path) -> bytes:
    """Return the file's bytes as they are; raises UserError when it is missing or cannot be decoded to the end."""
    try:
        data = file.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f'{file}: no such picture{_near(file)}') from error
    decode(data, str(file))
    return data


def read_features(file: Path) -> np.ndarray:
    """Return the array [P, V] of an .npy file; raises UserError when it is missing or holds anything else."""
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f'{file}: no such array{_near(file)}') from error
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f'{file}: not an .npy array of numbers; write it with numpy.save') from error
    if array.ndim != 2 or array.dtype.kind != 'f' or 0 in array.shape:
        raise UserError(f'{file}: expected floats [P, V], found {array.dtype} {list(array.shape)}')
    if not np.isfinite(array).all():
        raise UserError(f'{file}: holds values that are not finite; encode this item again or leave it out')
    return array if array.dtype == np.float16 else array.astype(np.float32)


def _split_folders(path: Path) -> dict[str, Path]:
    if not path.is_dir():
        raise UserError(f'{path}: no such folder{_near(path)}')
    if (path / _LIST).is_file():
        return {'train': path}
    splits = {sub.name: sub for sub in sorted(path.iterdir()) if sub.is_dir() and not sub.name.startswith('.')}
    without = [name for name, sub in splits.items() if not (sub / _LIST).is_file()]
    if not splits or without:
        where = f"sub folder '{without[0]}'" if without else 'it'
        raise UserError(f"{path}: no '{_LIST}' in {where}; write one line a picture: "
                        '{"file": "0001.jpg", "caption": "a cat"}')  # fmt: skip
    return splits


def _picture_records(root: Path) -> Iterator[Record]:
    for where, line in _lines(root / _LIST):
        names = line.get('frames') or [line['file']]
        seen = [_at(where, lambda name=name: read_picture(root / name)) for name in names]
        kind = {'frames': tuple(seen)} if 'frames' in line else {'image': seen[0]}
        yield Record(image_id=names[0], **kind, **_said(where, line))


def _feature_records(root: Path) -> Iterator[Record]:
    width = None
    for where, line in _lines(root / _LIST):
        if 'frames' in line:
            raise UserError(f'{where}: "frames" are pictures; an array [P, V] is a "file"')
        array = _at(where, lambda name=line['file']: read_features(root / name))
        width = width or array.shape[1]
        if array.shape[1] != width:
            raise UserError(f"{where}: '{line['file']}' has {array.shape[1]} columns (V), the files before it {width}")
        yield Record(image_id=line['file'], features=array, **_said(where, line))


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ('FILE line N', checked object) of every line that is not blank."""
    for number, text in enumerate(file.read_text().splitlines(), 1):
        if text.strip():
            where = f'{file} line {number}'
            yield where, _checked(where, text)


def _checked(where: str, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise UserError(f'{where}: not JSON ({error})') from error
    if not isinstance(line, dict) or isinstance(line.get('file'), str) == _is_texts(line.get('frames')):
        raise UserError(f'{where}: expected an object with "file" (or a list of "frames"), '
                        'such as {"file": "0001.jpg", "caption": "a cat"}')  # fmt: skip
    for key in line.keys() - set(_KEYS):
        raise UserError(f"{where}: unknown key '{key}'{nearest(key, _KEYS)}; known are {', '.join(_KEYS)}")
    return line


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _said(where: str, line: dict[str, Any]) -> dict[str, tuple]:
    """Return the text fields of a Record."""
    captions = line['captions'] if 'captions' in line else [line['caption']] if 'caption' in line else []
    questions, phrases = line.get('questions', []), _phrases(where, line.get('phrases', []))
    if not isinstance(captions, list) or not all(isinstance(c, str) and c.strip() for c in captions):
        raise UserError(f'{where}: an empty caption, or one that is not text; write one or remove the line')
    if not captions and not questions and not phrases:
        raise UserError(f'{where}: neither a caption nor a question nor a phrase; write one or remove the line')
    try:
        pairs = [(q['question'].strip(), tuple(a.strip() for a in q['answers'])) for q in questions]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{where}: expected "questions": [{{"question": "...", "answers": ["..."]}}]') from error
    if not all(question and answers and all(answers) for question, answers in pairs):
        raise UserError(f'{where}: an empty question, or one without an answer; complete it or remove it')
    return {
        'captions': tuple(c.strip() for c in captions),
        'questions': tuple(question for question, _ in pairs),
        'answers': tuple(answers for _, answers in pairs),
        'phrases': phrases,
    }


def _phrases(where: str, found: Any) -> tuple[tuple[str, Box], ...]:
    """Return phrases with their boxes."""
    try:
        pairs = tuple((x['phrase'].strip(), tuple(float(edge) for edge in x['box'])) for x in found)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f'{where}: expected "phrases": [{{"phrase": "a cat", "box": [0.1, 0.25, 0.5, 1.0]}}]'
        ) from error
    for phrase, box in pairs:
        if not phrase:
            raise UserError(f'{where}: an empty phrase; write it or remove its box')
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise UserError(f"{where}: '{phrase}' has box {list(box)}; expected left, top, right, bottom as shares "
                            'of width and height, 0 to 1, left < right, top < bottom')  # fmt: skip
    return pairs


def _at(where: str, read):
    """Return `read()`, with the line's place added to the UserError that it may raise."""
    try:
        return read()
    except UserError as error:
        raise UserError(f'{error} (named in {where})') from error


def _near(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, siblings)
