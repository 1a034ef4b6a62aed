"""`qformer caption` and `qformer ask`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import UserError
from .options import CacheArgs, ConnectorFile, GenerationArgs, PictureFile, Question, RunFolder, several


@dataclass(frozen=True)
class Caption:
    """Describe pictures with a finished run of stage 1 or later.

    After stage 1 the Q-Former writes the caption itself (as ITG trains it), after later stages the language model does.
    """

    run: RunFolder
    """Folder of the run."""
    pictures: Annotated[tyro.conf.Positional[tuple[Path, ...]], several('PICTURE')]
    """Picture files, folders of a video's frames (or .npy feature arrays, where the run reads those)."""
    writing: Annotated[GenerationArgs, tyro.conf.arg(name='')] = field(default_factory=GenerationArgs)
    keeping: Annotated[CacheArgs, tyro.conf.arg(name='')] = field(default_factory=CacheArgs)
    connector: ConnectorFile = None
    max_new_tokens: int = 20
    """Longest caption, in tokens."""


def caption(options: Caption) -> None:
    """Print one line a caption."""
    if not options.pictures:
        raise UserError('no picture given: qformer caption RUN PICTURE...')
    settings = options.writing.settings(options.max_new_tokens)
    with options.keeping.load(options.run, options.connector) as model:
        captions = model.caption(options.pictures, settings, options.writing.key())
    paths = [path for path in options.pictures for _ in range(settings.num_return)]
    for path, text in zip(paths, captions, strict=True):
        print(f'{path}: {text}')


@dataclass(frozen=True)
class Ask:
    """Answer a question about a picture with a finished run that has a language model (`stage2` or `instruct`)."""

    run: RunFolder
    """Folder of the run."""
    picture: PictureFile
    """Picture file, or a folder of a video's frames (or a .npy feature array, where the run reads those)."""
    question: Question
    """The question, in quotes."""
    writing: Annotated[GenerationArgs, tyro.conf.arg(name='')] = field(default_factory=GenerationArgs)
    keeping: Annotated[CacheArgs, tyro.conf.arg(name='')] = field(default_factory=CacheArgs)
    connector: ConnectorFile = None
    max_new_tokens: int = 10
    """Longest answer, in tokens."""


def ask(options: Ask) -> None:
    """Print one line an answer."""
    settings = options.writing.settings(options.max_new_tokens)
    with options.keeping.load(options.run, options.connector) as model:
        answers = model.ask([options.picture], [options.question], settings, options.writing.key())
    print('\n'.join(answers))
