"""The vision tower against Hugging Face's DINOv2 (run here); `test_verify.py` has LAVIS's EVA and CLIP towers."""

import dataclasses
from pathlib import Path

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
from qformer_jax.convert.assemble import assemble
from qformer_jax.convert.lazy_tensors import read_all
from qformer_jax.convert.table import convert
from qformer_jax.errors import UserError
from qformer_jax.models import blip2
from qformer_jax.models.vit import Vit, resize_positions
from qformer_jax.rules import unflatten


def only_vit(c: config.VitConfig) -> config.Blip2Config:
    return config.Blip2Config(vit=c, qformer=None, lm=None)


def test_the_two_resize_rules_differ():
    table = np.random.default_rng(0).normal(size=(17, 4)).astype(np.float32)
    half_pixel, aligned = (resize_positions(table, (5, 5), rule) for rule in ('half_pixel', 'align_corners'))
    assert np.abs(half_pixel - aligned).max() > 0.1


DINO = config.VitConfig(
    image_size=56,
    width=32,
    depth=2,
    heads=4,
    mlp_width=128,
    attention_bias='all',
    layer_scale=True,
    final_norm=True,
)


def saved_dinov2(folder: Path, depth: int, height: int, width: int):
    """Write a random model of Hugging Face's with DINO's sizes; return pixels, and what it makes of them."""
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    transformers = pytest.importorskip('transformers', reason='the oracle is Hugging Face')
    hf_model = transformers.Dinov2Model(
        transformers.Dinov2Config(
            image_size=56, patch_size=14, hidden_size=32, num_hidden_layers=depth, num_attention_heads=4, mlp_ratio=4
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf_model.parameters():  # ones and zeros would hide a wrong norm or bias
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
        pixels = torch.randn(2, 3, height, width, generator=generator)
        want = hf_model(pixels, output_hidden_states=True)
    hf_model.save_pretrained(folder)  # key names as published, which Hugging Face renames in memory
    return nhwc(pixels.numpy()), want


@pytest.mark.parametrize('final_norm', [False, True])
def test_a_tower_is_cut_where_the_recipe_ends(final_norm, tmp_path):
    pixels, want = saved_dinov2(tmp_path, 4, 56, 56)
    like = dataclasses.replace(DINO, final_norm=final_norm)
    found = assemble([tmp_path], only_vit(like))
    assert found.model.vit == like
    params = unflatten(read_all(found.tensors))['vit']
    out = jax.jit(Vit(like).apply)({'params': params}, pixels)
    assert_close(out.hidden_states[-1], want.hidden_states[2])
    assert ('norm' in params) == final_norm
    for other in (dataclasses.replace(like, depth=9), dataclasses.replace(like, width=48)):
        assert assemble([tmp_path], only_vit(other)).model.vit.depth == 4, 'a recipe for another tower cuts nothing'


@pytest.mark.parametrize('height, width', [(56, 56), (70, 42)])
def test_dinov2_equals_hugging_face(height, width, tmp_path):
    pixels, want = saved_dinov2(tmp_path, 2, height, width)
    params = convert(dinov2.DINOV2, load_file(tmp_path / 'model.safetensors'), blip2.shapes(only_vit(DINO)))['vit']
    out = jax.jit(Vit(DINO).apply)({'params': params}, pixels)
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


@pytest.mark.parametrize('size, fits', [(100, '98 or 112'), (7, '14 or 28'), (0, '14 or 28')])
def test_pictures_that_patches_do_not_fill_are_refused(size, fits):
    with pytest.raises(UserError, match=rf'image_size is {size}, which patches of 14 pixels do not fill: take {fits}'):
        config.VitConfig(image_size=size)
    with pytest.raises(UserError, match='patch-size is 0, it must be at least 1'):
        config.VitConfig(image_size=size, patch_size=0)
