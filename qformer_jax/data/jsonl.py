"""A folder of one's own: pictures or feature arrays beside a `captions.jsonl`, one JSON object a line.

    {"file": "0001.jpg", "caption": "a cat", "questions": [{"question": "what is it?", "answers": ["cat"]}]}

`captions` may take the place of `caption`, and hold several. Parts of a picture are named by phrases, each with its
box, the left, top, right and bottom edge as shares of width and height. A line says at least one of all these.

    {"file": "0002.jpg", "phrases": [{"phrase": "a cat", "box": [0.1, 0.25, 0.5, 1.0]}]}

A video is a list of pictures in place of `file`; it goes by the name of the first.

    {"frames": ["0003/0.png", "0003/1.png"], "caption": "a cat jumps"}

The file is UTF-8 text; only a line feed ends a line. Names of files are relative to it, and stay below its folder
unless that is asked for (`allow_outside`); links are followed.

Each sub folder is a split. A folder without sub folders is held out in part: the pictures (or arrays) whose SHA-256 is
lowest, a tenth of them, become `test`. So a picture that stands in several lines is never in both parts, and neither
the order of the lines nor the names of the files decide.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from .. import json_file
from ..boxes import Box
from ..errors import UserError, nearest_file
from ..hashing import sha256
from . import arrays, pictures
from .records import Record

Read = TypeVar('Read')

HELD_OUT = 0.1
"""Share of a folder without splits that becomes `test`."""
_LIST = 'captions.jsonl'
_FEWEST = 4  # pictures of a folder that is held out in part: with fewer, neither part could be used
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


@dataclass(frozen=True)
class _Part:
    """What of a captions.jsonl is a split."""

    root: Path
    """Folder of the file."""
    lines: Collection[int] | None
    """Numbers of its lines; None: all."""
    allow_outside: bool
    """Whether names may be absolute, or hold `..`."""

    def file(self, where: str, name: str) -> Path:
        """Return the file that a line names; raises UserError where that may lie outside the folder."""
        check_below(name, where, self.allow_outside)
        return self.root / name


def folder(path: Path | str, held_out: float = HELD_OUT, allow_outside: bool = False) -> dict[str, Iterator[Record]]:
    """Return the pictures of a folder: one sub folder a split, or the folder itself as `train` and `test`.

    `held_out` is the share of `test` where the folder has no splits (0: none); a line on standard error says which.
    `allow_outside` lets names be absolute or hold `..`. Raises UserError, naming file and line, for bad JSON, missing
    captions, and missing or damaged pictures.
    """
    parts = _parts(Path(path), held_out, allow_outside, read_picture)
    return {split: _picture_records(part) for split, part in parts.items()}


def features(path: Path | str, held_out: float = HELD_OUT, allow_outside: bool = False) -> dict[str, Iterator[Record]]:
    """Return the feature arrays of a folder: as `folder`, but every `file` is an `.npy` array of floats, [P, V].

    P may differ from file to file, V may not. Raises UserError for arrays of another kind or with values not finite.
    """
    parts = _parts(Path(path), held_out, allow_outside, read_features)
    return {split: _feature_records(part) for split, part in parts.items()}


def read_picture(file: Path) -> bytes:
    """Return the file's bytes as they are; raises UserError when it is missing or cannot be decoded to the end."""
    data = pictures.read(file)
    pictures.decode(data, str(file))
    return data


def read_features(file: Path) -> np.ndarray:
    """Return the array [P, V] of an .npy file; raises UserError when it is missing or holds anything else."""
    if not _is_file(file):
        raise UserError(f'{file}: no such array{nearest_file(file)}')
    return arrays.read(file)


def check_below(name: str, where: str, allow_outside: bool) -> None:
    """Raise UserError for the name of a file that may lie outside the folder of the list that names it."""
    if not allow_outside and (name.startswith('/') or '..' in Path(name).parts):
        raise UserError(f"{where}: '{name}' may lie outside the folder; name files below it, or allow it by "
                        '--allow-outside')  # fmt: skip


