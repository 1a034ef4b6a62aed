"""`qformer attention`: where the queries look in a picture."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Attention:
    """Draw where each query of the Q-Former looks in a picture: its cross-attention over the patches.

    A row a query; the columns are the mean over all layers and heads, and each layer's mean over its heads. With --text
    a stage-1 run says how well each query fits it (ITC), best first; the queries of an instruction-aware run read it.
    What the class token got is left out of the maps. attention.npz holds every layer and head: maps [C, H, Q, G, G],
    class_token [C, H, Q], layers [C], and cosines [Q] where there are any.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run (`stage1` or later)."""
    picture: tyro.conf.Positional[Path]
    """Picture file."""
    text: str = ''
    """A caption to compare with, or the question that instruction-aware queries read."""
    out: Path = Path('attention')
    """Folder to write."""


def attention(options: Attention) -> None:
    """Write attention.png and attention.npz, and print the queries that fit best."""
    import numpy as np

    from ..analysis.attention import draw, looks
    from ..inference.blip2 import Blip2

    model = Blip2.load(options.run)
    found = looks(model, options.picture, options.text)
    options.out.mkdir(parents=True, exist_ok=True)
    picture, arrays = options.out / 'attention.png', options.out / 'attention.npz'
    draw(found, options.picture, model.run.model.vit.image_size, picture)
    kept = {'maps': found.maps, 'class_token': found.class_token, 'layers': np.array(found.layers)}
    np.savez(arrays, **kept, **({} if found.cosines is None else {'cosines': found.cosines}))
    if found.cosines is not None:
        best = ', '.join(f'{query} ({found.cosines[query]:.3f})' for query in np.argsort(-found.cosines)[:3])
        print(f'queries that fit "{options.text}" best: {best}')
    print(f'wrote {picture} and {arrays}')
    print(f'next: open {picture}')
