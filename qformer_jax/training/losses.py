"""What each stage computes on a batch: the passes through the model, and the losses on what comes out.

Every function takes the bound model and a batch (dict of arrays, see `data/pipeline.py`) and returns
`(loss, metrics)`, scalars in float32; losses are in nats. `train` turns dropout on.
"""

import jax
import jax.numpy as jnp

from .. import config
from ..models import masks
from ..models.blip2 import Blip2
from ..models.qformer import ImageMemory
from ..objectives import captioning, contrastive, matching
from ..typing import Array, Bool, Float, Int

Batch = dict[str, Array]
Result = tuple[Array, dict[str, Array]]


def _see(model: Blip2, batch: Batch) -> tuple[Float['B P V'], Bool['B P']]:
    return model.see(batch.get('image'), batch.get('features'), batch.get('feature_mask'))


def vision(model: Blip2, batch: Batch) -> Result:
    """Pretrain a tower: which words does the picture's caption hold? (Joulin et al. 2016, multinomial form.)

    Target of a caption of n different words: 1/n on each. [CLS], at the start, and [SEP], the last real token, are no
    words: of `[CLS] red circle [SEP] [PAD]`, positions 1 and 2 count, each followed by a real token.
    """
    features, _ = _see(model, batch)
    logits = model.name_words(features)
    inside = batch['text_mask'][:, 2:, None]
    words = (jax.nn.one_hot(batch['text'][:, 1:-1], logits.shape[-1]) * inside).max(axis=1)
    count = words.sum(axis=1, keepdims=True)
    log_p = jax.nn.log_softmax(logits)
    loss = -(words / jnp.maximum(count, 1) * log_p).sum(axis=1).mean()
    rank = (logits[:, None, :] > jnp.where(words > 0, logits, jnp.inf).min(axis=1)[:, None, None]).sum(axis=(1, 2))
    return loss, {'loss': loss, 'accuracy': (rank < count[:, 0]).mean(dtype=jnp.float32)}


def language(model: Blip2, batch: Batch, shards: int) -> Result:
    """Pretrain a language model on plain text: predict each token from those before it."""
    hidden = model.lm(model.lm.embed(batch['lm_text']), batch['lm_mask']).hidden
    return _lm_loss(model, hidden[:, :-1], batch['lm_text'][:, 1:], batch['lm_target'][:, 1:], shards)


def generation(model: Blip2, batch: Batch, o: config.Objective, shards: int, train: bool) -> Result:
    """Stages 2 and 3 (section 3.3): the language model reads [queries, prompt, target]; only the target counts."""
    features, mask = _see(model, batch)
    question = (batch['text'], batch['text_mask']) if o.instruction_aware else (None, None)
    prefix = model.soft_prefix(features, mask, *question, train=train)
    hidden = model.after_prefix(prefix, batch['lm_text'], batch['lm_mask'], batch['lm_target'])
    return _lm_loss(model, hidden, batch['lm_text'], batch['lm_target'], shards)


def _lm_loss(model: Blip2, hidden: Float['B T L'], targets: Int['B T'], counts: Bool['B T'], shards: int) -> Result:
    logits = model.lm.word_logits(hidden)
    loss = captioning.token_mean(captioning.token_losses(logits, targets), counts, shards)
    return loss, {'loss': loss, 'token_accuracy': captioning.token_accuracy(logits, targets, counts)}


def stage1(
    model: Blip2,
    batch: Batch,
    key: Array,
    o: config.Objective,
    *,
    shards: int = 1,
    share_image_keys: bool = True,
    train: bool = False,
    negatives: matching.Negatives | None = None,
) -> Result:
    """Align: ITC + ITM + ITG (section 3.2) in four passes over the Q-Former.

    1. queries over the picture (its keys and values serve all passes; its cache serves ITG)
    2. text alone -> ITC with 1, and the similarities from which hard negatives are drawn
    3. queries with text: (picture, text), (wrong picture, text), (picture, wrong text) -> ITM
    4. text after the cache of 1, causal -> ITG

    `share_image_keys=False` projects the wrong pictures' features again, which moves less data when they live on other
    devices. `negatives` replays a recorded draw.
    """
    q, text, text_mask = model.qformer, batch['text'], batch['text_mask']
    num_queries = q.config.num_queries
    features, feature_mask = _see(model, batch)
    memory = q.project_image(features, feature_mask)

    unimodal = masks.unimodal(num_queries, text_mask)
    image = q(unimodal[:, :, :num_queries, :num_queries], image=memory, train=train)
    alone = q(unimodal[:, :, num_queries:, num_queries:], text=text, train=train)
    positive = contrastive.positives(text, batch['image_id'], o.positives)
    itc = contrastive.itc(
        q.embed_image(image.queries),
        q.embed_text(alone.text),
        q.temperature,
        positive,
        label_smoothing=o.label_smoothing,
        gather_grad=o.gather_grad,
    )
    if negatives is None:
        negatives = matching.draw_negatives(key, itc.image_to_text, itc.text_to_image, positive)

    if share_image_keys:
        wrong = memory.take(negatives.image)
    else:
        wrong = q.project_image(features[negatives.image], feature_mask[negatives.image])
    itm_loss, itm_accuracy = _match(model, memory, wrong, text, text_mask, negatives, train)
    itg_loss, itg_accuracy = _caption(model, image.cache, text, text_mask, o, shards, train)

    loss = itc.loss + itm_loss + itg_loss
    return loss, {
        'loss': loss,
        'itc': itc.loss,
        'itm': itm_loss,
        'itg': itg_loss,
        'itc_accuracy': itc.accuracy,
        'itm_accuracy': itm_accuracy,
        'itg_accuracy': itg_accuracy,
        'temperature': q.temperature,
    }


def _match(
    model: Blip2,
    memory: ImageMemory,
    wrong: ImageMemory,
    text: Int['B T'],
    text_mask: Bool['B T'],
    negatives: matching.Negatives,
    train: bool,
) -> tuple[Array, Array]:
    """Return ITM loss and accuracy; rows are B matches, B wrong pictures, B wrong texts."""
    batch = text.shape[0]
    triple = jax.tree.map(lambda a, b: jnp.concatenate([a, b, a]), memory, wrong)
    text = jnp.concatenate([text, text, text[negatives.text]])
    text_mask = jnp.concatenate([text_mask, text_mask, text_mask[negatives.text]])
    mask = masks.bidirectional(model.config.qformer.num_queries, text_mask)
    out = model.qformer(mask, image=triple, text=text, train=train)
    matched = (jnp.arange(3 * batch) < batch).astype(jnp.int32)
    counts = jnp.concatenate([jnp.ones(batch, bool), negatives.image_exists, negatives.text_exists])
    return matching.itm(model.qformer.match(out.queries), matched, counts)


def _caption(
    model: Blip2, cache: tuple, text: Int['B T'], text_mask: Bool['B T'], o: config.Objective, shards: int, train: bool
) -> tuple[Array, Array]:
    """Return ITG loss and accuracy; the text starts with [DEC] (the row after the vocabulary) instead of [CLS]."""
    c = model.config.qformer
    text = text.at[:, 0].set(c.vocab_size)
    rows = masks.multimodal_causal(c.num_queries, text_mask)[:, :, c.num_queries :]
    out = model.qformer(rows, text=text, prefix=cache, train=train)
    logits, targets, counts = model.qformer.word_logits(out.text)[:, :-1], text[:, 1:], text_mask[:, 1:]
    losses = captioning.token_losses(logits, targets, o.label_smoothing)
    return captioning.token_mean(losses, counts, shards), captioning.token_accuracy(logits, targets, counts)
