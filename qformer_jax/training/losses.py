"""What each stage computes on a batch: the passes through the model, and the losses on what comes out.

The loss of every stage takes the bound model, a batch (dict of arrays, see `data/pipeline.py`), a key for what is
drawn, the objective, the devices over which the rows are split, `train` (dropout) and which queries exist (None: all).
It returns `(loss, metrics)`, scalars in float32; losses are in nats. A stage reads what it needs of these.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import config
from ..models.blip2 import Blip2Module
from ..models.layers import at_least_float32
from ..objectives import captioning, regularizers
from ..objectives.contrastive import positives
from ..objectives.matching import Negatives
from ..typing import Array, Bool, Float, Int
from .stage1_forward import Alignment, align, unimodal

Batch = dict[str, Array]
Result = tuple[Array, dict[str, Array]]


def _see(model: Blip2Module, batch: Batch) -> tuple[Float['B P V'], Bool['B P']]:
    given = (batch.get(name) for name in ('image', 'features', 'feature_mask', 'frame_mask'))
    return model.vision_features(*given)


def vision(
    model: Blip2Module,
    batch: Batch,
    key: Array,
    o: config.Objective,
    *,
    devices: int = 1,
    train: bool = False,
    query_mask: Bool['Q'] | None = None,
) -> Result:
    """Pretrain a tower: which words does the picture's caption hold? (Joulin et al. 2016, multinomial form.)

    Target of a caption of n different words: 1/n on each. [CLS], at the start, and [SEP], the last real token, are no
    words: of `[CLS] red circle [SEP] [PAD]`, positions 1 and 2 count, each followed by a real token.
    """
    logits = model.bag_of_words_logits(*_see(model, batch))
    inside = batch['text_mask'][:, 2:, None]
    words = (jax.nn.one_hot(batch['text'][:, 1:-1], logits.shape[-1]) * inside).max(axis=1)
    count = words.sum(axis=1, keepdims=True)
    log_p = jax.nn.log_softmax(logits)
    loss = -(words / jnp.maximum(count, 1) * log_p).sum(axis=1).mean()
    rank = (logits[:, None, :] > jnp.where(words > 0, logits, jnp.inf).min(axis=1)[:, None, None]).sum(axis=(1, 2))
    return loss, {'loss': loss, 'accuracy': (rank < count[:, 0]).mean(dtype=jnp.float32)}


def language(
    model: Blip2Module,
    batch: Batch,
    key: Array,
    o: config.Objective,
    *,
    devices: int = 1,
    train: bool = False,
    query_mask: Bool['Q'] | None = None,
) -> Result:
    """Pretrain a language model on plain text: predict each token from those before it."""
    hidden = model.lm(model.lm.embed(batch['lm_text']), batch['lm_mask']).hidden
    return _lm_loss(model, hidden[:, :-1], batch['lm_text'][:, 1:], batch['lm_target'][:, 1:], _shards(o, devices))


def generation(
    model: Blip2Module,
    batch: Batch,
    key: Array,
    o: config.Objective,
    *,
    devices: int = 1,
    train: bool = False,
    query_mask: Bool['Q'] | None = None,
) -> Result:
    """Stages 2 and 3 (section 3.3): the language model reads [queries, prompt, target]; only the target counts."""
    features, mask = _see(model, batch)
    question = (batch['text'], batch['text_mask']) if o.instruction_aware else (None, None)
    prefix = model.soft_prefix(features, mask, *question, train=train, query_mask=query_mask)
    hidden = model.target_hidden_states(prefix, batch['lm_text'], batch['lm_mask'], batch['lm_target'])
    return _lm_loss(model, hidden, batch['lm_text'], batch['lm_target'], _shards(o, devices))


def _shards(o: config.Objective, devices: int) -> int:
    """Return how many parts of the batch have a mean over tokens of their own."""
    return devices if o.token_mean == 'per_shard' else 1


def _lm_loss(
    model: Blip2Module, hidden: Float['B T L'], targets: Int['B T'], counts: Bool['B T'], shards: int
) -> Result:
    losses, right = target_losses(model, hidden, targets, counts)
    loss = captioning.token_mean(losses, counts, shards)
    return loss, {'loss': loss, 'token_accuracy': captioning.token_mean(right.astype(jnp.float32), counts)}


def target_losses(
    model: Blip2Module, hidden: Float['B T L'], targets: Int['B T'], counts: Bool['B T']
) -> tuple[Float['B T'], Bool['B T']]:
    """Return the loss (nats) of each target that counts, and whether greedy decoding gets it right; zero elsewhere.

    The output table is the widest product of a language model, and prompts and padding need none of it. So each row's
    targets move to its front, and the table reads columns 0..3, 4..7, 8..15, ... only where some row has a target:
    of rows with 2 and 9 targets among 32 places, 16 columns are read.
    """
    order = jnp.argsort(~counts, axis=1, stable=True)
    front = [jnp.take_along_axis(x, order, axis=1) for x in (targets, counts)]
    front_hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    parts = []
    for start, end in _pieces(counts.shape[1]):
        h, t, c = (x[:, start:end] for x in (front_hidden, *front))
        parts.append(nn.cond(c.any(), _read_table, _leave_out, model.lm, h, t, c))
    back = jnp.argsort(order, axis=1)
    return tuple(jnp.take_along_axis(jnp.concatenate(x, axis=1), back, axis=1) for x in zip(*parts, strict=True))


def _pieces(length: int, first: int = 4) -> list[tuple[int, int]]:
    """Return `first` places, then as many again as stand before: of 20, 0..4, 4..8, 8..16 and 16..20."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(first, 2 * edges[-1])))
    return list(itertools.pairwise(edges))


