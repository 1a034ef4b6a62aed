"""Draw canvases for grounding: one to four icons of different concepts without overlap, each with its box.

    python -m experiments.datasets.icons.canvas --out runs/icons/canvases
    qformer data pack folder runs/icons/canvases_packed --path runs/icons/canvases

Every canvas is white or of coloured squares. Its caption names the icons from left to right, as do its phrases.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from experiments.datasets.icons import choose, folder
from experiments.datasets.icons.choose import Choice, Icon
from experiments.datasets.icons.draw import draw, inked, png
from qformer_jax.errors import UserError, command

Corners = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; the last two are one past the icon."""
MOST = 4  # icons on a canvas
_GAP = 2  # pixels at least between two boxes
_TRIES = 100
_CELL = 8  # pixels: edge of a coloured square


@dataclass(frozen=True)
class Options:
    """Draw canvases in the four splits of the pictures."""

    out: Path
    """Folder to write."""
    choice: tyro.conf.OmitArgPrefixes[Choice] = field(default_factory=Choice)
    size: int = 224
    """Height and width, pixels."""
    icons: tuple[float, float] = (0.2, 0.4)
    """Smallest and largest edge of an icon before it is cut to what is drawn, as shares of the size."""
    train: int = 3000
    """Canvases of `train`; the other splits have a tenth of them."""


@dataclass(frozen=True)
class Canvas:
    """What to draw."""

    name: str
    """Its file."""
    icons: tuple[Icon, ...]
    """At most so many will be on it: one that finds no place is left out."""
    seed: tuple[int, ...]
    """Seed of sizes, places and background."""


def plan(splits: dict[str, list[Icon]], seed: int, train: int) -> dict[str, list[Canvas]]:
    """Return what to draw in every split; icons of a canvas show different concepts."""
    canvases = {}
    for part, (split, found) in enumerate(splits.items()):
        canvases[split] = []
        for number in range(train if split == 'train' else max(train // 10, 1)):
            rng = np.random.default_rng((seed, part, number))
            drawn = (found[i] for i in rng.choice(len(found), size=min(4 * MOST, len(found)), replace=False))
            different = {icon.concept: icon for icon in drawn}
            chosen = tuple(itertools.islice(different.values(), int(rng.integers(1, MOST + 1))))
            canvases[split].append(Canvas(f'{number:05}.png', chosen, (seed, part, number, 1)))
    return canvases


def paint(canvas: Canvas, size: int, edges: tuple[float, float]) -> tuple[Image.Image, list[tuple[Icon, Corners]]]:
    """Return the picture in RGB, and its icons with the tightest boxes around them, from left to right."""
    rng, (smallest, largest) = np.random.default_rng(canvas.seed), (int(size * edge) for edge in edges)
    page, placed = _background(size, rng), []
    for icon in canvas.icons:
        edge = int(rng.integers(smallest, largest))
        whole = draw(icon.svg, edge)
        part = whole.crop(inked(whole))
        box = _place(part.size, size, [box for _, box in placed], rng)
        if box:
            page.alpha_composite(part, box[:2])
            placed.append((icon, box))
    return page.convert('RGB'), sorted(placed, key=lambda pair: pair[1])


def _background(size: int, rng: np.random.Generator) -> Image.Image:
    """Return a white page, or one of pale squares in random colours."""
    if rng.random() < 0.5:
        return Image.new('RGBA', (size, size), 'white')
    cells = rng.integers(160, 256, size=(-(-size // _CELL), -(-size // _CELL), 3), dtype=np.uint8)
    pixels = cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)[:size, :size]
    return Image.fromarray(pixels).convert('RGBA')


def _place(part: tuple[int, int], size: int, taken: list[Corners], rng: np.random.Generator) -> Corners | None:
    """Return a box of `part` (width, height) that overlaps none of those taken; None where none was found."""
    for _ in range(_TRIES):
        left, top = (int(rng.integers(size - length + 1)) for length in part)
        box = left, top, left + part[0], top + part[1]
        if not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(a: Corners, b: Corners) -> bool:
    return a[0] < b[2] + _GAP and b[0] < a[2] + _GAP and a[1] < b[3] + _GAP and b[1] < a[3] + _GAP


def line(canvas: Canvas, size: int, edges: tuple[float, float]) -> folder.Line:
    """Return a canvas as a line with phrases, boxes as shares of its size."""
    picture, placed = paint(canvas, size, edges)
    phrases = [{'phrase': icon.concept, 'box': [edge / size for edge in box]} for icon, box in placed]
    concepts = [icon.concept for icon, _ in placed]
    caption = ' and '.join(filter(None, (', '.join(concepts[:-1]), concepts[-1])))
    return {'file': canvas.name, 'caption': caption, 'phrases': phrases}, {canvas.name: png(picture)}


def make(options: Options) -> str:
    """Write the folder and return its fingerprint; raises UserError for edges that no page has."""
    smallest, largest = options.icons
    if not (smallest > 0 and largest <= 1 and int(options.size * smallest) < int(options.size * largest)):
        raise UserError(
            f'--icons {smallest:g} {largest:g} are not the smallest and the largest edge of icons on a page of --size '
            f'{options.size} pixels: they are shares of it, at least a pixel apart'
        )
    canvases = plan(choose.icons(options.choice), options.choice.seed, options.train)
    return folder.write(options.out, canvases, lambda canvas: line(canvas, options.size, options.icons))


if __name__ == '__main__':
    command(lambda: make(tyro.cli(Options)))
