"""Mutants of stage 1's losses: smoothing, temperature, negatives, gradients across the gathering, averages."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from qformer_jax.models import qformer
from qformer_jax.models.qformer import Qformer
from qformer_jax.objectives import captioning, contrastive, matching
from qformer_jax.training import stage1_forward

from .mutant import Mutant, method, replaced

STAGE1 = ('small_stage1', 'stage1')
CAPTIONS = ('small_stage1', 'qformer_modes')
LANGUAGE = ('low_variance_opt_stage2', 'opt_stage2')
CLS = 2  # its id in the recorded vocabulary


def mutants() -> Iterator[Mutant]:
    """Return them all."""
    for kind, named in (('smoothing', SMOOTHING), ('temperature', TEMPERATURE), ('objective', OBJECTIVES)):
        for name, (cases, owner, function, wrong) in named.items():
            yield Mutant(kind, name, cases, replaced(owner, function, wrong))
    for name, (cases, function, wrong) in METHODS.items():
        yield Mutant('objective', name, cases, method(Qformer, function, wrong))


def _itc(**changed: object) -> Callable:
    """Return a wrong ITC whose keyword arguments differ."""
    return lambda right: lambda *arguments, **given: right(*arguments, **given | changed)


def _itc_temperature(change: Callable) -> Callable:
    return lambda right: (
        lambda image, text, temperature, *rest, **given: right(image, text, change(temperature), *rest, **given)
    )


def _itc_loss(change: Callable) -> Callable:
    """Return a wrong ITC whose loss is made otherwise of its two directions."""

    def wrong(right):
        def itc(*arguments, **given):
            out = right(*arguments, **given)
            return out.replace(loss=change(out.image_losses.mean(), out.text_losses.mean()))

        return itc

    return wrong


def _smoothing_among_others(right):
    """Spread the smoothing over the other classes only."""
    return lambda logits, positive, smoothing: right(
        logits, positive, smoothing * logits.shape[1] / (logits.shape[1] - 1)
    )


def _smoothed(right):
    """Smooth what is not smoothed."""
    return lambda logits, targets, smoothing=0.0: right(logits, targets, smoothing or 0.1)


def _itm_smoothed(right):
    def itm(logits, matched, counts):
        loss, accuracy = right(logits, matched, counts)
        return 0.9 * loss - 0.1 * jax.nn.log_softmax(logits).mean(), accuracy

    return itm


def _negatives_exchanged(right):
    """Take the drawn pictures for the drawn texts."""
    return lambda q, memory, wrong, text, mask, negatives, *rest: right(
        q, memory, wrong, text, mask, negatives.replace(text=negatives.image), *rest
    )


def _dec_stays_cls(right, *arguments, prefix=None, text=None, **given):
    if prefix is not None:
        text = text.at[:, 0].set(CLS)
    return right(*arguments, prefix=prefix, text=text, **given)


def _text_after_queries(right, *arguments, text_start=0, **given):
    return right(*arguments, text_start=text_start + 1, **given)


SMOOTHING = {
    'ITC: none': (STAGE1, contrastive, 'itc', _itc(label_smoothing=0.0)),
    'ITC: over the others only': (STAGE1, contrastive, 'cross_entropy', _smoothing_among_others),
    'ITM: some': (STAGE1, matching, 'itm', _itm_smoothed),
    'ITG: none': (
        CAPTIONS,
        captioning,
        'token_losses',
        lambda right: lambda logits, targets, smoothing=0.0: right(logits, targets),
    ),
    'language model: some': (LANGUAGE, captioning, 'token_losses', _smoothed),
}
TEMPERATURE = {
    'multiplies': (STAGE1, contrastive, 'itc', _itc_temperature(lambda t: 1 / t)),
    'is the logarithm of the scale': (STAGE1, contrastive, 'itc', _itc_temperature(lambda t: jnp.exp(-t))),
    'is not learned': (STAGE1, contrastive, 'itc', _itc_temperature(jax.lax.stop_gradient)),
    'is not there': (STAGE1, contrastive, 'itc', _itc_temperature(jnp.ones_like)),
}
OBJECTIVES = {
    'ITC: sum of the directions': (STAGE1, contrastive, 'itc', _itc_loss(lambda image, text: image + text)),
    'ITC: pictures ask only': (STAGE1, contrastive, 'itc', _itc_loss(lambda image, text: image)),
    'ITC: texts ask only': (STAGE1, contrastive, 'itc', _itc_loss(lambda image, text: text)),
    'ITC: gradient on the gathered side': (STAGE1, contrastive, 'itc', _itc(gather_grad='global')),
    'ITC: no gradient on the gathered side': (STAGE1, contrastive, 'itc', _itc(gather_grad='local')),
    'ITC: mean over the queries': (
        STAGE1,
        contrastive,
        'similarity',
        lambda _: lambda image, text, query_mask=None: jnp.einsum('bqe,ce->bqc', image, text).mean(axis=1),
    ),
    'ITC: vectors of any length': (STAGE1, qformer, '_unit', lambda _: lambda x: x),
    'negatives: without 1e-4': (
        STAGE1,
        matching,
        'weights',
        lambda _: lambda logits, positive: jnp.where(positive, 0, jax.nn.softmax(logits, axis=1)),
    ),
    'negatives: positives too': (
        STAGE1,
        matching,
        'weights',
        lambda right: lambda logits, positive: right(logits, jnp.zeros_like(positive)),
    ),
    'negatives: softmax the other way': (
        STAGE1,
        matching,
        'weights',
        lambda _: lambda logits, positive: jnp.where(positive, 0, jax.nn.softmax(logits, axis=0) + 1e-4),
    ),
    'negatives: pictures for texts': (STAGE1, stage1_forward, '_match', _negatives_exchanged),
    'ITG: padding counts': (
        CAPTIONS,
        captioning,
        'token_mean',
        lambda right: lambda values, counts, shards=1: right(values, jnp.ones_like(counts), shards),
    ),
    'ITG: mean of the rows': (
        CAPTIONS,
        captioning,
        'token_mean',
        lambda right: lambda values, counts, shards=1: right(values, counts, len(values)),
    ),
}
METHODS = {
    'ITM: first query only': (STAGE1, 'match', lambda right, queries, *rest: right(queries[:, :1], *rest)),
    'ITM: mean of probabilities': (
        STAGE1,
        'match',
        lambda right, queries, *rest: jnp.log(
            jnp.stack([jax.nn.softmax(right(q[:, None], *rest)) for q in queries.swapaxes(0, 1)]).mean(axis=0)
        ),
    ),
    'ITG: [CLS] stays': (CAPTIONS, '__call__', _dec_stays_cls),
    'text positions begin at 1': (CAPTIONS, '__call__', _text_after_queries),
}
