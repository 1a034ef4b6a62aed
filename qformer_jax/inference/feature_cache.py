"""What the networks make of a picture, kept on disk under all that it depends on.

An entry depends on the bytes of the picture, how pictures are read, sizes, compute dtype, and the weights, as they are
in use, that it goes through: a changed picture is a new one, one that moved is known, and the entry of another tower,
of other bits or of another Q-Former is never found. Not among it: the device, and so the last bits.

    entry                  ViT-g at 224 pixels, bfloat16    spares (GFLOP a picture)    for
    features [P, V]        724 kB                           527  the tower              ITM, queries that read a text
    queries [Q, D]         49 kB                            540  and the Q-Former       answers
    itc vectors [Q, E]     33 kB (float32)                  540                         search

Not kept are the keys and values of the cross-attention: 4.7 MB a picture, and over the features they spare 7 GFLOP, 2 %
of answering a question with OPT-2.7B. Nor queries that read the question: another question has others.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .. import config
from ..data.cache import Cache, key_of
from ..data.transforms import READ
from ..errors import UserError
from ..hashing import sha256
from ..rules import TEXT_SIDE, match
from ..runs import weight_store
from ..typing import Params
from .inputs import Picture, read

Kind = Literal['features', 'queries', 'itc vectors']

_TO_QUERIES = (TEXT_SIDE, False), ('(vit|time|qformer)/.*', True), ('.*', False)
_WEIGHTS: dict[Kind, tuple[tuple[str, bool], ...]] = {
    'features': (('vit/.*', True), ('.*', False)),
    'queries': _TO_QUERIES,
    'itc vectors': (('qformer/vision_projection/.*', True), *_TO_QUERIES),
}
"""Kind of entry -> ordered rules over parameter paths: whether it depends on them."""
_GROUP = 256  # pictures whose entries are written together, into one file


@dataclass(frozen=True)
class FeatureCache:
    """What a model makes of pictures, each computed once."""

    run: config.Run
    params: Params
    cache: Cache

    def fetch(
        self,
        kind: Kind,
        pictures: Iterable[Picture],
        compute: Callable[[list[Picture]], Iterable[np.ndarray]],
        keep: bool = True,
    ) -> Iterator[np.ndarray]:
        """Yield the array [P, V], [Q, D] or [Q, E] of every picture.

        `compute` yields, in their order, those of the pictures that are not there or damaged; they are kept, or with
        `keep` False only given. Raises UserError for a file that cannot be read, or a full disk.
        """
        pictures = iter(pictures)
        while group := list(itertools.islice(pictures, _GROUP)):
            chosen = lambda positions, group=group: compute([group[p] for p in positions])  # noqa: E731
            yield from self.cache.fetch(self._keys(kind, group), chosen, keep)

    def _keys(self, kind: Kind, pictures: Sequence[Picture]) -> list[bytes]:
        size = self.run.model.vit.image_size if self.run.model.vit else 0
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(functools.partial(_digest, size=size), pictures))
        return [key_of({'model': self._models[kind], 'picture': digest}) for digest in digests]

    @functools.cached_property
    def _models(self) -> dict[Kind, str]:
        """Kind -> digest of what its entries depend on, beside the picture."""
        sizes = {name: getattr(self.run.model, name) for name in ('vit', 'time', 'qformer')}
        sizes = {name: part for name, part in sizes.items() if part}
        weights = weight_store.digests({part: self.params[part] for part in sizes})
        shared = {'read': READ, 'dtype': self.run.training.dtype}
        models = {}
        for kind, rules in _WEIGHTS.items():
            used = [path for path, through in match(rules, weights).items() if through]
            parts = sorted({path.split('/')[0] for path in used})
            depends = {'sizes': {part: dataclasses.asdict(sizes[part]) for part in parts}}
            depends['weights'] = {path: weights[path] for path in used}
            models[kind] = key_of(shared | depends | {'array': kind}).hex()
        return models


def _digest(picture: Picture, size: int) -> str:
    """Return the SHA-256 of a file's bytes; of a video and a picture in memory, that of what is read from it."""
    if isinstance(picture, str | Path) and not os.path.isdir(picture):
        try:
            return sha256(Path(picture))
        except (OSError, ValueError) as error:  # a ValueError: of a name with NUL
            raise UserError(f'{picture}: {(getattr(error, "strerror", None) or str(error)).lower()}') from error
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    array = read(picture, size)
    return hashlib.sha256(f'{array.dtype} {array.shape}'.encode() + array.tobytes()).hexdigest()
