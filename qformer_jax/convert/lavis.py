"""The tables of BLIP-2 as published (LAVIS 1.0.2): key by key, PyTorch's name and ours.

Tower and language model stand in files of their own without the prefix (`visual_encoder.`, `opt_model.`): it is
optional, so the OPT rows read Hugging Face's OPT as well.
"""

from .table import (
    CONVOLUTION,
    SPLIT_LAST_ROW,
    SPLIT_QKV,
    SPLIT_QKV_TRANSPOSE,
    Row,
    Table,
    drop_axes,
    linear,
    norm,
)

_QUERY_KEY_VALUE = tuple(rf'vit/layer_\1/attention/{name}' for name in ('query', 'key', 'value'))

_EVA = r'(?:visual_encoder\.)?'
_EVA_BLOCK = _EVA + r'blocks\.(\d+)\.'
EVA_VIT: Table = (
    Row(_EVA + r'cls_token', ('vit/class_token',), drop_axes(2)),
    Row(_EVA + r'pos_embed', ('vit/position_embedding',), drop_axes(1)),
    Row(_EVA + r'patch_embed\.proj\.weight', ('vit/patch_projection/kernel',), CONVOLUTION),
    Row(_EVA + r'patch_embed\.proj\.bias', ('vit/patch_projection/bias',)),
    *norm(_EVA_BLOCK + 'norm1', r'vit/layer_\1/attention_norm'),
    Row(_EVA_BLOCK + r'attn\.qkv\.weight', tuple(f'{p}/kernel' for p in _QUERY_KEY_VALUE), SPLIT_QKV_TRANSPOSE),
    Row(_EVA_BLOCK + r'attn\.q_bias', (r'vit/layer_\1/attention/query/bias',)),
    Row(_EVA_BLOCK + r'attn\.v_bias', (r'vit/layer_\1/attention/value/bias',)),
    *linear(_EVA_BLOCK + r'attn\.proj', r'vit/layer_\1/attention/output'),
    *norm(_EVA_BLOCK + 'norm2', r'vit/layer_\1/mlp_norm'),
    *linear(_EVA_BLOCK + r'mlp\.fc1', r'vit/layer_\1/mlp/up'),
    *linear(_EVA_BLOCK + r'mlp\.fc2', r'vit/layer_\1/mlp/down'),
)

_CLIP = r'(?:visual_encoder\.)?'
_CLIP_BLOCK = _CLIP + r'transformer\.resblocks\.(\d+)\.'
CLIP_VIT: Table = (
    Row(_CLIP + r'class_embedding', ('vit/class_token',)),
    Row(_CLIP + r'positional_embedding', ('vit/position_embedding',)),
    Row(_CLIP + r'conv1\.weight', ('vit/patch_projection/kernel',), CONVOLUTION),
    *norm(_CLIP + 'ln_pre', 'vit/pre_norm'),
    *norm(_CLIP_BLOCK + 'ln_1', r'vit/layer_\1/attention_norm'),
    Row(_CLIP_BLOCK + r'attn\.in_proj_weight', tuple(f'{p}/kernel' for p in _QUERY_KEY_VALUE), SPLIT_QKV_TRANSPOSE),
    Row(_CLIP_BLOCK + r'attn\.in_proj_bias', tuple(f'{p}/bias' for p in _QUERY_KEY_VALUE), SPLIT_QKV),
    *linear(_CLIP_BLOCK + r'attn\.out_proj', r'vit/layer_\1/attention/output'),
    *norm(_CLIP_BLOCK + 'ln_2', r'vit/layer_\1/mlp_norm'),
    *linear(_CLIP_BLOCK + r'mlp\.c_fc', r'vit/layer_\1/mlp/up'),
    *linear(_CLIP_BLOCK + r'mlp\.c_proj', r'vit/layer_\1/mlp/down'),
)


def _bert_attention(key: str, path: str) -> Table:
    return (
        *linear(key + r'\.self\.query', path + '/query'),
        *linear(key + r'\.self\.key', path + '/key'),
        *linear(key + r'\.self\.value', path + '/value'),
        *linear(key + r'\.output\.dense', path + '/output'),
        *norm(key + r'\.output\.LayerNorm', path + '_norm'),
    )


