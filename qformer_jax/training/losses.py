"""What each stage computes on a batch: the passes through the model, and the losses on what comes out.

The loss of every stage takes the bound model, a batch (dict of arrays, see `data/pipeline.py`) and a `LossContext`.
It returns `(loss, metrics)`, scalars in float32; losses are in nats.
"""

import jax
import jax.numpy as jnp

from ..models.blip2 import Blip2Module
from ..models.target_losses import target_losses
from ..objectives import captioning
from ..typing import Array, Bool, Float, Int
from .loss_context import LossContext
from .stage1_forward import align
from .stage1_terms import TERMS, Aligned

Batch = dict[str, Array]
Result = tuple[Array, dict[str, Array]]


def _see(model: Blip2Module, batch: Batch) -> tuple[Float['B P V'], Bool['B P']]:
    given = (batch.get(name) for name in ('image', 'features', 'feature_mask', 'frame_mask'))
    return model.vision_features(*given)


def vision(model: Blip2Module, batch: Batch, context: LossContext) -> Result:
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


def language(model: Blip2Module, batch: Batch, context: LossContext) -> Result:
    """Pretrain a language model on plain text: predict each token from those before it."""
    hidden = model.lm(model.lm.embed(batch['lm_text']), batch['lm_mask']).hidden
    return _lm_loss(model, hidden[:, :-1], batch['lm_text'][:, 1:], batch['lm_target'][:, 1:], context.shards)


def generation(model: Blip2Module, batch: Batch, context: LossContext) -> Result:
    """Stages 2 and 3 (section 3.3): the language model reads [queries, prompt, target]; only the target counts."""
    features, mask = _see(model, batch)
    question = (batch['text'], batch['text_mask']) if context.objective.instruction_aware else (None, None)
    prefix = model.soft_prefix(features, mask, *question, train=context.train, query_mask=context.query_mask)
    hidden = model.target_hidden_states(prefix, batch['lm_text'], batch['lm_mask'], batch['lm_target'])
    return _lm_loss(model, hidden, batch['lm_text'], batch['lm_target'], context.shards)


def _lm_loss(
    model: Blip2Module, hidden: Float['B T L'], targets: Int['B T'], counts: Bool['B T'], shards: int
) -> Result:
    losses, right = target_losses(model, hidden, targets, counts)
    loss = captioning.token_mean(losses, counts, shards)
    return loss, {'loss': loss, 'token_accuracy': captioning.token_mean(right.astype(jnp.float32), counts)}


def stage1(model: Blip2Module, batch: Batch, context: LossContext) -> Result:
    """Align: the weighted sum of ITC, ITM, ITG (section 3.2) and regularizers.

    A term of weight 0 is not among the metrics either, and so XLA leaves its passes out.
    """
    features, mask = _see(model, batch)
    features = model.add_frame_embedding(features, mask)
    aligned = Aligned(model, features, mask, batch, context, align(model, features, mask, batch, context))
    terms = [term for term in TERMS if term.weight(context.objective)]
    values = {term.name: term.value(aligned) for term in terms}
    loss = sum(term.weight(context.objective) * values[term.name] for term in terms)
    accuracies = {f'{term.name}_accuracy': term.accuracy(aligned) for term in terms if term.accuracy}
    return loss, {'loss': loss, 'temperature': model.qformer.temperature} | values | accuracies
