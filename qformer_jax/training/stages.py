"""The stages of training, one entry each: what sets one apart from the others stands here.

A stage's name stands in `config.Stage` too, which recipes are checked by.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .. import config
from ..data import preprocess
from ..data.preprocess import RowFormat
from ..models.blip2 import Blip2Module
from . import losses
from .loss_context import LossContext
from .losses import Batch, Result
from .stage1_terms import TERMS, LossTerm, guess_of_words


@dataclass(frozen=True)
class StageEntry:
    """What a stage needs, reads and minimises, and what its runs are for."""

    needs: tuple[Literal['vit', 'qformer', 'lm', 'word_head'], ...]
    """The parts of the model that it cannot do without."""
    row_format: RowFormat
    """Which records it reads, and what of them is in a row."""
    loss: Callable[[Blip2Module, Batch, LossContext], Result]
    """What it minimises."""
    next_step: str
    """What to do with a run that was trained, `{run}` being its folder."""
    next_step_converted: str
    """What to do with a run that was converted from a published checkpoint."""
    task: str = ''
    """The evaluation task that judges its runs; empty: a tower alone has none."""
    guess: Callable[[config.Run], dict[str, tuple[float, str]]] = lambda run: {}
    """Metric -> what it is for a network that knows nothing, in nats, and what that number is."""
    terms: tuple[LossTerm, ...] = ()
    """The terms that the weights of `config.Objective` weigh, one of which must be above 0."""
    text_side: str = ''
    """The text side that the Q-Former must have, since it is trained too: to write among others; empty: any."""
    generates: bool = False
    """Whether a language model writes about pictures, which a connector, gates, a LoRA and words for boxes serve."""
    needs_negatives: bool = False
    """Whether pairs are told from others of their batch, which a small batch or a micro-batch lacks."""
    decoder_only: bool = False
    """Whether the language model must be a decoder."""

    @property
    def trains_queries(self) -> bool:
        """Whether it runs the queries of a Q-Former."""
        return self.generates or 'qformer' in self.needs


CAPTION = 'qformer caption {run} PICTURE'
RETRIEVE = 'qformer evaluate {run} --task retrieval'
GO_ON = 'train the next stage from it (qformer train)'


def _among_tokens(run: config.Run) -> dict[str, tuple[float, str]]:
    return {'loss': guess_of_words(run.model.lm.vocab_size)}


STAGES: dict[config.Stage, StageEntry] = {
    'vision': StageEntry(
        needs=('vit', 'word_head'),
        row_format=preprocess.CAPTIONS,
        loss=losses.vision,
        next_step=GO_ON,
        next_step_converted='train over it: qformer train RECIPE --start.vit {run} --run RUN',
        guess=lambda run: {'loss': guess_of_words(run.model.word_head)},
    ),
    'language': StageEntry(
        needs=('lm',),
        row_format=preprocess.PLAIN_TEXT,
        loss=losses.language,
        next_step=GO_ON,
        next_step_converted='train over it: qformer train RECIPE --start.lm {run} --run RUN',
        guess=_among_tokens,
        decoder_only=True,
    ),
    'stage1': StageEntry(
        needs=('qformer',),
        row_format=preprocess.CAPTIONS,
        loss=losses.stage1,
        next_step=RETRIEVE,
        next_step_converted=RETRIEVE + ' --data DATA',
        guess=lambda run: {term.name: term.guess(run) for term in TERMS if term.guess and term.weight(run.objective)},
        task='retrieval',
        terms=TERMS,
        text_side='full',
        needs_negatives=True,
    ),
    'stage2': StageEntry(
        needs=('lm',),
        row_format=preprocess.CAPTIONING,
        loss=losses.generation,
        next_step=CAPTION,
        next_step_converted=CAPTION,
        guess=_among_tokens,
        task='caption',
        generates=True,
    ),
    'instruct': StageEntry(
        needs=('lm',),
        row_format=preprocess.INSTRUCTIONS,
        loss=losses.generation,
        next_step=CAPTION,
        next_step_converted=CAPTION,
        guess=_among_tokens,
        task='vqa',
        generates=True,
    ),
}


def generating() -> str:
    """Return the names of the stages that write about pictures, for a message: 'stage2' and 'instruct'."""
    return ' and '.join(f"'{name}'" for name, entry in STAGES.items() if entry.generates)
