"""The vision tower against Hugging Face's DINOv2 (run here); `test_verify.py` has LAVIS's EVA and CLIP towers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from reference import assert_close, nhwc
from safetensors.numpy import load_file

from qformer_jax import config
from qformer_jax.convert import dinov2
from qformer_jax.convert.table import convert
from qformer_jax.models import blip2
from qformer_jax.models.vit import Vit, resize_positions


def only_vit(c: config.Vit) -> config.Blip2:
    return config.Blip2(vit=c, qformer=None, lm=None)


def test_the_two_resize_rules_differ():
    table = np.random.default_rng(0).normal(size=(17, 4)).astype(np.float32)
    half_pixel, aligned = (resize_positions(table, (5, 5), rule) for rule in ('half_pixel', 'align_corners'))
    assert np.abs(half_pixel - aligned).max() > 0.1


@pytest.mark.parametrize('height, width', [(56, 56), (70, 42)])
def test_dinov2_equals_hugging_face(height, width, tmp_path):
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    transformers = pytest.importorskip('transformers', reason='the oracle is Hugging Face')
    c = config.Vit(
        image_size=56,
        width=32,
        depth=2,
        heads=4,
        mlp_width=128,
        attention_bias='all',
        layer_scale=True,
        final_norm=True,
    )
    theirs = transformers.Dinov2Model(
        transformers.Dinov2Config(
            image_size=56, patch_size=14, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=4
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # ones and zeros would hide a wrong norm or bias
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
        pixels = torch.randn(2, 3, height, width, generator=generator)
        want = theirs(pixels, output_hidden_states=True)
    theirs.save_pretrained(tmp_path)  # key names as published, which Hugging Face renames in memory
    params = convert(dinov2.DINOV2, load_file(tmp_path / 'model.safetensors'), blip2.shapes(only_vit(c)))['vit']
    out = jax.jit(Vit(c).apply)({'params': params}, nhwc(pixels.numpy()))
    assert_close(out.embedded, want.hidden_states[0])
    assert_close(np.stack(out.hidden_states), np.stack(want.hidden_states[1:]))
    assert_close(out.features, want.last_hidden_state)


def test_nnx_users_wrap_the_tower():
    tower = nnx.bridge.ToNNX(Vit(reference.EVA), rngs=nnx.Rngs(0))
    pixels = jax.random.normal(jax.random.key(1), (1, 56, 56, 3))
    nnx.bridge.lazy_init(tower, pixels)
    params = nnx.to_pure_dict(nnx.state(tower, nnx.Param))
    params = jax.tree.map(jnp.asarray, params)
    assert_close(tower(pixels).features, Vit(reference.EVA).apply({'params': params}, pixels).features)