def unnamed(path: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files with one of these endings, below a folder or its splits, that no line of captions.jsonl names.

    Names that begin with a dot are left out. Raises UserError as `folder` does.
    """
    found = []
    for root in _split_folders(path).values():
        named = {root / name for _, _, line in _lines(_Part(root, None, True)) for name in line.names}
        files = (file for file in root.rglob('*') if not file.name.startswith('.') and file.suffix.lower() in suffixes)
        found += sorted(file for file in files if file not in named)
    return found


def _parts(path: Path, held_out: float, allow_outside: bool, read: Callable[[Path], object]) -> dict[str, _Part]:
    """Return the splits of a folder; `read` raises UserError for a file that is missing."""
    splits = {name: _Part(root, None, allow_outside) for name, root in _split_folders(path).items()}
    whole = splits.get('train')
    return _hold_out(whole, held_out, read) if whole and whole.root == path else splits


def _hold_out(whole: _Part, share: float, read: Callable[[Path], object]) -> dict[str, _Part]:
    """Return `train` and `test` of a folder: the contents with the lowest SHA-256 are held out."""
    numbers = defaultdict(list)
    for number, where, line in _lines(whole) if share else ():
        files = [whole.file(where, name) for name in line.names]
        numbers[tuple(_at(where, lambda file=file: _content(file, read)) for file in files)].append(number)
    if len(numbers) < _FEWEST:
        return {'train': whole}
    kept = min(max(2, round(share * len(numbers))), len(numbers) - 2)  # at least two of each: a pair needs another
    test = {number for content in sorted(numbers)[:kept] for number in numbers[content]}
    train = {number for each in numbers.values() for number in each} - test
    rule = "the split 'test', those whose SHA-256 is lowest (--held-out 0 keeps all in train)"
    print(f'held out: {kept} of {len(numbers)} contents as {rule}', file=sys.stderr)
    return {name: replace(whole, lines=lines) for name, lines in (('train', train), ('test', test))}


def _content(file: Path, read: Callable[[Path], object]) -> str:
    """Return the SHA-256 of a file; what cannot be read, `read` says why."""
    try:
        if _is_file(file):
            return sha256(file)
    except OSError:
        pass
    read(file)
    raise UserError(f'{file}: changed while it was read')


def _split_folders(path: Path) -> dict[str, Path]:
    if not path.is_dir():
        raise UserError(f'{path}: no such folder{nearest_file(path)}')
    if _is_file(path / _LIST):
        return {'train': path}
    splits = {sub.name: sub for sub in sorted(path.iterdir()) if sub.is_dir() and not sub.name.startswith('.')}
    without = [name for name, sub in splits.items() if not _is_file(sub / _LIST)]
    if not splits or without:
        where = f"sub folder '{without[0]}'" if without else 'it'
        raise UserError(f"{path}: no '{_LIST}' in {where}; write one line a picture: "
                        '{"file": "0001.jpg", "caption": "a cat"}')  # fmt: skip
    return splits


def _picture_records(part: _Part) -> Iterator[Record]:
    for _, where, line in _lines(part):
        files = [part.file(where, name) for name in line.names]
        known = tuple(_at(where, lambda file=file: read_picture(file)) for file in files)
        kind = {'image': known[0]} if line.frames is msgspec.UNSET else {'frames': known}
        yield Record(image_id=line.names[0], **kind, **_texts(line))


def _feature_records(part: _Part) -> Iterator[Record]:
    width = None
    for _, where, line in _lines(part):
        if line.frames is not msgspec.UNSET:
            raise UserError(f'{where}: "frames" are pictures; an array [P, V] is a "file"')
        file = part.file(where, line.file)
        array = _at(where, lambda file=file: read_features(file))
        width = width or array.shape[1]
        if array.shape[1] != width:
            raise UserError(f"{where}: '{line.file}' has {array.shape[1]} columns (V), the files before it {width}")
        yield Record(image_id=line.file, features=array, **_texts(line))


def _lines(part: _Part) -> Iterator[tuple[int, str, _Line]]:
    """Yield (number, 'FILE line N', checked line) of every line of the part that is not blank."""
    file = part.root / _LIST
    with file.open('rb') as lines:  # read as bytes, they end at \n alone and not at what else Unicode calls an end
        for number, data in enumerate(lines, 1):
            where = f'{file} line {number}'
            if (part.lines is None or number in part.lines) and (text := _text(where, data)).strip(' \t\r\n'):
                line = json_file.typed(json_file.parse(text, where, _REMEDY), _Line, where, _REMEDY)
                _check(where, line)
                yield number, where, line


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
