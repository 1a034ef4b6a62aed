"""A packed data set, opened: records by position, its tokenizers, its fingerprint."""

import glob
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from ..config import VitConfig
from ..errors import UserError, nearest
from ..hashing import sha256
from .encoder import Encoder
from .pack import BYTE_BPE, CONTENT, INDEX, PACK_AGAIN, WORDPIECE, read_content, record_features
from .records import Record, unpack_array
from .tokenizers import LmTokenizer, TextTokenizer

_COLUMNS_BEFORE = 4  # of an index from before there were phrases and frames
_FILES = (CONTENT, INDEX, WORDPIECE, BYTE_BPE)


class Part(NamedTuple):
    """Records of a split that follow each other."""

    split: str
    """As it was packed."""
    start: int
    stop: int
    records: int
    """Of the whole split."""


@dataclass(frozen=True)
class Source(Sequence):
    """The records of a split, by position; decoded when asked for.

    They are read with the package's own features, and never with the classes that a folder's features.json names, as
    tensorflow_datasets would: a data set may come from anybody.
    """

    path: Path
    """Folder of the packed data set."""
    split: str
    """Split in tensorflow_datasets' notation."""
    parts: tuple[Part, ...]
    """What the split consists of."""
    counts: np.ndarray = field(repr=False, compare=False)
    """int32 [N, 6], one row a record: captions, questions, feature rows (P), feature columns (V), phrases, frames."""
    earlier: bool = field(default=False, repr=False)
    """Whether the records are from before there were phrases and frames."""

    @cached_property
    def _files(self) -> dict[str, ArrayRecordDataSource]:
        return {part.split: _open_files(self.path, part) for part in self.parts}

    @cached_property
    def _features(self) -> Any:
        return record_features(self.earlier)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, position: int) -> Record:
        """Return a record; raises UserError when it is damaged."""
        if not 0 <= position < len(self):
            raise IndexError(f'record {position} of {len(self)}')
        name, number = self._place(position)
        try:
            return decode(self._features.deserialize_example_np(self._files[name][number]))
        except UserError:
            raise
        except Exception as error:  # of third-party readers, on bytes that anybody may have written
            reason = str(error).strip().partition('\n')[0][:120]
            raise UserError(f"{self.path}: record {number} of '{name}' is damaged ({reason}); {PACK_AGAIN}") from error

    def _place(self, position: int) -> tuple[str, int]:
        """Return split as packed and number there: of train[10:20] + test, record 12 is (test, 2)."""
        for part in self.parts:
            if position < part.stop - part.start:
                return part.split, part.start + position
            position -= part.stop - part.start
        raise IndexError(position)

    def __reduce__(self):
        return Source, (self.path, self.split, self.parts, self.counts, self.earlier)


def _open_files(path: Path, part: Part) -> ArrayRecordDataSource:
    """Return the records of a split as they were packed; raises UserError when a file is missing or damaged."""
    files = sorted(path.glob(f'records-{glob.escape(part.split)}.array_record-*'))
    numbers = [file.name.rpartition('-')[2] for file in files]
    try:
        found = ArrayRecordDataSource([str(file) for file in files]) if files else ()
    except Exception as error:  # of the reader, on bytes that anybody may have written
        raise UserError(f"{path}: a file of split '{part.split}' is damaged; {PACK_AGAIN}") from error
    if numbers != [f'{n:05}' for n in range(len(files))] or len(found) != part.records:
        raise UserError(
            f"{path}: the files of split '{part.split}' hold {len(found)} records, and its index {part.records}; "
            f'{PACK_AGAIN}'
        )
    return found


