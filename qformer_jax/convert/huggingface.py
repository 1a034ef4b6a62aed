"""The tables of BLIP-2 and InstructBLIP as Hugging Face's classes name them, alike in transformers 4.27 to 5.24.

The class follows from the parameters: `Blip2ForConditionalGeneration` for a Q-Former that does not read,
`Blip2ForImageTextRetrieval` for one with heads, `InstructBlipForConditionalGeneration` for one that reads only.

Their `post_layernorm` has the epsilon of the tower's norms, 1e-6 (transformers 4.31: 1e-5 for both), where LAVIS's
`ln_vision` and ours have 1e-5: set `model.vision_model.post_layernorm.eps = 1e-5` to compare digits.
"""

import re

import numpy as np

from .. import config
from .bert import LM_HEAD, WORD_PATHS, attention, feed_forward, fresh
from .families import published_family
from .lazy_tensors import State
from .table import (
    CONVOLUTION,
    SPLIT_LAST_ROW,
    SPLIT_QKV,
    SPLIT_QKV_TRANSPOSE,
    Ignored,
    Row,
    Table,
    Transform,
    drop_axes,
    linear,
    norm,
    prefixed,
)

LANGUAGE_MODEL = 'language_model.'
"""What the names of a language model's tensors begin with."""
_FUSED = re.compile(r'vision_model\.encoder\.layers\.\d+\.self_attn\.qkv\.bias')


def _without_key(bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    query, key, value = np.split(bias, 3)
    if key.any():
        raise ValueError("its middle third, the bias of keys, must be zero, or the tower's attention_bias be 'all'")
    return query, value


def has_key_bias(state: State) -> bool:
    """Return whether a tower in a file of theirs, whose biases are fused, has a bias on keys that is not zero."""
    fused = [x for key, x in state.items() if _FUSED.fullmatch(key) and len(x.shape) == 1 and x.shape[0] % 3 == 0]
    return any(np.split(x.read(), 3)[1].any() for x in fused)


SPLIT_QV = Transform(_without_key, lambda query, value: np.concatenate([query, np.zeros_like(query), value]))
"""Fused bias [3 * width] of a tower without key bias <-> query, value."""


def vit(c: config.VitConfig) -> Table:
    """Return the rows of the tower."""
    layer, path = 'encoder.layers.{i}.', 'vit/layer_{i}/attention'
    query_key_value = (f'{path}/query', f'{path}/key', f'{path}/value')
    biased, split = (query_key_value, SPLIT_QKV) if c.attention_bias == 'all' else (query_key_value[::2], SPLIT_QV)
    return (
        Row('embeddings.class_embedding', ('vit/class_token',), drop_axes(2)),
        Row('embeddings.position_embedding', ('vit/position_embedding',), drop_axes(1)),
        Row('embeddings.patch_embedding.weight', ('vit/patch_projection/kernel',), CONVOLUTION),
        Row('embeddings.patch_embedding.bias', ('vit/patch_projection/bias',)),
        *norm(layer + 'layer_norm1', 'vit/layer_{i}/attention_norm'),
        Row(layer + 'self_attn.qkv.weight', tuple(f'{x}/kernel' for x in query_key_value), SPLIT_QKV_TRANSPOSE),
        Row(layer + 'self_attn.qkv.bias', tuple(f'{x}/bias' for x in biased), split),
        *linear(layer + 'self_attn.projection', f'{path}/output'),
        *norm(layer + 'layer_norm2', 'vit/layer_{i}/mlp_norm'),
        *linear(layer + 'mlp.fc1', 'vit/layer_{i}/mlp/up'),
        *linear(layer + 'mlp.fc2', 'vit/layer_{i}/mlp/down'),
    )


_LAYER = 'qformer.encoder.layer.{i}'
_QUERY_SIDE: Table = (
    *norm('vision_model.post_layernorm', 'qformer/feature_norm'),
    Row('query_tokens', ('qformer/query_token',), drop_axes(1)),
    *attention(_LAYER + '.attention', 'qformer/layer_{i}/self_attention', 'attention'),
    *attention(_LAYER + '.crossattention', 'qformer/layer_{i}/cross_attention', 'attention'),
    *feed_forward(_LAYER, 'qformer/layer_{i}/query_mlp', '_query'),
)


def _text_side(embeddings: str) -> Table:
    return (
        Row(embeddings + 'word_embeddings.weight', WORD_PATHS, SPLIT_LAST_ROW),
        Row(embeddings + 'position_embeddings.weight', ('qformer/position_embedding',)),
        Ignored(embeddings + 'position_ids', 'a buffer of old files: 0, 1, 2, ...'),
        *feed_forward(_LAYER, 'qformer/layer_{i}/text_mlp'),
    )


_HEADS: Table = (
    *linear('vision_projection', 'qformer/vision_projection'),
    *linear('text_projection', 'qformer/text_projection'),
    *linear('itm_head', 'qformer/itm_head'),
)
_STAGE1_ONLY = fresh("Hugging Face's classes do not train stage 1", 'qformer/temperature', *LM_HEAD)


def qformer(c: config.QformerConfig) -> Table:
    """Return the rows of a Q-Former; one with all of stage 1 can be read from the retrieval model, but not written."""
    embeddings = 'qformer.embeddings.' if c.text_side == 'reads' else 'embeddings.'
    norm_key = 'qformer.embeddings.layernorm' if c.text_side == 'reads' else 'qformer.layernorm'
    return (
        *_QUERY_SIDE,
        *norm(norm_key, 'qformer/embedding_norm'),
        *(_text_side(embeddings) if c.text_side != 'none' else ()),
        *(_HEADS if c.text_side in ('full', 'retrieval') else ()),
        *(_STAGE1_ONLY if c.text_side == 'full' else ()),
    )


def language_model_alone(c: config.LmConfig) -> Table:
    """Return the rows of a language model in a file of its own; LAVIS embeds the same class."""
    return published_family(c).table(c)


def language_model(c: config.LmConfig) -> Table:
    """Return the rows of a language model inside BLIP-2, and of the projection to it."""
    return (*linear('language_projection', 'lm_projection'), *prefixed(language_model_alone(c), LANGUAGE_MODEL))


def blip2(c: config.Blip2Config) -> Table:
    """Return the rows of a whole model."""
    return (
        *(prefixed(vit(c.vit), 'vision_model.') if c.vit else ()),
        *(qformer(c.qformer) if c.qformer else ()),
        *(language_model(c.lm) if c.lm else ()),
    )
