"""`qformer rank`: given answers, the likeliest first."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ..errors import UserError
from .options import CacheArgs, ConnectorFile, PictureFile, Question, RunFolder, several


@dataclass(frozen=True)
class Rank:
    """Rank candidate answers to a question about a picture by their likelihood (multiple choice, classification).

    The score is log p(answer | picture, question) in nats under the run's language model; the shares are the softmax
    over the answers. Picture and question are read once, however many answers there are.
    """

    run: RunFolder
    """Folder of the run (`stage2` or `instruct`)."""
    picture: PictureFile
    """Picture file (or a .npy feature array, where the run reads those)."""
    question: Question
    """The question, in quotes."""
    candidates: Annotated[tyro.conf.Positional[tuple[str, ...]], several('ANSWER')]
    """Answers to choose from, each in quotes."""
    rule: Literal['sum', 'mean'] = 'sum'
    """`sum` of log p over an answer's tokens, as InstructBLIP ranks, which favours short ones; `mean`: per token."""
    keeping: Annotated[CacheArgs, tyro.conf.arg(name='')] = field(default_factory=CacheArgs)
    connector: ConnectorFile = None


def rank(options: Rank) -> None:
    """Print the table."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    if not options.candidates:
        raise UserError('no candidate given: qformer rank RUN PICTURE QUESTION ANSWER...')
    with options.keeping.load(options.run, options.connector) as model:
        scores = model.rank([options.picture], [options.question], options.candidates, options.rule)[0]
    shares = np.exp(scores - scores.max())
    view = Table(title=options.question)
    for name, side in (('', 'right'), ('candidate', 'left'), ('log p', 'right'), ('share', 'right')):
        view.add_column(name, justify=side)
    for place, c in enumerate(np.argsort(-scores, kind='stable'), 1):
        view.add_row(str(place), options.candidates[c], f'{scores[c]:.4f}', f'{shares[c] / shares.sum():.1%}')
    Console().print(view)
