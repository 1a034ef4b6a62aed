"""The loss terms of stage 1, one entry each: what the weights of `config.Objective` weigh."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .. import config
from ..models.blip2 import Blip2Module
from ..objectives import regularizers
from ..objectives.contrastive import positives
from ..typing import Array, Bool, Float
from .loss_context import LossContext
from .stage1_forward import Alignment, align, unimodal


@dataclass(frozen=True)
class Aligned:
    """What a term may be made of: the batch, what the four passes gave of it, and the model for passes of its own."""

    model: Blip2Module
    features: Float['B P V']
    feature_mask: Bool['B P']
    batch: dict[str, Array]
    context: LossContext
    out: Alignment


@dataclass(frozen=True)
class LossTerm:
    """A term of the sum; where its weight is 0, nothing of it is computed."""

    name: str
    """Of the metric, and of the field of `config.Objective` that holds the weight."""
    value: Callable[[Aligned], Float['']]
    """In nats."""
    accuracy: Callable[[Aligned], Float['']] | None = None
    """Another metric, NAME_accuracy."""
    guess: Callable[[config.Run], tuple[float, str]] | None = None
    """What it is for a network that knows nothing, in nats, and what that number is; None: nothing can be said."""
    refusal: Callable[[config.QformerConfig], str] = lambda qformer: ''
    """Says why a Q-Former cannot have this term; empty: it can."""

    def weight(self, objective: config.Objective) -> float:
        """Return its weight."""
        return getattr(objective, self.name)


def _cross_modal(aligned: Aligned) -> Float['']:
    return regularizers.cross_modal_consistency(aligned.out.image_embedding, aligned.out.text_embedding)


def _in_modal(aligned: Aligned) -> Float['']:
    return regularizers.in_modal_consistency(aligned.out.image_embedding, aligned.out.text_embedding)


def _intra_modal(aligned: Aligned) -> Float['']:
    """Contrast two views, the second of which takes passes of its own with other dropout."""
    q, out, batch = aligned.model.qformer, aligned.out, aligned.batch
    again = unimodal(q, aligned.features, aligned.feature_mask, batch, aligned.context)
    positive = positives(batch['text'], batch['image_id'], aligned.context.objective.positives)
    pictures = [regularizers.mean_query(view) for view in (out.image_embedding, again.image_embedding)]
    views = pictures, (out.text_embedding, again.text_embedding)
    return sum(regularizers.intra_modal(*pair, q.temperature, positive) for pair in views) / 2


def _static_queries(aligned: Aligned) -> Float['']:
    """Return the weighted ITC, ITM and ITG once more, from queries that start alike for every picture."""
    context = aligned.context.replace(static_queries=True)
    out = align(aligned.model, aligned.features, aligned.feature_mask, aligned.batch, context)
    o = context.objective
    return sum(weight * loss for weight, loss in ((o.itc, out.itc.loss), (o.itm, out.itm.loss), (o.itg, out.itg.loss)))


def _without_dropout(qformer: config.QformerConfig) -> str:
    return '' if qformer.dropout else 'contrasts two passes with other dropout, and model.qformer.dropout is 0: set it'


def _without_bank(qformer: config.QformerConfig) -> str:
    there = qformer.query_bank > 1
    return '' if there else 'trains the bank of queries, and there is none: model.qformer.query-bank is 1'


def guess_of_words(count: int) -> tuple[float, str]:
    """Return the loss of a guess among so many words, and what it is."""
    return math.log(count), f'ln {count:,}, the words'


TERMS = (
    LossTerm(
        'itc',
        lambda aligned: aligned.out.itc.loss,
        lambda aligned: aligned.out.itc.accuracy,
        guess=lambda run: (math.log(run.training.batch_size), f'ln {run.training.batch_size:,}, the texts of a step'),
    ),
    LossTerm(
        'itm',
        lambda aligned: aligned.out.itm.loss,
        lambda aligned: aligned.out.itm.accuracy,
        guess=lambda run: (math.log(3) - 2 / 3 * math.log(2), 'one row in three matches'),
    ),
    LossTerm(
        'itg',
        lambda aligned: aligned.out.itg.loss,
        lambda aligned: aligned.out.itg.accuracy,
        guess=lambda run: guess_of_words(run.model.qformer.vocab_size),
    ),
    LossTerm('cross_modal', _cross_modal),
    LossTerm('in_modal', _in_modal),
    LossTerm('intra_modal', _intra_modal, refusal=_without_dropout),
    LossTerm('static_queries', _static_queries, refusal=_without_bank),
)
"""In the order in which they are computed: what draws dropout later draws other numbers."""
