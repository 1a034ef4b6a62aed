"""The sizes of a case, from its meta.json and its tensors, as our configuration."""

import dataclasses

from ... import config
from ...errors import UserError, nearest
from ...models.t5 import START_ID
from .case import Case

_T5_GELUS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh'}


def vit(case: Case, *where: str) -> config.VitConfig:
    """Return the tower's configuration from `meta['config'][where...]`, EVA's or CLIP's by what it holds."""
    return clip(case, *where) if 'layers' in case.setting(*where) else eva(case, *where)


def eva(case: Case, *where: str) -> config.VitConfig:
    """Return the sizes of LAVIS's EVA tower."""
    width, depth = case.setting(*where, 'embed_dim'), case.setting(*where, 'depth')
    _only(case, (*where, 'use_mean_pooling'), False)
    _only(case, (*where, 'qkv_bias'), True)
    return config.VitConfig(
        image_size=case.setting(*where, 'img_size'),
        patch_size=case.setting(*where, 'patch_size'),
        width=width,
        depth=depth,
        heads=case.setting(*where, 'num_heads'),
        mlp_width=int(width * case.setting(*where, 'mlp_ratio')),
        norm_eps=case.setting(*where, 'norm_eps'),
    )


def clip(case: Case, *where: str) -> config.VitConfig:
    """Return the sizes of LAVIS's CLIP tower, which builds one block fewer than its `layers`, with CLIP's eps."""
    width = case.setting(*where, 'width')
    given = case.setting(*where)
    return config.VitConfig(
        image_size=case.setting(*where, 'input_resolution'),
        patch_size=case.setting(*where, 'patch_size'),
        width=width,
        depth=given.get('blocks', given['layers'] - 1),
        heads=case.setting(*where, 'heads'),
        mlp_width=4 * width,
        norm_eps=given.get('ln_eps', 1e-5),
        activation='quick_gelu',
        attention_bias='all',
        patch_bias=False,
        pre_norm=True,
        position_resize='align_corners',
    )


def qformer(case: Case, text_side: str) -> config.QformerConfig:
    """Return the sizes of LAVIS's Q-Former; with a text side, its vocabulary counts `[DEC]`, the last one."""
    _only(case, ('qformer', 'hidden_act'), 'gelu')
    _only(case, ('qformer', 'position_embedding_type'), 'absolute')
    c = config.QformerConfig(
        feature_width=case.setting('qformer', 'encoder_width'),
        num_queries=case.setting('num_query_token'),
        width=case.setting('qformer', 'hidden_size'),
        depth=case.setting('qformer', 'num_hidden_layers'),
        heads=case.setting('qformer', 'num_attention_heads'),
        mlp_width=case.setting('qformer', 'intermediate_size'),
        cross_attention_freq=case.setting('qformer', 'cross_attention_freq'),
        max_positions=case.setting('qformer', 'max_position_embeddings'),
        norm_eps=case.setting('qformer', 'layer_norm_eps'),
        feature_norm_eps=case.setting('vit', 'ln_vision_eps'),
        text_side=text_side,
    )
    if text_side == 'none':
        return c
    return dataclasses.replace(
        c,
        vocab_size=case.setting('qformer', 'vocab_size') - 1,
        embed_width=case.setting('embed_dim'),
    )


def opt(case: Case) -> config.OptConfig:
    """Return the sizes of an OPT decoder."""
    _only(case, ('opt', 'activation_function'), 'relu')
    _only(case, ('opt', 'do_layer_norm_before'), True)
    _only(case, ('opt', 'word_embed_proj_dim'), case.setting('opt', 'hidden_size'))
    return config.OptConfig(
        vocab_size=case.setting('opt', 'vocab_size'),
        width=case.setting('opt', 'hidden_size'),
        depth=case.setting('opt', 'num_hidden_layers'),
        heads=case.setting('opt', 'num_attention_heads'),
        mlp_width=case.setting('opt', 'ffn_dim'),
        max_positions=case.setting('opt', 'max_position_embeddings'),
    )


def t5(case: Case) -> config.T5Config:
    """Return the sizes of a T5 with an output table of its own."""
    _only(case, ('t5', 'is_gated_act'), True)
    _only(case, ('t5', 'tie_word_embeddings'), False)
    _only(case, ('t5', 'decoder_start_token_id'), START_ID)
    activation = case.setting('t5', 'dense_act_fn')
    if activation not in _T5_GELUS:
        raise UserError(f"{case.folder}: 'config.t5.dense_act_fn' is {activation!r}{nearest(activation, _T5_GELUS)}")
    return config.T5Config(
        vocab_size=case.setting('t5', 'vocab_size'),
        width=case.setting('t5', 'd_model'),
        depth=case.setting('t5', 'num_layers'),
        decoder_depth=case.setting('t5', 'num_decoder_layers'),
        heads=case.setting('t5', 'num_heads'),
        head_width=case.setting('t5', 'd_kv'),
        mlp_width=case.setting('t5', 'd_ff'),
        activation=_T5_GELUS[activation],
        buckets=case.setting('t5', 'relative_attention_num_buckets'),
        max_distance=case.setting('t5', 'relative_attention_max_distance'),
        norm_eps=case.setting('t5', 'layer_norm_epsilon'),
    )


def _only(case: Case, names: tuple[str, ...], value: object) -> None:
    found = case.setting(*names)
    if found != value:
        raise UserError(f"{case.home.folder}: '{'.'.join(names)}' is {found!r}; only {value!r} is implemented")
