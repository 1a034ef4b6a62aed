"""The table of T5 1.1 and Flan-T5 as Hugging Face's `T5ForConditionalGeneration` names it."""

import numpy as np

from .table import Derived, Ignored, Row, Table, linear, norm


def _attention(key: str, path: str) -> Table:
    names = (('q', 'query'), ('k', 'key'), ('v', 'value'), ('o', 'output'))
    return tuple(row for short, long in names for row in linear(f'{key}.{short}', f'{path}/{long}', bias=False))


def _self_attention(stack: str) -> Table:
    first = f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    return (
        Row(first, (f'lm/{stack}/relative_bias',)),
        *_attention(f'{stack}.block.{{i}}.layer.0.SelfAttention', f'lm/{stack}/layer_{{i}}/self_attention'),
        *norm(f'{stack}.block.{{i}}.layer.0.layer_norm', f'lm/{stack}/layer_{{i}}/self_attention_norm', bias=False),
    )


def _mlp(key: str, path: str) -> Table:
    return (
        *norm(f'{key}.layer_norm', f'{path}/mlp_norm', bias=False),
        *linear(f'{key}.DenseReluDense.wi_0', f'{path}/mlp/gate', bias=False),
        *linear(f'{key}.DenseReluDense.wi_1', f'{path}/mlp/up', bias=False),
        *linear(f'{key}.DenseReluDense.wo', f'{path}/mlp/down', bias=False),
    )


def _same(table: np.ndarray) -> np.ndarray:
    return table


T5: Table = (
    Row('shared.weight', ('lm/word_embedding',)),
    Derived('encoder.embed_tokens.weight', ('lm/word_embedding',), _same),
    Derived('decoder.embed_tokens.weight', ('lm/word_embedding',), _same),
    *_self_attention('encoder'),
    *_mlp('encoder.block.{i}.layer.1', 'lm/encoder/layer_{i}'),
    *norm('encoder.final_layer_norm', 'lm/encoder/norm', bias=False),
    *_self_attention('decoder'),
    Ignored(
        'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight',
        'early files hold it; between decoder and encoder there are no relative positions',
    ),
    *_attention('decoder.block.{i}.layer.1.EncDecAttention', 'lm/decoder/layer_{i}/cross_attention'),
    *norm('decoder.block.{i}.layer.1.layer_norm', 'lm/decoder/layer_{i}/cross_attention_norm', bias=False),
    *_mlp('decoder.block.{i}.layer.2', 'lm/decoder/layer_{i}'),
    *norm('decoder.final_layer_norm', 'lm/decoder/norm', bias=False),
    *linear('lm_head', 'lm/lm_head', bias=False),
)
