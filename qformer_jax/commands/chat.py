"""`qformer chat`: a dialogue in the terminal."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..errors import UserError
from .options import CacheArgs, ConnectorFile, PictureFile, RunFolder, SamplingArgs

if TYPE_CHECKING:
    import jax

    from ..inference.blip2 import Blip2
    from ..inference.chat import Dialogue
    from ..inference.generate import GenerationConfig

COMMANDS = '/image FILE shows another picture, /quit ends the dialogue'


@dataclass(frozen=True)
class Chat:
    """Talk about a picture with a finished run of stage 2 or later; answers appear as they are written.

    Each line is a question. `/image FILE` shows one more picture, `/quit` or the end of input (Ctrl-D) ends the
    dialogue, Ctrl-C ends an answer. Between turns the Q-Former's output for a picture is kept (the features, if the
    Q-Former reads each question too), and a language model that is a decoder reads nothing twice.
    """

    run: RunFolder
    """Folder of the run."""
    picture: PictureFile
    """Picture file (or a .npy feature array, where the run reads those)."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    drawing: Annotated[SamplingArgs, tyro.conf.arg(name='')] = field(default_factory=SamplingArgs)
    keeping: Annotated[CacheArgs, tyro.conf.arg(name='')] = field(default_factory=CacheArgs)
    connector: ConnectorFile = None


def chat(options: Chat) -> None:
    """Answer each line of the input."""
    settings = options.drawing.settings(options.max_new_tokens)
    with options.keeping.load(options.run, options.connector) as model:
        _talk(model, options.picture, settings, options.drawing.key())


def _talk(model: 'Blip2', picture: Path, settings: 'GenerationConfig', key: 'jax.Array | None') -> None:
    import jax

    from ..inference.chat import start

    dialogue = start(model, picture)
    line = '/help'
    while line not in (None, '/quit'):
        try:
            turn = None if key is None else jax.random.fold_in(key, len(dialogue.turns))
            dialogue = _turn(model, dialogue, line, settings, turn)
            line = _line()
        except UserError as error:  # of this line; the dialogue goes on
            print(f'error: {error}', file=sys.stderr)
            line = ''
        except KeyboardInterrupt:
            print('\n/quit ends the dialogue', file=sys.stderr)
            line = ''


def _line() -> str | None:
    """Return the next line of the input without blanks around it; None at the end of input."""
    try:
        return input('> ' if sys.stdin.isatty() else '').strip()
    except EOFError:
        return None


def _turn(
    model: 'Blip2', dialogue: 'Dialogue', line: str, settings: 'GenerationConfig', key: 'jax.Array | None'
) -> 'Dialogue':
    """Obey a line, or answer it."""
    from ..inference.chat import add_picture

    word, _, file = line.partition(' ')
    if word == '/image' and file:
        return add_picture(model, dialogue, Path(file.strip()))
    if line == '/help':
        print(f'a line is a question; {COMMANDS}; Ctrl-C ends an answer', file=sys.stderr)
    elif line.startswith('/'):
        raise UserError(f"no command '{line}': {COMMANDS}")
    elif line:
        return _answer(model, dialogue, line, settings, key)
    return dialogue


def _answer(
    model: 'Blip2', dialogue: 'Dialogue', question: str, settings: 'GenerationConfig', key: 'jax.Array | None'
) -> 'Dialogue':
    """Print the answer as it comes; Ctrl-C ends it, and what was said until then counts as said."""
    from ..inference.chat import say

    try:
        for piece, so_far in say(model, dialogue, question, settings, key):
            dialogue = so_far
            print(piece, end='', flush=True)
    except KeyboardInterrupt:
        print(' (stopped)', end='')
    print(flush=True)
    return dialogue
