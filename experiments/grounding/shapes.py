"""Draw coloured shapes for grounding: one to three different ones on a grey page, each with its box.

    python -m experiments.grounding.shapes --out runs/grounding/shapes
    qformer data pack folder runs/grounding/shapes_packed --path runs/grounding/shapes

Nothing tells where a shape is but the pixels: places and sizes are drawn uniformly, and no two shapes overlap.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw

COLOURS = {'red': (220, 40, 40), 'green': (40, 180, 40), 'blue': (50, 70, 230), 'yellow': (235, 215, 40)}
SHAPES = ('square', 'circle', 'triangle')
MOST = 3  # shapes on a page
_TRIES = 50


@dataclass(frozen=True)
class Options:
    """Draw pages of shapes in the splits `train` and `test`."""

    out: Path
    """Folder to write."""
    size: int = 64
    """Height and width of a page, pixels."""
    train: int = 8000
    """Pages of `train`."""
    test: int = 500
    """Pages of `test`."""


def page(size: int, rng: np.random.Generator) -> tuple[Image.Image, list[dict]]:
    """Return a page, and its phrases with their boxes."""
    picture, placed, phrases = Image.new('RGB', (size, size), (128, 128, 128)), [], []
    pen = ImageDraw.Draw(picture)
    kinds = rng.choice(len(COLOURS) * len(SHAPES), rng.integers(1, MOST + 1), replace=False).tolist()
    for kind in kinds:
        box = _place(size, placed, rng)
        if box is None:
            continue
        colour, shape = list(COLOURS)[kind % len(COLOURS)], SHAPES[kind // len(COLOURS)]
        _paint(pen, shape, box, COLOURS[colour])
        placed.append(box)
        edges = (box[0], box[1], box[2] + 1, box[3] + 1)  # Pillow's right and bottom pixel belong to a shape
        phrases.append({'phrase': f'{colour} {shape}', 'box': [edge / size for edge in edges]})
    return picture, phrases


def _place(size: int, taken: list[tuple[int, ...]], rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """Return left, top, right and bottom pixel of a shape that touches none of those taken; None if none is found."""
    for _ in range(_TRIES):
        width, height = rng.integers(size // 5, size // 2, 2).tolist()
        left, top = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        box = left, top, left + width - 1, top + height - 1
        if not any(box[0] <= b[2] and b[0] <= box[2] and box[1] <= b[3] and b[1] <= box[3] for b in taken):
            return box
    return None


def _paint(pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    if shape == 'square':
        pen.rectangle(box, fill=colour)
    elif shape == 'circle':
        pen.ellipse(box, fill=colour)
    else:
        pen.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=colour)


def make(options: Options) -> None:
    """Write the folder, unless it is there."""
    for number, (split, count) in enumerate({'train': options.train, 'test': options.test}.items()):
        folder = options.out / split
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(count):
            picture, phrases = page(options.size, np.random.default_rng((number, i)))
            data = io.BytesIO()
            picture.save(data, 'PNG')
            (folder / f'{i:05}.png').write_bytes(data.getvalue())
            caption = ' and '.join(phrase['phrase'] for phrase in phrases)
            lines.append(json.dumps({'file': f'{i:05}.png', 'caption': caption, 'phrases': phrases}))
        (folder / 'captions.jsonl').write_text('\n'.join(lines) + '\n')
    print(f'wrote {options.out}: train {options.train}, test {options.test}')
    print(f'next: qformer data pack folder {options.out}_packed --path {options.out}')


if __name__ == '__main__':
    make(tyro.cli(Options))
