"""Stage 1's four passes over the Q-Former, and everything that they give (BLIP-2, section 3.2).

1. queries over the picture (its keys and values serve all passes; its cache serves ITG)
2. text alone -> ITC with 1, and the similarities from which hard negatives are drawn
3. queries with text: (picture, text), (wrong picture, text), (picture, wrong text) -> ITM
4. text after the cache of 1, causal -> ITG
"""

import jax
import jax.numpy as jnp
from flax import struct

from ..models import masks
from ..models.blip2 import Blip2Module
from ..models.qformer import ImageMemory, Qformer, QformerOutput
from ..objectives import captioning, contrastive, matching
from ..objectives.contrastive import Itc, QueryEmbedding
from ..objectives.matching import Negatives
from ..typing import Array, Bool, Float, Int
from .loss_context import LossContext


@struct.dataclass
class Unimodal:
    """What the queries make of pictures, and the text branch of texts, without reading each other."""

    memory: ImageMemory
    image: QformerOutput
    """The queries, and their keys and values for text that reads on."""
    text: Float['B T D']
    image_embedding: QueryEmbedding
    text_embedding: Float['B E']


@struct.dataclass
class Matching:
    """ITM: rows are B matches, B wrong pictures, B wrong texts."""

    hidden: Float['R S D']
    """Last hidden states of [queries, text]."""
    logits: Float['R 2']
    matched: Int['R']
    loss: Float['']
    accuracy: Float['']


@struct.dataclass
class Captioning:
    """ITG: logits at each text position for the token after it."""

    hidden_states: tuple[Array, ...]
    """[B, T, D] of the text, after the embedding norm and after each layer."""
    logits: Float['B T N']
    text: Int['B T']
    """What was read: [DEC] in place of [CLS]; from position 1 on also what was to be predicted."""
    loss: Float['']
    accuracy: Float['']


@struct.dataclass
class Alignment:
    """What stage 1 computes on a batch."""

    queries: Float['B Q D']
    text: Float['B T D']
    image_embedding: QueryEmbedding
    text_embedding: Float['B E']
    itc: Itc
    itm: Matching
    itg: Captioning


def unimodal(
    q: Qformer,
    features: Float['B P V'],
    feature_mask: Bool['B P'],
    batch: dict[str, Array],
    context: LossContext,
) -> Unimodal:
    """Return what passes 1 and 2 give."""
    text, num_queries = batch['text'], q.config.num_queries
    memory = _remember(q, features, feature_mask, context)
    mask = masks.unimodal(num_queries, batch['text_mask'], memory.query_mask)
    image = q(mask[:, :, :num_queries, :num_queries], image=memory, train=context.train)
    alone = q(mask[:, :, num_queries:, num_queries:], text=text, train=context.train)
    embedding = QueryEmbedding(q.embed_image(image.queries), image.query_mask)
    return Unimodal(memory, image, alone.text, embedding, q.embed_text(alone.text))


def _remember(q: Qformer, features: Float['B P V'], feature_mask: Bool['B P'], context: LossContext) -> ImageMemory:
    memory = q.project_image(features, feature_mask).with_query_mask(context.query_mask)
    return memory.replace(start=None) if context.static_queries else memory


def align(
    model: Blip2Module,
    features: Float['B P V'],
    feature_mask: Bool['B P'],
    batch: dict[str, Array],
    context: LossContext,
) -> Alignment:
    """Return what the four passes give."""
    q, o, text, text_mask = model.qformer, context.objective, batch['text'], batch['text_mask']
    keys = unimodal(q, features, feature_mask, batch, context)
    positive = contrastive.positives(text, batch['image_id'], o.positives)
    embedded = keys.image_embedding, keys.text_embedding
    rules = {'label_smoothing': o.label_smoothing, 'gather_grad': o.gather_grad}
    itc = contrastive.itc(*embedded, q.temperature, positive, **rules)
    negatives = context.negatives
    if negatives is None:
        negatives = matching.draw_negatives(context.key, itc.image_to_text, itc.text_to_image, positive)
    if context.share_image_keys:
        wrong = keys.memory.take(negatives.image)
    else:
        wrong = _remember(q, features[negatives.image], feature_mask[negatives.image], context)
    itm = _match(q, keys.memory, wrong, text, text_mask, negatives, context.train)
    itg = caption(q, keys.image, text, text_mask, context)
    return Alignment(keys.image.queries, keys.text, *embedded, itc, itm, itg)


def _match(
    q: Qformer,
    memory: ImageMemory,
    wrong: ImageMemory,
    text: Int['B T'],
    text_mask: Bool['B T'],
    negatives: Negatives,
    train: bool,
) -> Matching:
    batch = text.shape[0]
    triple = jax.tree.map(lambda a, b: jnp.concatenate([a, b, a]), memory, wrong)
    text = jnp.concatenate([text, text, text[negatives.text]])
    text_mask = jnp.concatenate([text_mask, text_mask, text_mask[negatives.text]])
    mask = masks.bidirectional(q.config.num_queries, text_mask, triple.query_mask)
    out = q(mask, image=triple, text=text, train=train)
    matched = (jnp.arange(3 * batch) < batch).astype(jnp.int32)
    counts = jnp.concatenate([jnp.ones(batch, bool), negatives.image_exists, negatives.text_exists])
    logits = q.match(out.queries, out.query_mask)
    return Matching(out.hidden_states[-1], logits, matched, *matching.itm(logits, matched, counts))


def caption(
    q: Qformer, image: QformerOutput, text: Int['B T'], text_mask: Bool['B T'], context: LossContext
) -> Captioning:
    """Read the text behind [DEC] (the row after the vocabulary), which takes the place of [CLS].

    `image` is the queries' pass, whose cache the text reads.
    """
    c = q.config
    text = text.at[:, 0].set(c.vocab_size)
    rows = masks.multimodal_causal(c.num_queries, text_mask, image.query_mask)[:, :, c.num_queries :]
    out = q(rows, text=text, prefix=image.cache, train=context.train)
    logits = q.word_logits(out.text)
    inner, targets, counts = logits[:, :-1], text[:, 1:], text_mask[:, 1:]
    losses = captioning.token_losses(inner, targets, context.objective.label_smoothing)
    accuracy = captioning.token_accuracy(inner, targets, counts)
    loss = captioning.token_mean(losses, counts, context.shards)
    return Captioning(out.hidden_states, logits, text, loss, accuracy)
