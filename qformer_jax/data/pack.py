"""Pack a source once into the training format: an array_record data set of tensorflow_datasets, plus two tokenizers.

What lies in the folder:

    OUT/dataset_info.json, features.json, records-SPLIT.array_record-*   read by `tfds.builder_from_directory`
    OUT/index.npz        SPLIT -> int32[N, 6], of every record: captions, questions, rows (P) and columns (V) of
                         features, phrases, frames
    OUT/content.txt      SHA-256 of all records, in order; then, a line each, SHA-256 and name of the files below and
                         index.npz, and last of its own lines before
    OUT/wordpiece.json   the Q-Former's tokenizer        OUT/byte_bpe.json   the language model's
    OUT/encoder.json     the tower that made the features, where `qformer data encode` wrote the data set
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import json_file
from ..atomic import check_writable, scratch_folder, write_text
from ..errors import UserError, full_disk_as_user_error
from ..hashing import sha256
from . import summary
from .encoder import FILE, Encoder
from .records import Record, pack_array
from .tokenizers import LmTokenizer, TextTokenizer, train_byte_bpe, train_wordpiece

CONTENT, INDEX, WORDPIECE, BYTE_BPE = 'content.txt', 'index.npz', 'wordpiece.json', 'byte_bpe.json'
CHECKED = INDEX, WORDPIECE, BYTE_BPE, FILE
"""What content.txt has the SHA-256 of, where it is there."""
PACK_AGAIN = 'pack the data set again (qformer data pack)'
WORDPIECE_SIZE = 8192
"""Largest number of entries of the trained WordPiece vocabulary."""
BYTE_BPE_SIZE = 8192
"""Largest number of entries of the trained byte BPE vocabulary."""
WIDTH = 120
"""Columns of the table that is printed."""
_DIGEST = re.compile('[0-9a-f]{64}')
_SPLIT = re.compile(r'[\w-]+')  # what tensorflow_datasets can read in a split's name
_SHARD = 8192  # records a file, at most


def pack(
    records_by_split: dict[str, Iterable[Record]],
    out: Path | str,
    text_tokenizer: Path | None = None,
    lm_tokenizer: Path | None = None,
    encoder: Encoder | None = None,
    left_out: Sequence[Path] = (),
) -> None:
    """Write the data set into the new folder `out`, and print what it holds.

    A tokenizer that is not given (a file of BERT's or OPT's) is trained on the split `train`; `encoder` is the tower
    that made the features, where ours did; `left_out` are files that might have been meant, to be mentioned. A folder
    that holds the same records already is left as it is. Nothing appears at `out` before everything is written. Raises
    UserError when `out` holds anything else, when a split is empty or has a name that nothing can ask for, when `train`
    is missing or without text, and when the disk is full.
    """
    out = Path(out)
    _check_splits(list(records_by_split))
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / CONTENT).is_file()):
        raise UserError(f'{out}: exists and is not a packed data set; choose a new folder')
    text = TextTokenizer.load(text_tokenizer) if text_tokenizer else None
    lm = LmTokenizer.load(lm_tokenizer) if lm_tokenizer else None
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out.parent, f'{out.name}.unfinished-') as scratch, full_disk_as_user_error(out):
        packed, tally = _write(records_by_split, scratch)
        text, lm = text or _trained_wordpiece(tally), lm or _trained_byte_bpe(tally)
        text.save(packed / WORDPIECE)
        lm.save(packed / BYTE_BPE)
        if encoder:
            encoder.save(packed)
        write_content(packed, tally.hash.hexdigest())
        counts = ', '.join(f'{split} {len(rows)} records' for split, rows in tally.index.items())
        what = f'{counts}; vocabularies: WordPiece {text.vocab_size}, byte BPE {lm.vocab_size}'
        given = [name for name, file in ((WORDPIECE, text_tokenizer), (BYTE_BPE, lm_tokenizer)) if file]
        _publish(packed, out, what, given)
    Console(width=WIDTH).print(summary.table(tally.index, tally.captions, text))
    for line in summary.notes(tally.index, left_out):
        print(line)


def _check_splits(names: Sequence[str]) -> None:
    if 'train' not in names:
        raise UserError(f"no split 'train' among {', '.join(names) or 'none'}; tokenizers are trained on it")
    for name in names:
        if name == 'all' or not _SPLIT.fullmatch(name):
            why = 'stands for all splits together' if name == 'all' else 'may have letters, digits, _ and - alone'
            raise UserError(f"split '{name}': the name of a split {why}; rename its folder")


def record_features(earlier: bool = False) -> tfds.features.FeaturesDict:
    """Return what a record holds; `earlier`: before there were phrases and frames.

    Nested answers are flat with a count a question, since tfds needs TensorFlow to nest lists of text.
    """
    text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
    fields = {
        'image_id': text,
        'image': text,  # tfds's name for a string of bytes: stored as it is
        'features': text,
        'captions': texts,
        'questions': texts,
        'answers': texts,
        'answer_counts': tfds.features.Sequence(tfds.features.Scalar(np.int32)),
    }
    later = {'frames': texts, 'phrases': texts, 'boxes': text}
    return tfds.features.FeaturesDict(fields if earlier else fields | later)


def _info(folder: Path) -> tfds.core.DatasetInfo:
    identity = tfds.core.DatasetIdentity('records', tfds.core.Version('1.0.0'), str(folder), __name__)
    return tfds.core.DatasetInfo(builder=identity, features=record_features())


def _examples(split: str, records: Iterable[Record], tally: '_Tally') -> Iterator[dict[str, Any]]:
    """Yield a split's examples, as they are asked for; raises UserError when there is none."""
    for record in records:
        example = encode(record)
        tally.add(split, record, example)
        yield example
    if split not in tally.index:
        raise UserError(f"split '{split}' has no record; give it one, or remove the split")


