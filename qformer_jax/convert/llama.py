"""Llama as Hugging Face's `LlamaForCausalLM` has it, weights and configuration, and its weights in llama.cpp's GGUF.

Both turn pairs of a head by the position, but not the same pairs: Hugging Face (and we) (j, j + K / 2), llama.cpp
(2 j, 2 j + 1). So llama.cpp stores the rows of queries and keys in another order, which reading has to undo:

    K = 6   Hugging Face's rows 0 1 2 3 4 5   in a GGUF: 0 3 1 4 2 5
"""

from dataclasses import replace

import numpy as np

from .. import config, presets
from .config_fields import Fields, Json, read_fields, require, value, write_fields
from .lazy_tensors import State
from .sizes import count_layers, heads_of, shape_of
from .table import Derived, Ignored, Row, Table, Transform, linear, norm


def _block(layer: str, names: dict[str, str]) -> Table:
    """Return the rows of a layer's linear maps and norms, all without bias; `names`: path of ours -> theirs."""
    return tuple(
        row
        for path, name in names.items()
        for row in (norm if path.endswith('norm') else linear)(layer + name, f'lm/layer_{{i}}/{path}', bias=False)
    )


def llama(c: config.LlamaConfig) -> Table:
    """Return the rows of a model as Hugging Face names it."""
    words = ('lm/word_embedding',)
    names = {
        'attention_norm': 'input_layernorm',
        'attention/query': 'self_attn.q_proj',
        'attention/key': 'self_attn.k_proj',
        'attention/value': 'self_attn.v_proj',
        'attention/output': 'self_attn.o_proj',
        'mlp_norm': 'post_attention_layernorm',
        'mlp/gate': 'mlp.gate_proj',
        'mlp/up': 'mlp.up_proj',
        'mlp/down': 'mlp.down_proj',
    }
    return (
        Row('model.embed_tokens.weight', words),
        *_block('model.layers.{i}.', names),
        Ignored('model.layers.{i}.self_attn.rotary_emb.inv_freq', 'a buffer of old files; it follows from rope_base'),
        *norm('model.norm', 'lm/norm', bias=False),
        *(
            (Derived('lm_head.weight', words, lambda table: table),)
            if c.tied
            else linear('lm_head', 'lm/lm_head', bias=False)
        ),
    )


def reordered(heads: int) -> Transform:
    """Return the transform of a weight [heads * K, in] in llama.cpp's order <-> a kernel [in, heads * K] in ours."""

    def forward(weight: np.ndarray) -> tuple[np.ndarray]:
        rows, width = weight.shape
        return (weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width).T,)

    def backward(kernel: np.ndarray) -> np.ndarray:
        width, rows = kernel.shape
        return kernel.T.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)

    return Transform(forward, backward)


def gguf(c: config.LlamaConfig) -> Table:
    """Return the rows of a model as llama.cpp names it."""
    names = {
        'attention_norm': 'attn_norm',
        'attention/value': 'attn_v',
        'attention/output': 'attn_output',
        'mlp_norm': 'ffn_norm',
        'mlp/gate': 'ffn_gate',
        'mlp/up': 'ffn_up',
        'mlp/down': 'ffn_down',
    }
    return (
        Row('token_embd.weight', ('lm/word_embedding',)),
        *_block('blk.{i}.', names),
        Row('blk.{i}.attn_q.weight', ('lm/layer_{i}/attention/query/kernel',), reordered(c.heads)),
        Row('blk.{i}.attn_k.weight', ('lm/layer_{i}/attention/key/kernel',), reordered(c.kv_heads)),
        *norm('output_norm', 'lm/norm', bias=False),
        *(() if c.tied else linear('output', 'lm/lm_head', bias=False)),
    )


_FIELDS: Fields = (
    ('vocab_size', 'vocab_size', 32000),
    ('width', 'hidden_size', 4096),
    ('depth', 'num_hidden_layers', 32),
    ('heads', 'num_attention_heads', 32),
    ('mlp_width', 'intermediate_size', 11008),
    ('max_positions', 'max_position_embeddings', 2048),
    ('norm_eps', 'rms_norm_eps', 1e-6),
    ('tied', 'tie_word_embeddings', False),
)


def read_config(hf_config: Json) -> config.LlamaConfig:
    """Return our configuration of a `config.json`; raises UserError for a variant that has no place here."""
    require(hf_config, 'hidden_act', 'silu')
    require(hf_config, 'attention_bias', False)
    require(hf_config, 'mlp_bias', False)
    require(hf_config, 'rope_scaling', None)
    rope = value(hf_config, 'rope_parameters', dict | None, None) or {}  # transformers 5; before, rope_theta
    require(rope, 'rope_type', 'default')
    base = value(hf_config, 'rope_theta', float, 10000.0)
    found = read_fields(_FIELDS, hf_config, config.LlamaConfig, rope_base=value(rope, 'rope_theta', float, base))
    kv_heads = value(hf_config, 'num_key_value_heads', int | None, None)
    head_width = value(hf_config, 'head_dim', int | None, None)
    return replace(
        found,
        kv_heads=found.heads if kv_heads is None else kv_heads,
        head_width=found.width // found.heads if head_width is None else head_width,
    )


def write_config(c: config.LlamaConfig) -> Json:
    """Return the fields of its `config.json`."""
    return write_fields(_FIELDS, c) | {
        'num_key_value_heads': c.kv_heads,
        'head_dim': c.head_width,
        'hidden_act': 'silu',
        'rope_theta': c.rope_base,
    }


def read_lavis(state: State, like: config.LmConfig | None) -> config.LlamaConfig:
    """Return a Llama as LAVIS reads it, Vicuna: as many heads of keys as of queries, and Vicuna's constants."""
    rows, width = shape_of(state, 'model.embed_tokens.weight', 2)
    heads = heads_of('lm', width, {x.width: x.heads for x in (presets.VICUNA_7B, presets.VICUNA_13B)}, like)
    head_width = shape_of(state, 'model.layers.0.self_attn.q_proj.weight', 2)[0] // heads
    return replace(
        like if isinstance(like, config.LlamaConfig) else presets.VICUNA_7B,
        vocab_size=rows,
        width=width,
        depth=count_layers(state, 'model.layers.'),
        heads=heads,
        kv_heads=shape_of(state, 'model.layers.0.self_attn.k_proj.weight', 2)[0] // head_width,
        head_width=head_width,
        mlp_width=shape_of(state, 'model.layers.0.mlp.gate_proj.weight', 2)[0],
    )
