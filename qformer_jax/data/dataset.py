"""A packed data set, opened: records by position, its tokenizers, its fingerprint."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from qformer_jax.config import Vit
from qformer_jax.data.encoder import Encoder
from qformer_jax.data.pack import BYTE_BPE, CONTENT, INDEX, WORDPIECE
from qformer_jax.data.records import Record, unpack_array
from qformer_jax.data.tokenizers import LmTokenizer, TextTokenizer
from qformer_jax.errors import UserError, nearest

_FILES = (CONTENT, INDEX, WORDPIECE, BYTE_BPE, 'dataset_info.json', 'features.json')


@dataclass(frozen=True)
class Source(Sequence):
    """The records of a split, by position; decoded when asked for. Pickles as its path and split."""

    path: Path
    """Folder of the packed data set."""
    split: str
    """Split in tensorflow_datasets' notation."""
    counts: np.ndarray = field(repr=False, compare=False)
    """int32 [N, 6], one row a record: captions, questions, feature rows (P), feature columns (V), phrases, frames."""

    @cached_property
    def _reader(self) -> Sequence:
        return tfds.builder_from_directory(self.path).as_data_source(self.split)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, position: int) -> Record:
        if not 0 <= position < len(self):
            raise IndexError(f'record {position} of {len(self)}')
        return decode(self._reader[position])

    def __reduce__(self):
        return Source, (self.path, self.split, self.counts)


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
        return cls(path)

    def source(self, split: str) -> Source:
        """Return the records of a split (`train`, `train[10%:]`); raises UserError when it is unknown or empty."""
        rows = np.concatenate([self._index[i.splitname][i.from_ : i.to] for i in self._instructions(split)])
        if not len(rows):
            raise UserError(f"split '{split}' of {self.path} is empty; widen it")
        return Source(self.path, split, rows)

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
        rows, columns = np.concatenate([rows for part in self.parts for rows in part._index.values()])[:, 2:4].max(0)
        return (int(rows), int(columns)) if rows else None

    @cached_property
    def longest_video(self) -> int:
        """Frames of the longest video; 0 where the records hold none."""
        return int(np.concatenate([rows for part in self.parts for rows in part._index.values()])[:, 5].max())

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits as they were packed."""
        return tuple(self._index)

    @cached_property
    def encoder(self) -> Encoder | None:
        """The tower that made the features; None where the records hold pictures, or arrays from elsewhere."""
        return Encoder.load(self.path)

    def check_tower(self, weights: str | None, vit: Vit | None) -> None:
        """Raise UserError when the records hold features that a run's tower (digest, sizes) did not make."""
        if self.encoder:
            self.encoder.check(self.path, weights, vit)
        elif self.feature_shape and vit:
            raise UserError(f'{self.path} holds feature arrays, and the run a vision tower; set model.vit to None')

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that name the records and the tokenizers (SHA-256)."""
        digest = hashlib.sha256()
        contents = (other.path / CONTENT for other in self.others)
        for file in (self.path / CONTENT, *self.tokenizer_files.values(), *contents):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:12]

    @cached_property
    def _index(self) -> dict[str, np.ndarray]:
        with np.load(self.path / INDEX) as index:
            # A data set that was packed before there were phrases and frames has four columns.
            return {split: np.pad(rows, ((0, 0), (0, 6 - rows.shape[1]))) for split, rows in index.items()}

    def _instructions(self, split: str) -> list[Any]:
        """Return tfds's reading instructions: parts with `splitname`, `from_` and `to`."""
        infos = tfds.builder_from_directory(self.path).info.splits
        try:
            return tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        except (ValueError, KeyError, AssertionError) as error:
            known = ', '.join(self._index)
            raise UserError(f"{self.path}: no split '{split}'{nearest(split, self._index)}; known are {known}, "
                            "and parts of them such as 'train[10%:]'") from error  # fmt: skip


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
