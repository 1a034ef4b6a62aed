"""How much each query carries over a split of a data set: how often it wins ITC, and what is lost without it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..data.records import Record
from ..data.tokenizers import clean_caption
from ..errors import UserError
from ..inference import forward
from ..inference.blip2 import Blip2
from ..inference.inputs import ImageFeatures, QueryOutputs
from ..training.stages import STAGES
from ..typing import Float, Int
from . import leave_one_out, prompts, scores


@dataclass(frozen=True)
class QueryImportance:
    """What the queries do for N texts: by `itc` and `itm` in a stage-1 run, by `lm` in one with a language model."""

    drops: dict[str, Float['N Q']]
    """What each score loses without each query: cosine; log odds of a match (nats); log p of the text (nats)."""
    wins: Int['Q'] | None
    """For how many pictures each query fits the text best (ITC); stage 1 only."""

    @property
    def means(self) -> dict[str, Float['Q']]:
        """The mean drops."""
        return {name: each.mean(axis=0) for name, each in self.drops.items()}

    @property
    def count(self) -> int:
        """The number of texts: one a picture, or one a question."""
        return len(next(iter(self.drops.values())))

    @property
    def order(self) -> Int['Q']:
        """The queries, most important first: by wins, among equal ones by ITM's drop; or by the language model's."""
        if self.wins is None:
            return np.argsort(-self.means['lm'], kind='stable')
        return np.lexsort((-self.means['itm'], -self.wins))


def query_importance(model: Blip2, records: Sequence[Record]) -> QueryImportance:
    """Return what the queries carry: of first captions, or in an `instruct` run of the first answers to all questions.

    Raises UserError where the records have none of them, and for a run with neither language model nor stage 1's heads.
    """
    model.needs('qformer')
    parts = [records[i : i + model.batch_size] for i in range(0, len(records), model.batch_size)]
    found = [_part(model, some) for some in parts if any(_texts(model, record) for record in some)]
    if not found:
        raise UserError('this split has no text to judge the queries by: name another split')
    drops = {name: np.concatenate([drops[name] for drops, _ in found]) for name in found[0][0]}
    return QueryImportance(drops, None if found[0][1] is None else sum(wins for _, wins in found))


def _part(model: Blip2, records: Sequence[Record]) -> tuple[dict[str, Float['N Q']], Int['Q'] | None]:
    rows = [(picture, *pair) for picture, record in enumerate(records) for pair in _texts(model, record)]
    pictures, prompts, texts = zip(*rows, strict=True)
    given = [r.model_input for r in records]
    if model.run.model.lm:
        return _by_lm(model, model.encode_queries(given).take(pictures), prompts, texts)
    return _by_heads(model, model.encode_images(given).take(pictures), texts)


def _texts(model: Blip2, record: Record) -> list[tuple[str, str]]:
    """Return prompt and target for each of a record's questions, or for its first caption."""
    pairs = [('', caption) for caption in record.captions[:1]]
    if STAGES[model.run.stage].task == 'vqa':
        pairs = [(question, answers[0]) for question, answers in zip(record.questions, record.answers, strict=True)]
    return [(prompts.prompt(model, question), prompts.target(text, question)) for question, text in pairs]


def _by_lm(
    model: Blip2, encoded: ImageFeatures | QueryOutputs, prompts: Sequence[str], targets: Sequence[str]
) -> tuple[dict[str, Float['N Q']], None]:
    _, drops = leave_one_out.lm_drop(model, model.soft_prefix(encoded, prompts), prompts, targets)
    return {'lm': drops}, None


def _by_heads(
    model: Blip2, image_features: ImageFeatures, texts: Sequence[str]
) -> tuple[dict[str, Float['N Q']], Int['Q']]:
    image, text = model.features(image_features), model.features(texts=texts, mode='text')
    arrays = image_features.features, image_features.mask, *model.text_arrays([clean_caption(text) for text in texts])
    odds = forward.in_batches(partial(scores.odds_each, model.model, model.params), model.batch_size, *arrays)
    drops = {'itc': leave_one_out.itc_drop(leave_one_out.cosines(image, text)), 'itm': leave_one_out.itm_drop(odds)}
    return drops, leave_one_out.itc_wins(image, text)
