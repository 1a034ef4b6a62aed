"""`qformer data encode`: a data set of features that a frozen tower made."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .options import ConnectorFile, OutFolder, Wait, class_of


@dataclass(frozen=True)
class Encode:
    """Run the frozen vision tower over a packed data set once, so that training reads its features.

    Stage 1 and every later stage train from the result as from the pictures, with the same recipe. The tower is not
    even loaded then, but the finished run refers to it and takes pictures. What is lost is augmentation: there are no
    crops and no mirrored pictures. ViT-g at 224 pixels gives 0.7 MB a picture in bfloat16.
    """

    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar='DATA')]
    """Packed data set of pictures."""
    out: OutFolder
    """Folder to write."""
    vit: Path = tyro.MISSING
    """Finished run whose vision tower encodes: the `vision` run, a converted one, or any that begins with it."""
    taps: tuple[int, ...] = ()
    """Blocks, from 0, whose outputs side by side are the features; empty: as in the tower's run (model.vit.taps)."""
    batch_size: int = 64
    """Pictures that go through the tower together."""
    connector: ConnectorFile = None
    wait: Wait = False


def encode(options: Encode) -> None:
    """Encode, and say what was written and how to train from it."""
    from ..inference.encode import encode as encode_pictures
    from ..lock import one_writer

    with one_writer(options.out, options.wait):
        own = class_of(options.connector)
        encode_pictures(options.data, options.out, options.vit, options.batch_size, options.taps, own)
    print(f'next: {_next(options.out)}')


def _next(out: Path) -> str:
    """Return how to train from the features."""
    from .. import presets
    from ..data.dataset import Dataset

    tower = Dataset.open(out).encoder
    words = f'--data.path {shlex.quote(str(out))} --start.vit {shlex.quote(tower.run)}'
    if tower.vit == presets.DINOV2_S_224:  # of `qformer parts`, which puts MiniLM beside it
        beside = shlex.quote(str(Path(tower.run).parent / 'minilm'))
        return f'qformer train own_stage1 --run runs/own/stage1 {words} --start.checkpoint {beside}'
    taps = ' --model.vit.taps ' + ' '.join(map(str, tower.vit.taps)) if tower.vit.taps else ''
    return f'qformer train RECIPE --run RUN {words} --data.crop-scale 1 1 --data.no-flip{taps}'
