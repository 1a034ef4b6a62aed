"""Drawings of what queries do: where they look in a picture, and how much they carry over a data set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..atomic import replacing
from ..inference.inputs import Picture, read
from .attention import AttentionMaps
from .query_importance import QueryImportance
from .relevance import Relevance

_INCH = 0.9  # of a map in the drawing
_BAR = 0.22  # inches of a bar

SCORES = {'itc': 'ITC cosine', 'itm': 'ITM log odds (nats)', 'lm': 'log p of the text (nats)'}
"""Score -> what it is, for readers."""


def plot_attention(found: AttentionMaps, fit: Relevance | None, picture: Picture, size: int, path: Path) -> None:
    """Draw a row a query over the picture, below one of their mean; the query that carries most comes first.

    Columns: the mean over layers and heads, rollout, the sum of the gradient maps, and each layer's mean over heads.
    Black is zero; the brightest is a map's largest value, for gradients the largest of all queries, so that those which
    do nothing stay dark.
    """
    columns = {'mean': found.mean, 'rollout': found.rollout}
    columns |= {'for the text': fit.gradient.sum(axis=(0, 1))} if fit else {}
    columns |= {f'layer {i}': maps for i, maps in zip(found.layers, found.maps.mean(axis=1), strict=True)}
    rows = [None, *best_first(fit, len(found.mean))]
    figure = Figure(figsize=(_INCH * (len(columns) + 1.4), _INCH * (len(rows) + 0.5)), layout='constrained')
    FigureCanvasAgg(figure)
    pixels = read(picture, size)
    for panels, query in zip(figure.subplots(len(rows), len(columns) + 1), rows, strict=True):
        panels[0].set_ylabel(_label(fit, query), fontsize=6, rotation=0, ha='right', va='center')
        _panel(panels[0], pixels)
        for axes, (name, maps) in zip(panels[1:], columns.items(), strict=True):
            _panel(axes, pixels)
            shown = maps.mean(axis=0) if query is None else maps[query]
            top = maps.max() if name == 'for the text' and query is not None else shown.max()
            style = {'cmap': 'magma', 'alpha': 0.7, 'interpolation': 'bilinear', 'vmin': 0, 'vmax': top}
            axes.imshow(shown, extent=(0, size, size, 0), **style)
    for axes, name in zip(figure.axes, ['picture', *columns], strict=False):
        axes.set_title(name, fontsize=6)
    figure.supxlabel('beside a query: what each score loses without it' if fit else '', fontsize=6)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=120)


def best_first(fit: Relevance | None, queries: int) -> Sequence[int]:
    """Return the queries by cosine, or by what the language model loses without each; as they are without a text."""
    if fit is None:
        return range(queries)
    return np.argsort(-(fit.drops['lm'] if fit.cosines is None else fit.cosines), kind='stable').tolist()


def _label(fit: Relevance | None, query: int | None) -> str:
    if query is None:
        lines = [] if fit is None else [f'{name} {value:.2f}' for name, value in fit.scores.items()]
        return '\n'.join(['all', *lines])
    lines = [] if fit is None else [f'{name} {drops[query]:+.3f}' for name, drops in fit.drops.items()]
    cosine = [] if fit is None or fit.cosines is None else [f'cos {fit.cosines[query]:.2f}']
    return '\n'.join([f'query {query}', *cosine, *lines])


def _panel(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels)
    axes.set_xticks([])
    axes.set_yticks([])


def plot_query_importance(carried: QueryImportance, path: Path) -> None:
    """Draw a bar a query, most important first: the share of pictures where it wins ITC, and what scores lose."""
    wins = {} if carried.wins is None else {'wins ITC (% of pictures)': 100 * carried.wins / carried.count}
    parts = wins | {f'{SCORES[name]}: mean loss without it': drops for name, drops in carried.means.items()}
    order = carried.order
    figure = Figure(figsize=(max(4, 1 + _BAR * len(order)), 1.8 * len(parts)), layout='constrained')
    FigureCanvasAgg(figure)
    for axes, (name, values) in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts.items(), strict=True):
        axes.bar(range(len(order)), values[order], color='#4c5f8c')
        axes.set_title(name, fontsize=8)
        axes.set_xticks(range(len(order)), [str(query) for query in order], fontsize=6)
        axes.tick_params(axis='y', labelsize=6)
        axes.axhline(0, color='black', linewidth=0.5)
    axes.set_xlabel('query', fontsize=8)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=120)
