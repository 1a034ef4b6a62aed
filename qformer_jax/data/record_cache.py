"""Keep what was read: a small data set is decoded once and not once an epoch."""

import os
from dataclasses import dataclass, field, replace

from PIL import Image

from .dataset import Source
from .pictures import decode
from .records import Record

MACHINE = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
"""Bytes of memory that this machine has."""
_BUDGET = MACHINE // 4  # bytes of decoded pictures and features, as far as a data set needs them
_TEXT = 4096  # bytes reckoned for the texts of a record


@dataclass(frozen=True)
class RecordCache:
    """Records with decoded pictures, by position; some are kept, as many as memory allows, others read again."""

    source: Source
    """Where records come from."""
    pictures: bool
    """Whether pictures are decoded at all."""
    features: bool = True
    """Whether feature arrays are given."""
    used: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)
    """Bytes kept so far: one number for all memories that share the budget."""
    _kept: dict[int, tuple[Record, tuple[Image.Image, ...]]] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, position: int) -> tuple[Record, tuple[Image.Image, ...]]:
        """Return the record and its picture, or its frames, in RGB (none without `pictures`).

        Raises UserError when one is damaged.
        """
        if position in self._kept:
            return self._kept[position]
        record = self.source[position]
        record = record if self.features else replace(record, features=None)
        encoded = (record.frames or (record.image,)) if self.pictures else ()
        images = tuple(decode(data, record.image_id) for data in encoded)
        size = _TEXT + sum(image.width * image.height * 3 for image in images)
        size += record.features.nbytes if record.features is not None else 0
        if self.used[0] + size <= _BUDGET:
            self.used[0] += size
            self._kept[position] = record, images
        return record, images
