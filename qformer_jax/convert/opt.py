"""The table of OPT as Hugging Face's `OPTForCausalLM` names it."""

from .. import config
from .lazy_tensors import State
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


def plain(state: State) -> State:
    """Return an OPT's tensors as `OPTForCausalLM` names them: some files hold the model without its head."""
    return {f'model.{key}' if key.startswith('decoder.') else key: tensor for key, tensor in state.items()}
