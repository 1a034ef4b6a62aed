"""Arrays on disk, found by what they depend on: computed once, read ever after.

    FOLDER/NAME.array_record      record 0: the keys of the others, 32 bytes each; every other record is an entry;
                                  NAME: the first 16 hex digits of the SHA-256 of record 0

A key is the SHA-256 of everything that an array depends on, so nothing stale can be read, and what is not needed any
more is never found; the folder may be deleted at any time. An entry is

    [SHA-256 of the rest, 32 bytes][key, 32 bytes][the array, as records.pack_array writes it]

so that a damaged entry, or one that belongs under another key, is noticed before it is used. A file with another kind
of name is not the cache's, and stays as it is.
"""

import hashlib
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ..atomic import scratch_folder
from ..errors import UserError, full_disk_as_user_error
from .records import pack_array, unpack_array

_LENGTH = 32  # bytes of a SHA-256
_NAME = re.compile('[0-9a-f]{16}')
_OPTIONS = 'group_size:1,uncompressed'  # an entry is read without its neighbours; floats hardly compress


def key_of(depends: dict[str, Any]) -> bytes:
    """Return the key, 32 bytes, of an array that depends on this: JSON values, among them digests of what is large."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class Cache:
    """The arrays in a folder, which need not exist yet; raises UserError for a file."""

    folder: Path
    _places: dict[bytes, tuple[Path, int]] = field(default_factory=dict, repr=False, compare=False)
    """Key -> file and number of its record."""

    def __post_init__(self):
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"'{self.folder}' is a file: name a folder for the cache")
        for file in sorted(self.folder.glob('*.array_record')):
            if _NAME.fullmatch(file.stem):
                self._read_keys(file)
            else:
                print(f'{file}: not of this cache; left as it is', file=sys.stderr)

    @property
    def entries(self) -> int:
        """How many arrays there are."""
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def fetch(
        self, keys: Sequence[bytes], compute: Callable[[list[int]], Iterable[np.ndarray]], keep: bool = True
    ) -> list[np.ndarray]:
        """Return the array [P, V] of every key.

        `compute(positions)` yields, in this order, those that are not there or damaged; they are kept, or with `keep`
        False only given. Raises what it raises, and UserError when they cannot be written.
        """
        found = self._read_all(dict.fromkeys(keys))
        missing: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            if key not in found:
                missing.setdefault(key, position)
        if missing:
            arrays = compute(list(missing.values()))
            found |= self._write(list(missing), arrays) if keep else dict(zip(missing, arrays, strict=True))
        return [found[key] for key in keys]

    def _read_all(self, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        """Return what is there and intact, file by file."""
        wanted, found = defaultdict(list), {}
        for key in keys:
            if key in self._places:
                wanted[self._places[key][0]].append(key)
        for file, some in wanted.items():
            found |= self._read(file, some)
        return found

    def _read(self, file: Path, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        try:
            entries = ArrayRecordReader(str(file)).read([self._places[key][1] for key in keys])
        except RuntimeError:  # its own checksum, or the file is no longer there
            entries = []
        arrays = {key: _opened(entry, key) for key, entry in zip(keys, entries, strict=False)}
        if len(arrays) < len(keys) or any(array is None for array in arrays.values()):
            self._drop(file)
            return {}
        return arrays

    def _write(self, keys: list[bytes], arrays: Iterable[np.ndarray]) -> dict[bytes, np.ndarray]:
        """Keep the arrays in one new file, which appears when it is complete."""
        table, kept = b''.join(keys), {}
        with self._scratch() as scratch:
            file = scratch / f'{hashlib.sha256(table).hexdigest()[:16]}.array_record'
            with full_disk_as_user_error(self.folder):
                writer = ArrayRecordWriter(str(file), _OPTIONS)
                writer.write(table)
                for key, array in zip(keys, arrays, strict=True):
                    writer.write(_sealed(key, array))
                    kept[key] = array
                writer.close()
            os.replace(file, self.folder / file.name)
        self._read_keys(self.folder / file.name)
        return kept

    def _scratch(self) -> AbstractContextManager[Path]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"nothing can be kept in '{self.folder}': {error.strerror.lower()}") from error
        return scratch_folder(self.folder)

    def _read_keys(self, file: Path) -> None:
        reader = ArrayRecordReader(str(file))
        try:
            (table,) = reader.read([0])
        except RuntimeError:
            return self._drop(file)
        keys = [table[i : i + _LENGTH] for i in range(0, len(table), _LENGTH)]
        if reader.num_records() != len(keys) + 1:
            return self._drop(file)
        self._places.update({key: (file, number) for number, key in enumerate(keys, 1)})

    def _drop(self, file: Path) -> None:
        """Remove a damaged file, aloud; what it held is computed when it is needed."""
        print(f'{file}: damaged; removed, and computed again where needed', file=sys.stderr)
        file.unlink(missing_ok=True)
        for key in [key for key, (place, _) in self._places.items() if place == file]:
            del self._places[key]


def _sealed(key: bytes, array: np.ndarray) -> bytes:
    body = key + pack_array(array)
    return hashlib.sha256(body).digest() + body


def _opened(entry: bytes, key: bytes) -> np.ndarray | None:
    """Return the array, or None where the entry is damaged or another key's."""
    body = entry[_LENGTH:]
    if hashlib.sha256(body).digest() != entry[:_LENGTH] or body[:_LENGTH] != key:
        return None
    return unpack_array(body[_LENGTH:])
