"""Draw icons as a data set of pictures with captions: one concept, drawn by many vendors.

python -m experiments.datasets.icons.make --out runs/icons/pictures
qformer data pack folder runs/icons/pictures_packed --path runs/icons/pictures
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from experiments.datasets.icons import choose, folder
from experiments.datasets.icons.choose import Choice, Icon
from experiments.datasets.icons.draw import draw, on_white, png
from qformer_jax.errors import command


@dataclass(frozen=True)
class Options:
    """Draw icons in four splits: train, validation, a held-out vendor, and held-out concepts."""

    out: Path
    """Folder to write."""
    choice: tyro.conf.OmitArgPrefixes[Choice] = field(default_factory=Choice)
    size: int = 112
    """Height and width, pixels."""


def line(icon: Icon, size: int) -> folder.Line:
    """Return the picture of an icon with its concept as the caption."""
    file = f'{icon.vendor}/{icon.name}.png'
    return {'file': file, 'caption': icon.concept}, {file: png(on_white(draw(icon.svg, size)))}


def make(options: Options) -> str:
    """Write the folder and return its fingerprint."""
    return folder.write(options.out, choose.icons(options.choice), lambda icon: line(icon, options.size))


if __name__ == '__main__':
    command(lambda: make(tyro.cli(Options)))
