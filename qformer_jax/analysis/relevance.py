"""How well a text fits a picture, which patches speak for it, and what each query carries.

A weight of the cross-attention says where a query reads, not whether what it read matters. So for each layer and head
the weights A are multiplied by the gradient of a score, and what is positive stays: (A * dscore/dA)^+ (Chefer et al.
2021, "Generic Attention-model Explainability", the gradient-weighted attention before its mean over heads), the maps
that ALBEF and BLIP draw after Grad-CAM (Selvaraju et al. 2017). To first order an entry is what the score would lose
without that weight.
"""

from dataclasses import dataclass

import numpy as np

from ..data.tokenizers import clean_caption
from ..inference.blip2 import Blip2
from ..inference.inputs import ImageFeatures
from ..inference.prompts import target_rows
from ..typing import Array, Float
from . import leave_one_out, prompts, scores
from .attention import grid, weights


@dataclass(frozen=True)
class Relevance:
    """A text beside a picture. Scores are `itc` and `itm` of a stage-1 run, `lm` of a run with a language model."""

    scores: dict[str, float]
    """ITC's cosine, ITM's log odds of a match (nats), the language model's log p of the text (nats)."""
    drops: dict[str, Float['Q']]
    """What each score loses without each query."""
    gradient: Float['C H Q G G']
    """Positive part of weights times gradient of `itm` or `lm` (nats), in the pass that gives that score."""
    cosines: Float['Q'] | None = None
    """How well each query fits the text by ITC, whose similarity is the best of them; stage 1 only."""


def relevance(model: Blip2, image_features: ImageFeatures, text: str, question: str = '') -> Relevance:
    """Return how well a text fits a picture: by ITC and ITM, or by the language model that is to write it.

    The language model is asked as `prompts.prompt` says. Raises UserError for a run with neither it nor stage 1's
    heads.
    """
    asked_for = prompts.prompt(model, question)
    if model.run.model.lm:
        return _by_lm(model, image_features, asked_for, prompts.target(text, question))
    return _by_heads(model, image_features, clean_caption(text))


def _by_lm(model: Blip2, image_features: ImageFeatures, prompt: str, target: str) -> Relevance:
    log_p, drops = leave_one_out.lm_drop(model, model.soft_prefix(image_features, [prompt]), [prompt], [target])
    text, rows = prompts.read(model, prompt), target_rows(model.lm_tokenizer, [prompt], [target])
    by = scores.gradient(
        model.model, model.params, scores.log_p, image_features.features, image_features.mask, text, *rows
    )
    return Relevance({'lm': float(log_p[0])}, {'lm': drops[0]}, _positive(model, by, image_features, *text))


def _by_heads(model: Blip2, image_features: ImageFeatures, text: str) -> Relevance:
    cosines = leave_one_out.cosines(model.features(image_features), model.features(texts=[text], mode='text'))
    arrays = model.text_arrays([text])
    each = np.asarray(
        scores.odds_each(model.model, model.params, image_features.features, image_features.mask, *arrays)
    )
    by = scores.gradient(model.model, model.params, scores.odds, image_features.features, image_features.mask, *arrays)
    return Relevance(
        {'itc': float(cosines.max()), 'itm': float(each.mean())},
        {'itc': leave_one_out.itc_drop(cosines)[0], 'itm': leave_one_out.itm_drop(each)[0]},
        _positive(model, by, image_features, *arrays),
        cosines[0],
    )


def _positive(
    model: Blip2, gradient: Float['1 C H Q P'], image_features: ImageFeatures, *text: Array
) -> Float['C H Q G G']:
    reads, _ = weights(model.model, model.params, image_features.features, image_features.mask, *text)
    return grid(np.maximum(np.asarray(reads) * np.asarray(gradient), 0)[0])