@dataclass(frozen=True)
class Dataset:
    """A folder that `qformer data pack` wrote."""

    path: Path
    """The folder."""
    lm_file: Path | None = None
    """A pretrained language model's tokenizer, in place of the one that the folder holds."""
    others: tuple['Dataset', ...] = ()
    """More data sets that are read beside this one (`data/mixture.py`)."""

    @classmethod
    def open(cls, path: Path | str) -> 'Dataset':
        """Return the packed data set in `path`; raises UserError when there is none, naming the nearest folder."""
        path = Path(path)
        missing = [name for name in _FILES if not (path / name).is_file()]
        if not path.is_dir():
            raise UserError(f'{path}: no such folder{_nearest_packed(path)}; make one with: qformer data pack')
        if missing:
            raise UserError(f"{path}: not a packed data set, it lacks '{missing[0]}'{_nearest_packed(path)}; "
                            'make one with: qformer data pack')  # fmt: skip
        for name, digest in read_content(path)[1].items():
            if not (path / name).is_file() or sha256(path / name) != digest:
                raise UserError(f'{path / name} is missing or damaged (its SHA-256 is another); {PACK_AGAIN}')
        return cls(path)

    def source(self, split: str) -> Source:
        """Return the records of a split (`train`, `train[10%:]`); raises UserError when it is unknown or empty."""
        parts = tuple(filter(lambda part: part.start < part.stop, map(self._part, self._instructions(split))))
        if not parts:
            raise UserError(f"split '{split}' of {self.path} is empty; widen it")
        rows = np.concatenate([self.counts[part.split][part.start : part.stop] for part in parts])
        earlier = any(rows.shape[1] == _COLUMNS_BEFORE for rows in self._index.values())
        return Source(self.path, split, parts, rows, earlier)

    def _part(self, wanted: Any) -> Part:
        records = len(self._index[wanted.splitname])
        start, stop, _ = slice(wanted.from_, wanted.to).indices(records)
        return Part(wanted.splitname, start, stop, records)

    @property
    def parts(self) -> tuple['Dataset', ...]:
        """This data set, and those beside it."""
        return self, *self.others

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The Q-Former's tokenizer."""
        return TextTokenizer.load(self.path / WORDPIECE)

    @cached_property
    def lm_tokenizer(self) -> LmTokenizer:
        """The language model's tokenizer."""
        return LmTokenizer.load(self.tokenizer_files[BYTE_BPE])

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """Both tokenizers' files, by the name that a run keeps them under."""
        return {WORDPIECE: self.path / WORDPIECE, BYTE_BPE: self.lm_file or self.path / BYTE_BPE}

    @cached_property
    def feature_shape(self) -> tuple[int, int] | None:
        """(rows of the longest feature array, columns), or None when the records hold pictures."""
        rows, columns = np.concatenate([rows for part in self.parts for rows in part.counts.values()])[:, 2:4].max(0)
        return (int(rows), int(columns)) if rows else None

    @cached_property
    def longest_video(self) -> int:
        """Frames of the longest video; 0 where the records hold none."""
        return int(np.concatenate([rows for part in self.parts for rows in part.counts.values()])[:, 5].max())

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits as they were packed."""
        return tuple(self._index)

    @cached_property
    def encoder(self) -> Encoder | None:
        """The tower that made the features; None where the records hold pictures, or arrays from elsewhere."""
        return Encoder.load(self.path)

    def check_tower(self, weights: str | None, vit: VitConfig | None) -> None:
        """Raise UserError when the records hold features that a run's tower (digest, sizes) did not make."""
        if self.encoder:
            self.encoder.check(self.path, weights, vit)
        elif self.feature_shape and vit:
            raise UserError(f'{self.path} holds feature arrays, and the run a vision tower; set model.vit to None')

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that name the records and the tokenizers (SHA-256)."""
        digest = hashlib.sha256(_content(self.path))
        for file in self.tokenizer_files.values():
            digest.update(file.read_bytes())
        for other in self.others:
            digest.update(_content(other.path))
        return digest.hexdigest()[:12]

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Split as packed -> int32 [N, 6], as `Source.counts`."""
        return {split: _six_columns(rows) for split, rows in self._index.items()}

    @cached_property
    def _index(self) -> dict[str, np.ndarray]:
        file = self.path / INDEX
        try:
            with np.load(file) as index:
                found = dict(index.items())
        except Exception as error:  # of zipfile and NumPy, on bytes that anybody may have written
            raise UserError(f'{file}: damaged, or not an index; {PACK_AGAIN}') from error
        for split, rows in found.items():
            if (
                rows.dtype != np.int32
                or rows.ndim != 2
                or rows.shape[1] not in (_COLUMNS_BEFORE, 6)
                or (rows < 0).any()
            ):
                raise UserError(f"{file}: '{split}' is {rows.dtype} {list(rows.shape)}; expected int32 [N, 6]; "
                                f'{PACK_AGAIN}')  # fmt: skip
        if not found:
            raise UserError(f'{file}: names no split; {PACK_AGAIN}')
        return found

    def _instructions(self, split: str) -> list[Any]:
        """Return tfds's reading instructions: parts with `splitname`, `from_` and `to`."""
        infos = {
            name: tfds.core.SplitInfo(name=name, shard_lengths=[len(rows)], num_bytes=0, filename_template=None)
            for name, rows in self._index.items()
        }
        try:
            return tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        except (ValueError, KeyError, AssertionError, NotImplementedError, RecursionError) as error:
            known = ', '.join(self._index)
            raise UserError(f"{self.path}: no split '{split}'{nearest(split, self._index)}; known are {known}, "
                            "and parts of them such as 'train[10%:]'; name one (--split, or data.train-split and "
                            'data.validation-split)') from error  # fmt: skip


def _six_columns(rows: np.ndarray) -> np.ndarray:
    """Return counts with columns for phrases and frames, which a data set from before there were any has not."""
    return np.pad(rows, ((0, 0), (0, 6 - rows.shape[1])))


def _content(path: Path) -> bytes:
    """Return the line of content.txt that names the records, which is all that it was in earlier versions."""
    return f'{read_content(path)[0]}\n'.encode()


def decode(example: dict[str, Any]) -> Record:
    """Return the record of a tfds example, as `pack.encode` wrote it."""
    ends = np.cumsum([0, *example['answer_counts']]).tolist()
    answers, phrases = _texts(example['answers']), _texts(example.get('phrases', ()))  # absent in older data sets
    boxes = unpack_array(example['boxes']).tolist() if phrases else ()
    return Record(
        image_id=example['image_id'].decode(),
        image=example['image'] or None,
        features=unpack_array(example['features']).astype(np.float32) if example['features'] else None,
        captions=_texts(example['captions']),
        questions=_texts(example['questions']),
        answers=tuple(answers[a:b] for a, b in itertools.pairwise(ends)),
        frames=tuple(example.get('frames', ())),
        phrases=tuple(zip(phrases, map(tuple, boxes), strict=True)),
    )


def _texts(values: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(value.decode() for value in values)


def _nearest_packed(path: Path) -> str:
    """Return the nearest name of a packed data set inside or beside `path`, as errors append it."""
    inside, beside = ([p for p in folder.glob('*') if (p / CONTENT).is_file()] for folder in (path, path.parent))
    if inside:
        return f" (nearest: '{inside[0]}')"
    return nearest(str(path), map(str, beside))