def encode(record: Record) -> dict[str, Any]:
    """Return the tfds example of a record; `dataset.decode` undoes it."""
    return {
        'image_id': record.image_id,
        'image': record.image or b'',
        'features': b'' if record.features is None else pack_array(record.features),
        'captions': list(record.captions),
        'questions': list(record.questions),
        'answers': [answer for answers in record.answers for answer in answers],
        'answer_counts': [len(answers) for answers in record.answers],
        'frames': list(record.frames),
        'phrases': [phrase for phrase, _ in record.phrases],
        'boxes': pack_array(np.array([box for _, box in record.phrases])) if record.phrases else b'',
    }


class _Tally:
    """What is gathered while records pass: the index, the content's hash, captions, and all texts of `train`."""

    def __init__(self, progress: Progress):
        self.index: dict[str, list[tuple[int, ...]]] = {}
        self.hash = hashlib.sha256()
        self.texts: list[str] = []
        self.captions: dict[str, list[str]] = {}
        self._progress, self._tasks = progress, {}

    def add(self, split: str, record: Record, example: dict[str, Any]) -> None:
        if (record.image is not None) + (record.features is not None) + bool(record.frames) != 1:
            raise UserError(f'{record.image_id}: expected a picture, a feature array or frames, one of the three')
        said, shape = (len(record.captions), len(record.questions)), (0, 0)
        if record.features is not None:
            shape = record.features.shape
        self.index.setdefault(split, []).append((*said, *shape, len(record.phrases), len(record.frames)))
        self.hash.update(repr((split, _hashed(example))).encode())
        self.captions.setdefault(split, []).extend(record.captions)
        if split == 'train':
            answers = (a for accepted in record.answers for a in dict.fromkeys(accepted))
            phrases = (phrase for phrase, _ in record.phrases)
            texts = (*record.captions, *record.questions, *answers, *phrases)
            self.texts += (text.lower() for text in texts)
        if split not in self._tasks:
            self._tasks[split] = self._progress.add_task(split, total=None)
        self._progress.advance(self._tasks[split])


