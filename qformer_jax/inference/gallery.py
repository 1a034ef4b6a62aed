"""Pictures found by text. What the networks make of a picture is kept on disk, so a second search encodes nothing.

    file -> SHA-256 -> features [P, V] -> ITC vectors [Q, E] -> cosine with the text -> the best k -> ITM

Entries depend on the bytes of the file, how pictures are read, sizes, weights and compute dtype: a changed picture is a
new one, one that moved is known, and another Q-Former over the same tower finds the features.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from ..convert import store
from ..data.cache import Cache, key_of
from ..data.tokenizers import clean_caption
from ..data.transforms import READ
from ..errors import UserError
from ..objectives import contrastive
from ..typing import Array, Float
from .blip2 import Blip2
from .rerank import OUTSIDE, RERANKED, rerank
from .seen import Seen

_GROUP = 256  # pictures whose features are in memory together


@dataclass(frozen=True)
class Hit:
    """A picture that was found."""

    file: Path
    score: float | None
    """ITM logit of "matched" plus the cosine; None where the picture was not ranked again."""
    cosine: float
    """ITC: of the text and the query nearest to it."""


@dataclass(frozen=True)
class Gallery:
    """Pictures by file, each encoded once."""

    model: Blip2
    files: Sequence[Path]
    cache: Cache
    keep_features: bool = True
    """Keep what ITM reads (ViT-g at 224 pixels: 0.7 MB a picture in bfloat16), or the ITC vectors alone (33 kB)."""

    @cached_property
    def _digests(self) -> list[str]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(_digest, self.files))

    def _keys(self, array: str, *parts: str) -> list[bytes]:
        """Return the key of `array` for every picture; it depends on these parts of the model."""
        run = self.model.run
        shared = {'array': array, 'read': READ, 'dtype': run.training.dtype}
        parts = [part for part in parts if getattr(run.model, part)]
        shared['sizes'] = {part: dataclasses.asdict(getattr(run.model, part)) for part in parts}
        shared['weights'] = {part: store.digest(self.model.params[part]) for part in parts}
        return [key_of(shared | {'picture': digest}) for digest in self._digests]

    @cached_property
    def _feature_keys(self) -> list[bytes]:
        return self._keys('features', 'vit')

    def features(self, rows: Sequence[int]) -> Seen:
        """Return the frozen features of the pictures `rows`, encoding those that are not kept."""
        files = [self.files[row] for row in rows]
        if not (self.keep_features and self.model.run.model.vit):
            return self.model.encode(files)

        def see(positions: list[int]) -> Iterator[np.ndarray]:
            for seen in self.model.encoded(files[p] for p in positions):
                yield from seen.features

        features = np.stack(self.cache.fetch([self._feature_keys[row] for row in rows], see))
        return Seen(features, np.ones(features.shape[:2], bool))

    @cached_property
    def vectors(self) -> Float['N Q E']:
        """The ITC vectors of all pictures; says how many have to be encoded."""
        keys = self._keys('itc vectors', 'vit', 'qformer')
        new = sum(key not in self.cache for key in keys)
        print(f'{len(keys)} pictures, {new} of them new to {self.cache.folder}', file=sys.stderr)
        console, vectors = Console(stderr=True), []
        quiet = not (new and console.is_terminal)
        for begin in track(range(0, len(keys), _GROUP), 'encoding', console=console, disable=quiet):

            def embed(positions: list[int], begin: int = begin) -> Iterator[np.ndarray]:
                yield from self.model.features(self.features([begin + p for p in positions]))

            vectors += self.cache.fetch(keys[begin : begin + _GROUP], embed)
        return np.stack(vectors)

    def search(self, text: str, reranked: int = RERANKED) -> list[Hit]:
        """Return all pictures, best first: the `reranked` most similar by ITM and ITC, then the others by ITC."""
        text = clean_caption(text)
        vector = self.model.features(texts=[text], mode='text')
        cosine = np.asarray(contrastive.similarity(jnp.asarray(self.vectors), jnp.asarray(vector)))[:, 0]
        ids = self.model.text_arrays([text])

        def match(_: Array, pictures: Array) -> Array:
            seen = self.features(pictures.tolist())
            logits = self.model.match(seen, ids, np.arange(len(seen)), np.zeros(len(seen), int))
            return jnp.asarray(logits[:, 1])

        scores = np.full(len(cosine), OUTSIDE)
        if reranked:
            scores = np.asarray(rerank(cosine[None], match, reranked))[0]
        return [
            Hit(self.files[i], float(scores[i]) if scores[i] != OUTSIDE else None, float(cosine[i]))
            for i in np.lexsort((-cosine, -scores))
        ]


def picture_files(paths: Sequence[Path], suffix: str = '') -> list[Path]:
    """Return the pictures among files and folders (with what is in them), sorted within a folder; says what it leaves.

    `suffix` '.npy' takes feature arrays instead. Raises UserError when a path does not exist or nothing is left.
    """
    known = {suffix} if suffix else {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, left = [], []
    for path in paths:
        if not path.exists():
            raise UserError(f'{path}: no such file or folder')
        inside = sorted(p for p in path.rglob('*') if p.is_file() and not p.name.startswith('.'))
        found += [p for p in inside if p.suffix.lower() in known] if path.is_dir() else [path]
        left += [p for p in inside if p.suffix.lower() not in known]
    if left:
        print(f'left out: {len(left)} file(s) that are no pictures by their names, such as {left[0]}', file=sys.stderr)
    if not found:
        raise UserError(f'no picture in {", ".join(map(str, paths))}')
    return found


def _digest(file: Path) -> str:
    try:
        return store.sha256(file)
    except OSError as error:
        raise UserError(f'{file}: {error.strerror.lower()}') from error
