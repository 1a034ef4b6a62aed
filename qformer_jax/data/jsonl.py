"""A folder of one's own: pictures or feature arrays beside a `captions.jsonl`, one JSON object a line.

    {"file": "0001.jpg", "caption": "a cat", "questions": [{"question": "what is it?", "answers": ["cat"]}]}

`captions` may take the place of `caption`, and hold several. Parts of a picture are named by phrases, each with its
box, the left, top, right and bottom edge as shares of width and height. A line says at least one of all these.

    {"file": "0002.jpg", "phrases": [{"phrase": "a cat", "box": [0.1, 0.25, 0.5, 1.0]}]}

A video is a list of pictures in place of `file`; it goes by the name of the first.

    {"frames": ["0003/0.png", "0003/1.png"], "caption": "a cat jumps"}

The file is UTF-8 text; only a line feed ends a line.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from .. import json_file
from ..boxes import Box
from ..errors import UserError, nearest
from . import arrays
from .records import Record
from .transforms import decode

Read = TypeVar('Read')

_LIST = 'captions.jsonl'
_REMEDY = (
    'a line is such as {"file": "0001.jpg", "caption": "a cat", "questions": [{"question": "what is it?", "answers": '
    '["cat"]}], "phrases": [{"phrase": "a cat", "box": [0.1, 0.25, 0.5, 1.0]}]}'
)


class _Question(msgspec.Struct, forbid_unknown_fields=True):
    question: str
    answers: list[str]


class _Phrase(msgspec.Struct, forbid_unknown_fields=True):
    phrase: str
    box: list[float]


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """One line of captions.jsonl."""

    file: str | msgspec.UnsetType = msgspec.UNSET
    frames: list[str] | msgspec.UnsetType = msgspec.UNSET
    caption: str | msgspec.UnsetType = msgspec.UNSET
    captions: list[str] | msgspec.UnsetType = msgspec.UNSET
    questions: list[_Question] = []
    phrases: list[_Phrase] = []

    @property
    def names(self) -> list[str]:
        """The files that are seen: one, or the frames of a video."""
        return [self.file] if self.frames is msgspec.UNSET else self.frames

    @property
    def said(self) -> list[str]:
        """The captions."""
        if self.captions is not msgspec.UNSET:
            return self.captions
        return [] if self.caption is msgspec.UNSET else [self.caption]


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
    if not _is_file(file):
        raise UserError(f'{file}: no such picture{_near(file)}')
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f'{file}: {error.strerror.lower()}') from error
    decode(data, str(file))
    return data


def read_features(file: Path) -> np.ndarray:
    """Return the array [P, V] of an .npy file; raises UserError when it is missing or holds anything else."""
    if not _is_file(file):
        raise UserError(f'{file}: no such array{_near(file)}')
    return arrays.read(file)


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
        known = tuple(_at(where, lambda name=name: read_picture(root / name)) for name in line.names)
        kind = {'image': known[0]} if line.frames is msgspec.UNSET else {'frames': known}
        yield Record(image_id=line.names[0], **kind, **_texts(line))


def _feature_records(root: Path) -> Iterator[Record]:
    width = None
    for where, line in _lines(root / _LIST):
        if line.frames is not msgspec.UNSET:
            raise UserError(f'{where}: "frames" are pictures; an array [P, V] is a "file"')
        array = _at(where, lambda name=line.file: read_features(root / name))
        width = width or array.shape[1]
        if array.shape[1] != width:
            raise UserError(f"{where}: '{line.file}' has {array.shape[1]} columns (V), the files before it {width}")
        yield Record(image_id=line.file, features=array, **_texts(line))


def _lines(file: Path) -> Iterator[tuple[str, _Line]]:
    """Yield ('FILE line N', checked line) of every line that is not blank."""
    with file.open('rb') as lines:  # read as bytes, they end at \n alone and not at what else Unicode calls an end
        for number, data in enumerate(lines, 1):
            where = f'{file} line {number}'
            if (text := _text(where, data)).strip(' \t\r\n'):
                line = json_file.typed(json_file.parse(text, where, _REMEDY), _Line, where, _REMEDY)
                _check(where, line)
                yield where, line


def _text(where: str, data: bytes) -> str:
    try:
        return data.decode('utf-8-sig')  # a byte-order mark, which Windows' editors write, is no part of the text
    except UnicodeDecodeError as error:
        raise UserError(f'{where}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8') from None


def _check(where: str, line: _Line) -> None:
    """Raise UserError where a line contradicts itself, says nothing, or has something empty in it."""
    if (line.file is msgspec.UNSET) == (line.frames is msgspec.UNSET):
        raise UserError(f'{where}: expected an object with "file" (or a list of "frames"), not none of them or both, '
                        'such as {"file": "0001.jpg", "caption": "a cat"}')  # fmt: skip
    if not line.names or not all(line.names):
        raise UserError(f'{where}: no frame, or an empty name of a file; write the names of the files')
    if line.caption is not msgspec.UNSET and line.captions is not msgspec.UNSET:
        raise UserError(f'{where}: "caption" beside "captions", so one would be lost; put all of them into "captions"')
    if not all(caption.strip() for caption in line.said):
        raise UserError(f'{where}: an empty caption; write one or remove the line')
    if not (line.said or line.questions or line.phrases):
        raise UserError(f'{where}: neither a caption nor a question nor a phrase; write one or remove the line')
    for entry in line.questions:
        if not (entry.question.strip() and entry.answers and all(answer.strip() for answer in entry.answers)):
            raise UserError(f'{where}: an empty question, or one without an answer; complete it or remove it')
    for phrase in line.phrases:
        _check_phrase(where, phrase)


def _check_phrase(where: str, x: _Phrase) -> None:
    if not x.phrase.strip():
        raise UserError(f'{where}: an empty phrase; write it or remove its box')
    if len(x.box) != 4 or not (0 <= x.box[0] < x.box[2] <= 1 and 0 <= x.box[1] < x.box[3] <= 1):
        raise UserError(f"{where}: '{x.phrase.strip()}' has box {x.box}; expected left, top, right, bottom as shares "
                        'of width and height, 0 to 1, left < right, top < bottom')  # fmt: skip


def _texts(line: _Line) -> dict[str, tuple]:
    """Return the text fields of a Record."""
    return {
        'captions': tuple(caption.strip() for caption in line.said),
        'questions': tuple(entry.question.strip() for entry in line.questions),
        'answers': tuple(tuple(answer.strip() for answer in entry.answers) for entry in line.questions),
        'phrases': tuple((x.phrase.strip(), _box(x.box)) for x in line.phrases),
    }


def _box(edges: list[float]) -> Box:
    left, top, right, bottom = edges
    return left, top, right, bottom


def _at(where: str, read: Callable[[], Read]) -> Read:
    """Return `read()`, with the line's place added to the UserError that it may raise."""
    try:
        return read()
    except UserError as error:
        raise UserError(f'{error} (named in {where})') from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has NUL in it
        return False


def _near(path: Path) -> str:
    try:
        return nearest(path.name, [sibling.name for sibling in path.parent.iterdir()])
    except (OSError, ValueError):  # no such folder, or no name of one
        return ''
