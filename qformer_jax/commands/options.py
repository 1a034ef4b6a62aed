"""Options that several commands have: how texts are found, and whether what a picture gives is kept."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..config.ranges import Few, FromZero, Seed, Share

if TYPE_CHECKING:
    import jax

    from ..inference.blip2 import Blip2
    from ..inference.generate import GenerationConfig


def several(name: str) -> object:
    """Name a positional argument that takes one word or more."""
    return tyro.conf.arg(metavar=f'{name}...', help_behavior_hint='(one or more)')


RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar='RUN')]
PictureFile = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar='PICTURE')]
Question = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar='QUESTION')]
NewFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar='DEST')]
OutFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar='OUT')]
ConnectorFile = Annotated[
    Path | None,
    tyro.conf.arg(
        help='For a run with a connector of your own: the .py file with its class Connector. That file is run; nothing '
        'in a run folder ever is.'
    ),
]
Wait = Annotated[
    bool, tyro.conf.arg(help='Wait for another process that writes to the same place, instead of giving up.')
]


def class_of(connector: Path | None) -> type | None:
    """Return the class Connector of a .py file, which is run; raises UserError where there is none."""
    from ..models import connectors

    return connectors.from_file(connector) if connector else None


@dataclass(frozen=True)
class SamplingArgs:
    """How the next token is found."""

    temperature: float = 0.0
    """0: take the likeliest token; above 0: draw one, the higher the more freely (see --top-k, --top-p)."""
    top_k: FromZero = 0
    """Draw among this many likeliest tokens; 0: among all."""
    top_p: Share = 1.0
    """Draw among the likeliest tokens that have this probability together (nucleus; LAVIS: 0.9); 1: among all."""
    seed: Seed = 0
    """Seed of the draws: the same one gives the same texts."""

    def settings(self, max_new_tokens: int) -> 'GenerationConfig':
        """Return them as the search takes them; raises UserError where they contradict each other."""
        from ..inference.generate import GenerationConfig

        return GenerationConfig(max_new_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def key(self) -> 'jax.Array | None':
        """Return the key of what is drawn; None where nothing is."""
        import jax

        return jax.random.key(self.seed) if self.temperature else None


@dataclass(frozen=True)
class GenerationArgs(SamplingArgs):
    """How texts are found."""

    num_beams: Few = 1
    """Beams: texts pursued side by side, of which the best are printed; 1: greedy (LAVIS: 5)."""
    num_return: Few = 1
    """Texts to print for each picture, best first; more than one needs beams or a temperature."""

    def settings(self, max_new_tokens: int) -> 'GenerationConfig':
        """Return them as the search takes them; raises UserError where they contradict each other."""
        from dataclasses import replace

        return replace(super().settings(max_new_tokens), num_beams=self.num_beams, num_return=self.num_return)


@dataclass(frozen=True)
class CacheArgs:
    """What is kept of pictures."""

    cache: bool = False
    """Keep what the run makes of each picture in a folder `cache` beside the run: none is encoded twice."""

    @contextmanager
    def load(self, run: Path, connector: Path | None = None) -> Iterator['Blip2']:
        """Lend the run, with a cache if that is wanted, and say at the end how much is new there."""
        from ..inference.blip2 import Blip2

        model = Blip2.load(run, cache=run.parent / 'cache' if self.cache else None, connector=connector)
        before = model.cache.entries if model.cache else 0
        yield model
        if model.cache:
            print(f'cache: {model.cache.folder}, {model.cache.entries - before} new', file=sys.stderr)