_BERT = r'Qformer\.bert\.embeddings\.'
_BERT_LAYER = r'Qformer\.bert\.encoder\.layer\.(\d+)\.'
_HEAD = r'Qformer\.cls\.predictions\.'
QFORMER: Table = (
    *norm('ln_vision', 'qformer/feature_norm'),
    Row('query_tokens', ('qformer/query_token',), drop_axes(1)),
    Row('temp', ('qformer/temperature',)),
    Row(_BERT + 'position_ids', ()),  # 0, 1, 2, ...
    Row(_BERT + r'word_embeddings\.weight', ('qformer/word_embedding', 'qformer/added_embedding'), SPLIT_LAST_ROW),
    Row(_BERT + r'position_embeddings\.weight', ('qformer/position_embedding',)),
    *norm(_BERT + 'LayerNorm', 'qformer/embedding_norm'),
    *_bert_attention(_BERT_LAYER + 'attention', r'qformer/layer_\1/self_attention'),
    *_bert_attention(_BERT_LAYER + 'crossattention', r'qformer/layer_\1/cross_attention'),
    *linear(_BERT_LAYER + r'intermediate_query\.dense', r'qformer/layer_\1/query_mlp/up'),
    *linear(_BERT_LAYER + r'output_query\.dense', r'qformer/layer_\1/query_mlp/down'),
    *norm(_BERT_LAYER + r'output_query\.LayerNorm', r'qformer/layer_\1/query_mlp_norm'),
    *linear(_BERT_LAYER + r'intermediate\.dense', r'qformer/layer_\1/text_mlp/up'),
    *linear(_BERT_LAYER + r'output\.dense', r'qformer/layer_\1/text_mlp/down'),
    *norm(_BERT_LAYER + r'output\.LayerNorm', r'qformer/layer_\1/text_mlp_norm'),
    *linear(_HEAD + r'transform\.dense', 'qformer/lm_head/transform'),
    *norm(_HEAD + r'transform\.LayerNorm', 'qformer/lm_head/norm'),
    Row(_HEAD + 'bias', ('qformer/lm_head/bias',)),
    Row(_HEAD + r'decoder\.(weight|bias)', ()),  # second names of the token table and of the bias above
    *linear('vision_proj', 'qformer/vision_projection'),
    *linear('text_proj', 'qformer/text_projection'),
    *linear('itm_head', 'qformer/itm_head'),
)

_OPT = r'(?:opt_model\.)?model\.decoder\.'
_OPT_LAYER = _OPT + r'layers\.(\d+)\.'
OPT: Table = (
    Row(_OPT + r'embed_tokens\.weight', ('lm/word_embedding',)),
    Row(r'(?:opt_model\.)?lm_head\.weight', ()),  # second name of the token table
    Row(_OPT + r'embed_positions\.weight', ('lm/position_embedding',)),
    *norm(_OPT_LAYER + 'self_attn_layer_norm', r'lm/layer_\1/attention_norm'),
    *linear(_OPT_LAYER + r'self_attn\.q_proj', r'lm/layer_\1/attention/query'),
    *linear(_OPT_LAYER + r'self_attn\.k_proj', r'lm/layer_\1/attention/key'),
    *linear(_OPT_LAYER + r'self_attn\.v_proj', r'lm/layer_\1/attention/value'),
    *linear(_OPT_LAYER + r'self_attn\.out_proj', r'lm/layer_\1/attention/output'),
    *norm(_OPT_LAYER + 'final_layer_norm', r'lm/layer_\1/mlp_norm'),
    *linear(_OPT_LAYER + 'fc1', r'lm/layer_\1/mlp/up'),
    *linear(_OPT_LAYER + 'fc2', r'lm/layer_\1/mlp/down'),
    *norm(_OPT + 'final_layer_norm', 'lm/norm'),
)

LM_PROJECTION: Table = linear('opt_proj', 'lm_projection')

BLIP2: Table = (*EVA_VIT, *CLIP_VIT, *QFORMER, *LM_PROJECTION, *OPT)
"""Every table: the keys of the two towers differ, so that one reads all published files."""
