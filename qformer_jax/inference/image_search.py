"""Pictures found by text. What the networks make of a picture is kept on disk, so a second search encodes nothing.

    file -> SHA-256 -> features [P, V] -> ITC vectors [Q, E] -> cosine with the text -> the best k -> ITM

Another Q-Former over the same tower finds the features (what an entry depends on: `inference/feature_cache.py`).
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from ..data import pictures
from ..data.tokenizers import clean_caption
from ..errors import UserError
from ..objectives import contrastive
from ..typing import Array, Float
from .blip2 import Blip2
from .inputs import ImageFeatures
from .rerank import EXCLUDED, RERANK_TOP_K, rerank


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
    """With a cache."""
    files: Sequence[Path]
    keep_features: bool = True
    """Keep what ITM reads (ViT-g at 224 pixels: 0.7 MB a picture in bfloat16), or the ITC vectors alone (33 kB)."""

    def features(self, files: Sequence[Path]) -> ImageFeatures:
        """Return the frozen features of some of the pictures, encoding those that are not kept."""
        return self.model.encode_images(files, self.keep_features)

    @cached_property
    def vectors(self) -> Float['N Q E']:
        """The ITC vectors of all pictures; says how many had to be encoded."""
        kept, new, console = self.model.feature_cache, [], Console(stderr=True)

        def embed(files: Sequence[Path]) -> Array:
            new.extend(files)
            return self.model.features(self.features(files))

        vectors = kept.fetch('itc vectors', self.files, embed)
        shown = track(vectors, 'encoding', len(self.files), console=console, disable=not console.is_terminal)
        vectors = np.stack(list(shown))
        print(f'{len(self.files)} pictures, {len(new)} of them new to {kept.cache.folder}', file=sys.stderr)
        return vectors

    def search(self, text: str, reranked: int = RERANK_TOP_K) -> list[Hit]:
        """Return all pictures, best first: the `reranked` most similar by ITM and ITC, then the others by ITC."""
        text = clean_caption(text)
        vector = self.model.features(texts=[text], mode='text')
        cosine = np.asarray(contrastive.similarity(jnp.asarray(self.vectors), jnp.asarray(vector)))[:, 0]
        ids = self.model.text_arrays([text])

        def match(_: Array, pictures: Array) -> Array:
            image_features = self.features([self.files[i] for i in pictures.tolist()])
            logits = self.model.match(
                image_features, ids, np.arange(len(image_features)), np.zeros(len(image_features), int)
            )
            return jnp.asarray(logits[:, 1])

        scores = np.full(len(cosine), EXCLUDED)
        if reranked:
            scores = np.asarray(rerank(cosine[None], match, reranked))[0]
        return [
            Hit(self.files[i], float(scores[i]) if scores[i] != EXCLUDED else None, float(cosine[i]))
            for i in np.lexsort((-cosine, -scores))
        ]


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, those behind links to folders too, each folder once: links may make circles."""
    entered = {os.path.realpath(folder)}
    for root, inside, names in os.walk(folder, followlinks=True):
        places = {os.path.realpath(os.path.join(root, name)): name for name in sorted(inside, reverse=True)}
        inside[:] = sorted(name for place, name in places.items() if place not in entered)
        entered |= places.keys()
        yield from (Path(root, name) for name in names)


def picture_files(paths: Sequence[Path], suffix: str = '') -> list[Path]:
    """Return the pictures among files and folders (with what is in them), sorted within a folder; says what it leaves.

    `suffix` '.npy' takes feature arrays instead. Raises UserError when a path does not exist or nothing is left.
    """
    known = {suffix} if suffix else pictures.suffixes()
    found, left = [], []
    for path in paths:
        if not path.exists():
            raise UserError(f'{path}: no such file or folder')
        inside = sorted(p for p in _below(path) if p.is_file() and not p.name.startswith('.'))
        found += [p for p in inside if p.suffix.lower() in known] if path.is_dir() else [path]
        left += [p for p in inside if p.suffix.lower() not in known]
    if left:
        print(f'left out: {len(left)} file(s) that are no pictures by their names, such as {left[0]}', file=sys.stderr)
    if not found:
        raise UserError(f'no picture in {", ".join(map(str, paths))}')
    return found