def _hashed(example: dict[str, Any]) -> list[Any]:
    """Return what the content's hash is of: a record without phrases and frames has that of before there were any."""
    return [value for key, value in example.items() if value or key not in ('frames', 'phrases', 'boxes')]


def _trained_wordpiece(tally: _Tally) -> TextTokenizer:
    return TextTokenizer(train_wordpiece(tally.texts, WORDPIECE_SIZE))


def _trained_byte_bpe(tally: _Tally) -> LmTokenizer:
    return LmTokenizer(train_byte_bpe(tally.texts, BYTE_BPE_SIZE))


def _write(records_by_split: dict[str, Iterable[Record]], scratch: Path) -> tuple[Path, _Tally]:
    """Write all records below `scratch`; return the data set's folder and what was seen of it."""
    columns = SpinnerColumn(), TextColumn('packing {task.description}'), MofNCompleteColumn(), TimeElapsedColumn()
    packed = scratch / 'packed'
    packed.mkdir()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tally = _Tally(progress)
        # Row i of index.npz is record i: written as they come, by a writer that keeps none of them in memory.
        writer = tfds.core.SequentialWriter(_info(packed), _SHARD, file_format='array_record')
        writer.initialize_splits(list(records_by_split))
        for split, records in records_by_split.items():
            writer.add_examples({split: _examples(split, records, tally)})
        writer.close_all()
    _refuse_unusable(tally)
    np.savez(packed / INDEX, **{split: np.array(rows, np.int32) for split, rows in tally.index.items()})
    return packed, tally


def _refuse_unusable(tally: _Tally) -> None:
    if not tally.texts:
        raise UserError("split 'train' has no caption, no question and no phrase; tokenizers are trained on them")
    kinds = {(row[3], row[5] > 0) for rows in tally.index.values() for row in rows}
    if len(kinds) > 1:
        found = ', '.join(f'features of width {width}' if width else 'frames' if video else 'a picture'
                          for width, video in sorted(kinds))  # fmt: skip
        raise UserError(f'records of several kinds: {found}; a data set holds one kind only')


def write_content(folder: Path, records: str) -> None:
    """Write content.txt: the SHA-256 of the records, of each file that no record's checksum covers, and of itself."""
    files = [folder / name for name in CHECKED if (folder / name).is_file()]
    text = f'{records}\n' + ''.join(f'{sha256(file)}  {file.name}\n' for file in files)
    write_text(folder / CONTENT, f'{text}{_digest_of(text)}  {CONTENT}\n')


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_content(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the SHA-256 of all records and, by name, those of the files beside them (of an older data set: none).

    Raises UserError when content.txt holds anything else.
    """
    file = folder / CONTENT
    text = json_file.read_text(file, PACK_AGAIN)
    first, *rest = text.splitlines() or ['']
    rows = [line.split('  ') for line in rest]
    digests = {name: digest for digest, name in rows} if all(len(row) == 2 for row in rows) else {'': ''}
    whole = digests.pop(CONTENT, None)
    known = all(map(_DIGEST.fullmatch, (first, *digests.values()))) and digests.keys() <= set(CHECKED)
    if not known or (rest and whole != _digest_of(text[: text.rindex('\n', 0, -1) + 1])):
        raise UserError(f'{file}: damaged, or not what `qformer data pack` wrote; {PACK_AGAIN}')
    return first, digests


def _publish(packed: Path, out: Path, summary: str, given: Sequence[str]) -> None:
    """Move the data set to `out`, or leave the same records there; `given` are the tokenizers that were named."""
    if not (out / CONTENT).is_file():
        os.replace(packed, out)
        print(f'wrote {out}: {summary}')
        return
    if read_content(out)[0] != read_content(packed)[0]:
        raise UserError(f'{out}: holds another packed data set; choose a new folder, or remove it first')
    for name in given:
        if (out / name).read_bytes() != (packed / name).read_bytes():
            raise UserError(f'{out}: holds these records with another tokenizer ({name}); choose a new folder')
    print(f'{out} holds these records already; nothing was written')
