"""The tables of BLIP-2 as LAVIS publishes it: key by key, PyTorch's name and ours."""

import numpy as np

from .. import config
from .bert import WORD_PATHS, attention, feed_forward
from .families import FAMILIES, published_family
from .huggingface import language_model_alone
from .table import (
    CONVOLUTION,
    SPLIT_LAST_ROW,
    SPLIT_QKV,
    SPLIT_QKV_TRANSPOSE,
    Derived,
    Ignored,
    Row,
    Table,
    drop_axes,
    linear,
    norm,
    prefixed,
    skipped_blocks,
)

_QUERY_KEY_VALUE = tuple(f'vit/layer_{{i}}/attention/{name}' for name in ('query', 'key', 'value'))

EVA_VIT: Table = (
    Row('cls_token', ('vit/class_token',), drop_axes(2)),
    Row('pos_embed', ('vit/position_embedding',), drop_axes(1)),
    Row('patch_embed.proj.weight', ('vit/patch_projection/kernel',), CONVOLUTION),
    Row('patch_embed.proj.bias', ('vit/patch_projection/bias',)),
    *norm('blocks.{i}.norm1', 'vit/layer_{i}/attention_norm'),
    Row('blocks.{i}.attn.qkv.weight', tuple(f'{p}/kernel' for p in _QUERY_KEY_VALUE), SPLIT_QKV_TRANSPOSE),
    Row('blocks.{i}.attn.q_bias', ('vit/layer_{i}/attention/query/bias',)),
    Row('blocks.{i}.attn.v_bias', ('vit/layer_{i}/attention/value/bias',)),
    *linear('blocks.{i}.attn.proj', 'vit/layer_{i}/attention/output'),
    *norm('blocks.{i}.norm2', 'vit/layer_{i}/mlp_norm'),
    *linear('blocks.{i}.mlp.fc1', 'vit/layer_{i}/mlp/up'),
    *linear('blocks.{i}.mlp.fc2', 'vit/layer_{i}/mlp/down'),
)

_CLIP_BLOCK = 'transformer.resblocks.{i}.'
CLIP_VIT: Table = (
    Row('class_embedding', ('vit/class_token',)),
    Row('positional_embedding', ('vit/position_embedding',)),
    Row('conv1.weight', ('vit/patch_projection/kernel',), CONVOLUTION),
    *norm('ln_pre', 'vit/pre_norm'),
    *norm(_CLIP_BLOCK + 'ln_1', 'vit/layer_{i}/attention_norm'),
    Row(_CLIP_BLOCK + 'attn.in_proj_weight', tuple(f'{p}/kernel' for p in _QUERY_KEY_VALUE), SPLIT_QKV_TRANSPOSE),
    Row(_CLIP_BLOCK + 'attn.in_proj_bias', tuple(f'{p}/bias' for p in _QUERY_KEY_VALUE), SPLIT_QKV),
    *linear(_CLIP_BLOCK + 'attn.out_proj', 'vit/layer_{i}/attention/output'),
    *norm(_CLIP_BLOCK + 'ln_2', 'vit/layer_{i}/mlp_norm'),
    *linear(_CLIP_BLOCK + 'mlp.c_fc', 'vit/layer_{i}/mlp/up'),
    *linear(_CLIP_BLOCK + 'mlp.c_proj', 'vit/layer_{i}/mlp/down'),
)


_BERT = 'Qformer.bert.embeddings.'
_BERT_LAYER = 'Qformer.bert.encoder.layer.{i}'
_HEAD = 'Qformer.cls.predictions.'
QFORMER: Table = (
    *norm('ln_vision', 'qformer/feature_norm'),
    Row('query_tokens', ('qformer/query_token',), drop_axes(1)),
    Row('temp', ('qformer/temperature',)),
    Row(_BERT + 'word_embeddings.weight', WORD_PATHS, SPLIT_LAST_ROW),
    Row(_BERT + 'position_embeddings.weight', ('qformer/position_embedding',)),
    *norm(_BERT + 'LayerNorm', 'qformer/embedding_norm'),
    *attention(_BERT_LAYER + '.attention', 'qformer/layer_{i}/self_attention'),
    *attention(_BERT_LAYER + '.crossattention', 'qformer/layer_{i}/cross_attention'),
    *feed_forward(_BERT_LAYER, 'qformer/layer_{i}/query_mlp', '_query'),
    *feed_forward(_BERT_LAYER, 'qformer/layer_{i}/text_mlp'),
    *linear(_HEAD + 'transform.dense', 'qformer/lm_head/transform'),
    *norm(_HEAD + 'transform.LayerNorm', 'qformer/lm_head/norm'),
    Row(_HEAD + 'bias', ('qformer/lm_head/bias',)),
    Derived(_HEAD + 'decoder.bias', ('qformer/lm_head/bias',), lambda bias: bias),
    *linear('vision_proj', 'qformer/vision_projection'),
    *linear('text_proj', 'qformer/text_projection'),
    *linear('itm_head', 'qformer/itm_head'),
)


def qformer(c: config.QformerConfig) -> Table:
    """Return the rows of a Q-Former with its heads, and of the names that LAVIS's class writes besides."""
    positions = Derived(_BERT + 'position_ids', (), lambda: np.arange(c.max_positions)[None])
    if c.text_side != 'full':
        return (*QFORMER, positions)
    return (*QFORMER, positions, Derived(_HEAD + 'decoder.weight', WORD_PATHS, lambda *rows: np.concatenate(rows)))


_KINDS = ('weight', 'bias')


def tower_file(c: config.VitConfig, blocks: int) -> Table:
    """Return the rows of a published tower file of `blocks` blocks, of which BLIP-2 uses the first `c.depth`."""
    rows = vit(c)
    surplus = skipped_blocks(rows, range(c.depth, blocks), 'BLIP-2 reads an earlier block')
    heads = ('norm', 'fc_norm', 'head', 'ln_post')
    named = tuple(Ignored(f'{head}.{kind}', 'a head that BLIP-2 does not use') for head in heads for kind in _KINDS)
    return (*surplus, *rows, *named, Ignored('proj', "CLIP's projection to its text, which BLIP-2 does not use"))


def vit(c: config.VitConfig) -> Table:
    """Return the rows of a tower in a file of its own: CLIP's if it has CLIP's norm, else EVA's."""
    return CLIP_VIT if c.pre_norm else EVA_VIT


PROJECTIONS: Table = tuple(
    row for family in FAMILIES.values() for row in linear(f'{family.lavis_prefix}_proj', 'lm_projection')
)
"""The projection to whichever language model, in a file without one."""


def language_model(c: config.LmConfig) -> Table:
    """Return the rows of a language model inside LAVIS's class, and of the projection to it."""
    name = published_family(c).lavis_prefix
    return (*linear(f'{name}_proj', 'lm_projection'), *prefixed(language_model_alone(c), f'{name}_model.'))


def blip2(c: config.Blip2Config) -> Table:
    """Return the rows of a whole model as LAVIS's classes name it."""
    return (
        *(prefixed(vit(c.vit), 'visual_encoder.') if c.vit else ()),
        *(qformer(c.qformer) if c.qformer else ()),
        *(language_model(c.lm) if c.lm else ()),
    )
