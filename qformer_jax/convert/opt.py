"""OPT as Hugging Face's `OPTForCausalLM` has it: weights and configuration."""

from dataclasses import replace

from .. import config
from .config_fields import Fields, Json, read_fields, require, value, write_fields
from .lazy_tensors import State
from .sizes import count_layers, heads_of, shape_of
from .table import Derived, Ignored, Row, Table, linear, norm

_LAYER = 'model.decoder.layers.{i}.'
_SHARED: Table = (
    Row('model.decoder.embed_tokens.weight', ('lm/word_embedding',)),
    Derived('lm_head.weight', ('lm/word_embedding',), lambda table: table),
    Row('model.decoder.embed_positions.weight', ('lm/position_embedding',)),
    *norm(_LAYER + 'self_attn_layer_norm', 'lm/layer_{i}/attention_norm'),
    *linear(_LAYER + 'self_attn.q_proj', 'lm/layer_{i}/attention/query'),
    *linear(_LAYER + 'self_attn.k_proj', 'lm/layer_{i}/attention/key'),
    *linear(_LAYER + 'self_attn.v_proj', 'lm/layer_{i}/attention/value'),
    *linear(_LAYER + 'self_attn.out_proj', 'lm/layer_{i}/attention/output'),
    *norm(_LAYER + 'final_layer_norm', 'lm/layer_{i}/mlp_norm'),
    *linear(_LAYER + 'fc1', 'lm/layer_{i}/mlp/up'),
    *linear(_LAYER + 'fc2', 'lm/layer_{i}/mlp/down'),
    Ignored('model.decoder.version', 'a mark of the program that trained it'),
)


def opt(c: config.OptConfig) -> Table:
    """Return the table of one size: OPT-350M projects token vectors, and has no final norm."""
    table = _SHARED
    if c.norm_first:
        table += norm('model.decoder.final_layer_norm', 'lm/norm')
    if c.input_width != c.width:
        table += linear('model.decoder.project_in', 'lm/input_projection', bias=False)
        table += linear('model.decoder.project_out', 'lm/output_projection', bias=False)
    return table


def plain(state: State, hf_config: Json) -> State:
    """Return an OPT's tensors as `OPTForCausalLM` names them: some files hold the model without its head."""
    return {f'model.{key}' if key.startswith('decoder.') else key: tensor for key, tensor in state.items()}


_FIELDS: Fields = (
    ('vocab_size', 'vocab_size', 50272),
    ('width', 'hidden_size', 768),
    ('depth', 'num_hidden_layers', 12),
    ('heads', 'num_attention_heads', 12),
    ('mlp_width', 'ffn_dim', 3072),
    ('max_positions', 'max_position_embeddings', 2048),
    ('norm_first', 'do_layer_norm_before', True),
)


def read_config(hf_config: Json) -> config.OptConfig:
    """Return our configuration of a `config.json`; raises UserError for a variant that has no place here."""
    require(hf_config, 'activation_function', 'relu')
    require(hf_config, '_remove_final_layer_norm', False)
    embed_width = value(hf_config, 'word_embed_proj_dim', int | None, None) or 0
    found = read_fields(_FIELDS, hf_config, config.OptConfig, embed_width=embed_width)
    return replace(found, embed_width=0) if embed_width == found.width else found


def write_config(c: config.OptConfig) -> Json:
    """Return the fields of its `config.json`."""
    return write_fields(_FIELDS, c) | {'word_embed_proj_dim': c.input_width}


_PUBLISHED_HEADS = {768: 12, 1024: 16, 2048: 32, 2560: 32, 4096: 32, 5120: 40, 7168: 56, 9216: 72}
"""Width -> attention heads (Zhang et al. 2022, table 1)."""


def read_lavis(state: State, like: config.LmConfig | None) -> config.OptConfig:
    """Return the configuration of an OPT inside LAVIS's class."""
    rows, width = shape_of(state, 'model.decoder.embed_tokens.weight', 2)
    return config.OptConfig(
        vocab_size=rows,
        width=width,
        depth=count_layers(state, 'model.decoder.layers.'),
        heads=heads_of('lm', width, _PUBLISHED_HEADS, like),
        mlp_width=shape_of(state, 'model.decoder.layers.0.fc1.weight', 2)[0],
        max_positions=shape_of(state, 'model.decoder.embed_positions.weight', 2)[0] - 2,
    )
