"""Where the queries look: the Q-Former's cross-attention over a picture (BLIP-2, section 3.1), as arrays and drawn.

In a layer that reads features a query's weights over class token and patches sum to 1. For maps the class token is left
out, and a map keeps what the patches got.
"""

from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import UserError
from ..inference.blip2 import Blip2
from ..inference.passes import bound
from ..inference.seen import Picture, read
from ..models import blip2
from ..typing import Array, Bool, Float

_INCH = 0.9  # of a map in the drawing


@dataclass(frozen=True)
class Looks:
    """Where a picture's queries look in the C layers that read features, over G x G patches."""

    maps: Float['C H Q G G']
    class_token: Float['C H Q']
    """What the class token got."""
    layers: tuple[int, ...]
    """The numbers of the layers, from 0."""
    cosines: Float['Q'] | None
    """How well each query fits a text by ITC, whose similarity is the best of them; None where none was asked for."""

    @property
    def mean(self) -> Float['Q G G']:
        """The mean over layers and heads."""
        return self.maps.mean(axis=(0, 1))


@bound
def _weights(model: blip2.Blip2, features: Float['B P V'], mask: Bool['B P'], *text: Array) -> Float['B C H Q P']:
    return jnp.stack(model.ask_queries(features, mask, *text, keep_attention=True).attention, axis=1)


def looks(model: Blip2, picture: Picture, text: str = '') -> Looks:
    """Return where the queries look: beside a text that they read, or that they are compared with.

    Instruction-aware queries read the text, those of a stage-1 run have a cosine with it. Raises UserError for a run
    without a tower or a Q-Former, and where a text is missing or has no use.
    """
    model.needs('qformer')
    c, reads = model.run.model, model.run.objective.instruction_aware
    if not c.vit:
        raise UserError('this run reads feature arrays, on which nothing can be drawn: give one with a vision tower')
    if reads and not text:
        raise UserError('the queries of this run read a text: give one')
    if text and not reads and c.qformer.text_side not in ('full', 'retrieval'):
        raise UserError('the queries of this run neither read a text nor compare with one: leave it out')
    seen = model.encode([picture])
    given = model.text_arrays([text]) if reads else []
    weights = np.asarray(_weights(model.model, model.params, seen.features, seen.mask, *given))[0]
    side = isqrt(weights.shape[-1] - 1)
    maps = weights[..., 1:].reshape(*weights.shape[:-1], side, side)
    layers = tuple(range(0, c.qformer.depth, c.qformer.cross_attention_freq))
    cosines = None
    if text and not reads:
        cosines = model.features(seen)[0] @ model.features(texts=[text], mode='text')[0]
    return Looks(maps, weights[..., 0], layers, cosines)


def draw(found: Looks, picture: Picture, size: int, path: Path) -> None:
    """Draw a row a query, over the picture: the mean, then each layer's mean over heads; the best query first."""
    order = range(found.maps.shape[2]) if found.cosines is None else np.argsort(-found.cosines, kind='stable')
    columns = [found.mean, *found.maps.mean(axis=1)]
    names = ['mean', *(f'layer {layer}' for layer in found.layers)]
    figure = Figure(figsize=(_INCH * (len(columns) + 1), _INCH * (len(order) + 0.5)), layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(order), len(columns) + 1, squeeze=False)
    pixels = read(picture, size)
    for row, query in zip(panels, order, strict=True):
        fit = '' if found.cosines is None else f'\n{found.cosines[query]:.2f}'
        row[0].set_ylabel(f'query {query}{fit}', fontsize=6)
        _panel(row[0], pixels)
        for axes, maps in zip(row[1:], columns, strict=True):
            _panel(axes, pixels)
            axes.imshow(maps[query], extent=(0, size, size, 0), cmap='magma', alpha=0.7, interpolation='bilinear')
    for axes, name in zip(panels[0], ['picture', *names], strict=True):
        axes.set_title(name, fontsize=6)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels)
    axes.set_xticks([])
    axes.set_yticks([])