def _read_table(lm: nn.Module, hidden: Array, targets: Array, counts: Array) -> tuple[Float['B T'], Bool['B T']]:
    logits = lm.word_logits(hidden)
    losses = captioning.token_losses(logits, targets)
    return jnp.where(counts, losses, 0), (logits.argmax(axis=-1) == targets) & counts


def _leave_out(lm: nn.Module, hidden: Array, targets: Array, counts: Array) -> tuple[Float['B T'], Bool['B T']]:
    return jnp.zeros(counts.shape, at_least_float32(hidden).dtype), jnp.zeros(counts.shape, bool)


def stage1(
    model: Blip2Module,
    batch: Batch,
    key: Array,
    o: config.Objective,
    *,
    devices: int = 1,
    train: bool = False,
    query_mask: Bool['Q'] | None = None,
    negatives: Negatives | None = None,
    share_image_keys: bool | None = None,
) -> Result:
    """Align: the weighted sum of ITC, ITM, ITG (section 3.2) and regularizers; the last two options are `align`'s.

    A term of weight 0 is not among the metrics either, and so XLA leaves its passes out.
    """
    features, mask = _see(model, batch)
    features = model.add_frame_embedding(features, mask), mask
    share = devices == 1 if share_image_keys is None else share_image_keys
    options = {'shards': _shards(o, devices), 'share_image_keys': share, 'negatives': negatives}
    options |= {'train': train, 'query_mask': query_mask}
    out = align(model, *features, batch, key, o, **options)
    terms = _main_terms(out) | _regularizers(model, features, batch, out, o, train, query_mask)
    if o.static_queries:
        again = _main_terms(align(model, *features, batch, key, o, **options, static=True))
        terms['static_queries'] = sum(getattr(o, name) * term for name, term in again.items())
    terms = {name: term for name, term in terms.items() if getattr(o, name)}
    loss = sum(getattr(o, name) * term for name, term in terms.items())
    accuracies = {'itc': out.itc.accuracy, 'itm': out.itm.accuracy, 'itg': out.itg.accuracy}
    metrics = {f'{name}_accuracy': value for name, value in accuracies.items() if name in terms}
    return loss, {'loss': loss, 'temperature': model.qformer.temperature} | terms | metrics


def _main_terms(out: Alignment) -> dict[str, Float['']]:
    return {'itc': out.itc.loss, 'itm': out.itm.loss, 'itg': out.itg.loss}


def _regularizers(
    model: Blip2Module,
    features: tuple[Array, Array],
    batch: Batch,
    out: Alignment,
    o: config.Objective,
    train: bool,
    query_mask: Bool['Q'] | None,
) -> dict[str, Float['']]:
    """Return the terms beside ITC; the second views of `intra_modal` are passes of their own."""
    image, text = out.image_embedding, out.text_embedding
    terms = {
        'cross_modal': regularizers.cross_modal_consistency(image, text, query_mask),
        'in_modal': regularizers.in_modal_consistency(image, text, query_mask),
    }
    if o.intra_modal:
        again = unimodal(model.qformer, *features, batch, train=train, query_mask=query_mask)
        temperature, positive = model.qformer.temperature, positives(batch['text'], batch['image_id'], o.positives)
        pictures = [regularizers.mean_query(view, query_mask) for view in (image, again.image_embedding)]
        views = pictures, (text, again.text_embedding)
        terms['intra_modal'] = sum(regularizers.intra_modal(*pair, temperature, positive) for pair in views) / 2
    return terms


LOSSES = {'vision': vision, 'language': language, 'stage1': stage1, 'stage2': generation, 'instruct': generation}
"""The loss of each stage."""
