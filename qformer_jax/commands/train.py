"""`qformer train`: a recipe, its fields overridden by options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .. import config, recipes
from .options import Wait
from .parse import parse


@dataclass(frozen=True)
class Train:
    """Train one stage."""

    config: Annotated[config.Run, tyro.conf.arg(name='')]
    run: Path = tyro.MISSING
    """Folder of the run: checkpoints, log, curves; give the same one again to continue."""
    restart: str = ''
    """Remove another run that is in that folder: repeat the folder's name here. The very same run only continues."""
    wait: Wait = False


def train(arguments: list[str]) -> None:
    """Train a recipe, the first word; options override its fields."""
    default, card = recipes.load(arguments[0])
    options = parse(
        tyro.conf.AvoidSubcommands[Train],
        arguments[1:],
        prog=f'qformer train {arguments[0]}',
        description=card,
        default=Train(default),
    )
    from ..training import fit, loop
    from ..training.stages import RETRIEVE, STAGES

    done = loop.train(options.config, options.run, options.wait, options.restart)
    step, data = STAGES[done.run.stage].next_step, done.run.data
    split = fit.split_option(data.path, data.validation_split) if step == RETRIEVE else ''
    print(f'next: {step.format(run=done.folder)}{split}')
