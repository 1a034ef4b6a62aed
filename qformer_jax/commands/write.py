"""`qformer caption` and `qformer ask`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..errors import UserError

if TYPE_CHECKING:
    import jax

    from ..inference.search import Settings


@dataclass(frozen=True)
class Writing:
    """How texts are found."""

    num_beams: int = 1
    """Texts pursued at a time, of which the best are printed; 1: greedy (LAVIS: 5)."""
    num_return: int = 1
    """Texts to print, best first; more than one needs beams or a temperature."""
    temperature: float = 0.0
    """Above 0: draw the words (nucleus sampling with --top-p); 0: take the likeliest."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability (LAVIS: 0.9); 1: all."""
    seed: int = 0
    """Of what is drawn: the same seed gives the same texts."""

    def settings(self, max_new_tokens: int) -> 'Settings':
        """Return them as the search takes them; raises UserError where they contradict each other."""
        from ..inference.search import Settings

        return Settings(
            max_new_tokens=max_new_tokens,
            num_beams=self.num_beams,
            num_return=self.num_return,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )

    def key(self) -> 'jax.Array | None':
        """Return the key of what is drawn; None where nothing is."""
        import jax

        return jax.random.key(self.seed) if self.temperature else None


@dataclass(frozen=True)
class Caption:
    """Describe pictures with a finished run of stage 1 or later."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Picture files (or .npy feature arrays, where the run reads those)."""
    writing: Annotated[Writing, tyro.conf.arg(name='')] = Writing()
    max_new_tokens: int = 20
    """Longest caption, in tokens."""


def caption(options: Caption) -> None:
    """Print one line a caption."""
    from ..inference.blip2 import Blip2

    if not options.pictures:
        raise UserError('no picture given: qformer caption RUN PICTURE...')
    settings = options.writing.settings(options.max_new_tokens)
    captions = Blip2.load(options.run).caption(options.pictures, settings, options.writing.key())
    paths = [path for path in options.pictures for _ in range(settings.num_return)]
    for path, text in zip(paths, captions, strict=True):
        print(f'{path}: {text}')


@dataclass(frozen=True)
class Ask:
    """Answer a question about a picture with a finished run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    picture: tyro.conf.Positional[Path]
    """Picture file (or a .npy feature array, where the run reads those)."""
    question: tyro.conf.Positional[str]
    """The question, in quotes."""
    writing: Annotated[Writing, tyro.conf.arg(name='')] = Writing()
    max_new_tokens: int = 10
    """Longest answer, in tokens."""


def ask(options: Ask) -> None:
    """Print one line an answer."""
    from ..inference.blip2 import Blip2

    settings = options.writing.settings(options.max_new_tokens)
    answers = Blip2.load(options.run).ask([options.picture], [options.question], settings, options.writing.key())
    print('\n'.join(answers))
