"""The vision tower against LAVIS's EVA and CLIP towers (recorded) and Hugging Face's DINOv2 (run here)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from reference import assert_close, assert_gradients_close, nhwc
from safetensors.numpy import load_file

from qformer_jax import config
from qformer_jax.convert import dinov2, lavis
from qformer_jax.convert.table import convert
from qformer_jax.models import blip2
from qformer_jax.models.vit import Vit, resize_positions
from qformer_jax.typing import Params


def only_vit(c: config.Vit) -> config.Blip2:
    return config.Blip2(vit=c, qformer=None, lm=None)


def tower(case: str, c: config.Vit) -> Params:
    """Return the recorded weights of a tower in a file of its own."""
    return convert(lavis.vit(c), reference.tensors(case, 'state_dict'), blip2.shapes(only_vit(c)))['vit']


@pytest.mark.parametrize(
    'case, c, embedded', [('eva_vit', reference.EVA, None), ('clip_vit', reference.CLIP, 'ln_pre')]
)
def test_tower_equals_lavis_block_by_block(case, c, embedded):
    want, params = reference.arrays(case), tower(case, c)
    out = jax.jit(Vit(c).apply)({'params': params}, nhwc(want['pixels']))
    if embedded:
        assert_close(out.embedded, want[embedded])
    else:  # LAVIS records the patches before the class token and the positions are added
        table = params['position_embedding']
        assert_close(out.embedded[:, 1:] - table[None, 1:], want['patch_embed'])
        first = np.broadcast_to((params['class_token'] + table[0])[None], (2, c.width))
        assert_close(out.embedded[:, 0], first)
    assert_close(np.stack(out.hidden_states), want['block_outputs'])
    assert_close(out.features, want['features'])


def test_eva_gradients_equal_lavis():
    want = reference.arrays('eva_vit')
    shapes = blip2.shapes(only_vit(reference.EVA))
    params = {'vit': tower('eva_vit', reference.EVA)}

    def loss(params):
        features = Vit(reference.EVA).apply({'params': params['vit']}, nhwc(want['pixels'])).features
        return (features * want['loss_weight']).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(value, want['loss'])
    expected = convert(lavis.EVA_VIT, reference.tensors('eva_vit', 'grads'), shapes)
    assert_gradients_close(gradients, expected)


@pytest.mark.parametrize(
    'case, c, size', [('eva_vit', reference.EVA, 5), ('eva_vit', reference.EVA, 3), ('clip_vit', reference.CLIP, 5)]
)
def test_positions_are_resized_as_lavis_does(case, c, size):
    table = tower(case, c)['position_embedding']
    want = reference.arrays(case)[f'pos_interp_{size}x{size}']
    assert_close(resize_positions(table, (size, size), c.position_resize), want.reshape(-1, c.width))


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
