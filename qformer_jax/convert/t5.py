"""T5 1.1 and Flan-T5 as Hugging Face's `T5ForConditionalGeneration` has them: weights and configuration."""

from dataclasses import replace

import numpy as np

from .. import config
from ..errors import UserError
from .config_fields import Fields, Json, read_fields, require, value, write_fields
from .lazy_tensors import State
from .sizes import count_layers, shape_of
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


def t5(c: config.T5Config) -> Table:
    """Return the table, that of every size."""
    return T5


def plain(state: State, hf_config: Json) -> State:
    """Return a T5's tensors with an output table, which is the token table where a file has none of its own.

    Raises UserError for such a file whose `config.json` asks for outputs scaled as the first T5's are: ours are not.
    """
    if 'lm_head.weight' in state or 'shared.weight' not in state:
        return state
    if hf_config.get('scale_decoder_outputs', hf_config.get('tie_word_embeddings', True)):  # transformers 5, and 4
        raise UserError(
            "the file has no 'lm_head.weight', and config.json scales the outputs of the token table in its place "
            '(scale_decoder_outputs, or tie_word_embeddings before transformers 5), which T5 here does not'
        )
    return {**state, 'lm_head.weight': state['shared.weight']}


_FIELDS: Fields = (
    ('vocab_size', 'vocab_size', 32128),
    ('width', 'd_model', 512),
    ('depth', 'num_layers', 6),
    ('heads', 'num_heads', 8),
    ('head_width', 'd_kv', 64),
    ('mlp_width', 'd_ff', 2048),
    ('buckets', 'relative_attention_num_buckets', 32),
    ('max_distance', 'relative_attention_max_distance', 128),
    ('norm_eps', 'layer_norm_epsilon', 1e-6),
)
_ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh'}


def read_config(hf_config: Json) -> config.T5Config:
    """Return our configuration of a `config.json`; raises UserError for a variant that has no place here."""
    require({'feed_forward_proj': 'relu'} | hf_config, 'feed_forward_proj', 'gated-gelu')
    activation = value(hf_config, 'dense_act_fn', str, 'gelu_new')
    if activation not in _ACTIVATIONS:
        raise UserError(f"config.json has dense_act_fn '{activation}', but T5 here has {' or '.join(_ACTIVATIONS)}")
    found = read_fields(_FIELDS, hf_config, config.T5Config, activation=_ACTIVATIONS[activation])
    decoder_depth = value(hf_config, 'num_decoder_layers', int | None, None)
    return replace(found, decoder_depth=found.depth if decoder_depth is None else decoder_depth)


def write_config(c: config.T5Config) -> Json:
    """Return the fields of its `config.json`."""
    names = {field: hf_name for hf_name, field in _ACTIVATIONS.items()}
    return write_fields(_FIELDS, c) | {
        'num_decoder_layers': c.decoder_depth,
        'feed_forward_proj': 'gated-gelu',
        'dense_act_fn': names[c.activation],
        'tie_word_embeddings': False,
    }


def read_lavis(state: State, like: config.LmConfig | None) -> config.T5Config:
    """Return the configuration of a T5 inside LAVIS's class."""
    bias = shape_of(state, 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight', 2)
    query = shape_of(state, 'encoder.block.0.layer.0.SelfAttention.q.weight', 2)
    return config.T5Config(
        vocab_size=shape_of(state, 'shared.weight', 2)[0],
        width=query[1],
        depth=count_layers(state, 'encoder.block.'),
        decoder_depth=count_layers(state, 'decoder.block.'),
        heads=bias[1],
        head_width=query[0] // bias[1],
        mlp_width=shape_of(state, 'encoder.block.0.layer.1.DenseReluDense.wi_0.weight', 2)[0],
        buckets=bias[0],
        max_distance=like.max_distance if isinstance(like, config.T5Config) else config.T5Config().max_distance,
    )
