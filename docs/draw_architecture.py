"""Draw docs/architecture.svg: BLIP-2 from image to text, the Q-Former inside, and its three attention masks.

    python docs/draw_architecture.py

The masks are those of `qformer_jax/models/masks.py`, called here. The background is opaque, so the drawing reads the
same on a light page and on a dark one.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

from qformer_jax.models import masks

INK, MUTED, PAPER, LINE = '#1d2733', '#5b6673', '#fcfcfa', '#8a94a0'
FROZEN, TRAINED, QUERY, TEXT, PLAIN = '#d6e4f2', '#fbe0c3', '#f2a65a', '#8fc1a3', '#ffffff'
NUM_QUERIES, NUM_TEXT = 3, 4


def box(axes, x, y, width, height, text, fill, size=11, weight='normal', edge=INK):
    """Draw a rounded box with its text in the middle."""
    style = 'round,pad=0,rounding_size=0.09'
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.1))
    axes.text(x + width / 2, y + height / 2, text, ha='center', va='center', fontsize=size, color=INK, weight=weight)


def arrow(axes, start, end, label='', bend=None, color=INK):
    """Draw an arrow, with a label above its middle."""
    style = {'arrowstyle': '-|>', 'color': color, 'linewidth': 1.3, 'shrinkA': 0, 'shrinkB': 0, 'mutation_scale': 12}
    if bend:
        style['connectionstyle'] = bend
    axes.annotate('', end, start, arrowprops=style)
    if label:
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(middle[0], middle[1] + 0.1, label, ha='center', va='bottom', fontsize=9, color=MUTED)


def note(axes, x, y, text, size=9.5, ha='center', color=MUTED, **options):
    """Write a few words."""
    axes.text(x, y, text, ha=ha, va='center', fontsize=size, color=color, **options)


def tokens(axes, x, y, count, fill, size=0.24, gap=0.06):
    """Draw a row of token squares around x."""
    width = count * size + (count - 1) * gap
    for i in range(count):
        corner = x - width / 2 + i * (size + gap), y
        axes.add_patch(Rectangle(corner, size, size, facecolor=fill, edgecolor=INK, linewidth=0.9))


def picture(axes, x, y, size):
    """Draw a picture of a shape, cut into patches."""
    axes.add_patch(Rectangle((x, y), size, size, facecolor='#eef6ee', edgecolor=INK, linewidth=1.1))
    corners = [(x + size * a, y + size * b) for a, b in ((0.22, 0.2), (0.8, 0.2), (0.5, 0.78))]
    axes.add_patch(Polygon(corners, facecolor='#d64545', edgecolor='none'))
    for i in (1, 2, 3):
        axes.plot([x + size * i / 4] * 2, [y, y + size], color='white', linewidth=1.2)
        axes.plot([x, x + size], [y + size * i / 4] * 2, color='white', linewidth=1.2)


def bracket(axes, left, right, y, text):
    """Draw a bracket under a part of the pipeline."""
    axes.plot([left, left, right, right], [y + 0.12, y, y, y + 0.12], color=LINE, linewidth=1.2)
    note(axes, (left + right) / 2, y - 0.2, text, size=10, color=INK)


def pipeline(axes):
    """Draw the upper band: image -> vision encoder -> Q-Former -> projection -> language model -> text."""
    y, height = 8.2, 1.25
    middle = y + height / 2
    picture(axes, 0.35, y + 0.1, 1.05)
    arrow(axes, (1.5, middle), (2.1, middle))
    box(axes, 2.1, y, 2.0, height, 'vision encoder\n❄ frozen', FROZEN, 12)
    arrow(axes, (4.1, middle), (5.4, middle), 'features\nP × V')
    box(axes, 5.4, y, 2.0, height, 'Q-Former\ntrained', TRAINED, 12)
    tokens(axes, 6.4, y + height + 0.42, NUM_QUERIES, QUERY)
    note(axes, 6.95, y + height + 0.54, 'learned queries', ha='left')
    arrow(axes, (6.4, y + height + 0.4), (6.4, y + height))
    arrow(axes, (7.4, middle), (8.5, middle), 'queries\nQ × D')
    box(axes, 8.5, y, 1.45, height, 'projection\ntrained', TRAINED, 12)
    arrow(axes, (9.95, middle), (11.05, middle), 'prefix\nQ × L')
    box(axes, 11.05, y, 2.2, height, 'language model\n❄ frozen', FROZEN, 12)
    arrow(axes, (13.25, middle), (13.85, middle))
    note(axes, 13.95, middle, '“triangle”', size=12, ha='left', color=INK)
    note(axes, 12.15, y + height + 0.54, 'prompt: “what shape is in the image?”')
    arrow(axes, (12.15, y + height + 0.4), (12.15, y + height))
    bracket(axes, 2.1, 7.4, 7.88, 'stage 1: align queries and text (ITC + ITM + ITG)')
    bracket(axes, 2.1, 13.25, 7.34, 'stage 2 and instruction tuning: the language model reads the queries')


def inside(axes):
    """Draw the Q-Former: two streams with shared self-attention, cross-attention for the queries only, three losses."""
    left, right, width = 2.35, 5.35, 2.3
    note(axes, 0.35, 6.62, 'Inside the Q-Former', size=13, ha='left', color=INK, weight='bold')
    frame = FancyBboxPatch(
        (2.05, 1.3), 5.9, 3.4, boxstyle='round,pad=0,rounding_size=0.12', facecolor='#fdf3e6', edgecolor=LINE,
        linewidth=1.1, linestyle=(0, (4, 3)),
    )  # fmt: skip
    axes.add_patch(frame)
    note(axes, 8.05, 4.4, 'repeated\nfor each layer', size=10, ha='left')
    box(axes, left, 1.55, right + width - left, 0.6, 'self-attention, shared by both sides', TRAINED)
    box(axes, left, 2.65, width, 0.75, 'cross-attention\n(every second layer)', TRAINED, 10.5)
    box(axes, left, 3.85, width, 0.6, 'feed-forward, queries', TRAINED)
    box(axes, right, 3.85, width, 0.6, 'feed-forward, text', TRAINED)
    for x, points in ((left + width / 2, (1.2, 1.55, 2.15, 2.65, 3.4, 3.85, 4.45, 5.1)),):
        for start, end in zip(points[::2], points[1::2], strict=True):
            arrow(axes, (x, start), (x, end))
    text_x = right + width / 2
    for start, end in ((1.2, 1.55), (2.15, 3.85), (4.45, 5.1)):
        arrow(axes, (text_x, start), (text_x, end))
    box(axes, 0.35, 2.65, 1.25, 0.75, 'image\nfeatures', FROZEN, 10)
    arrow(axes, (1.6, 3.025), (left, 3.025))
    tokens(axes, left + width / 2, 0.95, NUM_QUERIES, QUERY)
    note(axes, left + width / 2, 0.7, 'learned queries')
    tokens(axes, text_x, 0.95, NUM_TEXT, TEXT)
    note(axes, text_x, 0.7, 'text tokens')
    tokens(axes, left + width / 2, 5.12, NUM_QUERIES, QUERY)
    tokens(axes, text_x, 5.12, NUM_TEXT, TEXT)
    box(axes, 0.95, 5.78, 1.75, 0.5, 'ITM: a match?', PLAIN)
    box(axes, 3.75, 5.78, 2.5, 0.5, 'ITC: similar?', PLAIN)
    box(axes, 7.0, 5.78, 1.75, 0.5, 'ITG: next token', PLAIN)
    query_x = left + width / 2
    arrow(axes, (query_x - 0.3, 5.4), (2.3, 5.78))
    arrow(axes, (query_x + 0.25, 5.4), (4.2, 5.78))
    arrow(axes, (text_x - 0.45, 5.4), (5.8, 5.78))
    arrow(axes, (text_x + 0.4, 5.4), (7.5, 5.78))


def mask(axes, x, y, values, title, words, cell=0.22):
    """Draw an attention mask: a row says what this position sees."""
    count, small = len(values), cell - 0.08
    kinds = [QUERY] * NUM_QUERIES + [TEXT] * NUM_TEXT
    for row in range(count):
        top = y + (count - 1 - row) * cell
        axes.add_patch(Rectangle((x - 0.3, top + 0.04), small, small, facecolor=kinds[row], edgecolor='none'))
        for column in range(count):
            fill = '#44546a' if values[row, column] else '#ffffff'
            corner = x + column * cell, top
            axes.add_patch(Rectangle(corner, cell, cell, facecolor=fill, edgecolor=LINE, linewidth=0.8))
    for column in range(count):
        corner = x + column * cell + 0.04, y + count * cell + 0.1
        axes.add_patch(Rectangle(corner, small, small, facecolor=kinds[column], edgecolor='none'))
    axes.text(x + 1.85, y + 1.38, title, fontsize=11.5, color=INK, va='center', weight='bold')
    axes.text(x + 1.85, y + 1.16, words, fontsize=10, color=MUTED, va='top', linespacing=1.35)


def attention_masks(axes):
    """Draw the three masks of stage 1, computed by the package."""
    text = np.ones((1, NUM_TEXT), bool)
    title = 'Self-attention masks: one network, three tasks'
    note(axes, 9.55, 6.62, title, size=13, ha='left', color=INK, weight='bold')
    generation = 'Text sees the queries and the\ntext up to itself. Queries do not\nsee text.'
    rows = (
        (4.42, masks.unimodal, 'ITC: contrast', 'Queries see queries,\ntext sees text.'),
        (2.4, masks.bidirectional, 'ITM: matching', 'All see all, so queries\ncan compare image and text.'),
        (0.38, masks.multimodal_causal, 'ITG: generation', generation),
    )
    for y, function, title, words in rows:
        mask(axes, 10.35, y, np.asarray(function(NUM_QUERIES, text))[0, 0], title, words)


def key(axes):
    """Draw the legend."""
    entries = ((0.35, FROZEN, '❄ frozen'), (1.85, TRAINED, 'trained'), (3.2, QUERY, 'query'), (4.4, TEXT, 'text token'))
    for x, fill, text in (*entries, (6.0, '#44546a', 'a row may see this column')):
        axes.add_patch(Rectangle((x, 0.12), 0.24, 0.2, facecolor=fill, edgecolor=INK, linewidth=0.8))
        note(axes, x + 0.34, 0.22, text, ha='left')


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(15.2, 10.7), facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 15.2)
    axes.set_ylim(-0.1, 10.6)
    axes.set_axis_off()
    axes.plot([0.35, 14.85], [6.93, 6.93], color='#d8dce0', linewidth=1)
    for part in (pipeline, inside, attention_masks, key):
        part(axes)
    return figure


if __name__ == '__main__':
    matplotlib.rcParams |= {'svg.hashsalt': 'architecture', 'font.family': 'DejaVu Sans'}
    draw().savefig(Path(__file__).with_name('architecture.svg'), metadata={'Date': None, 'Creator': None})
