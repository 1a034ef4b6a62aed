"""Where the queries look: shares that sum to one, nothing else changed by asking, and the command."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from PIL import Image
from reference import QFORMER, assert_close

from qformer_jax import cli, config
from qformer_jax.analysis import attention
from qformer_jax.errors import UserError
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.models import blip2

DRAW = np.random.default_rng(0)
TEXT = 'a red circle'


@pytest.fixture(scope='module')
def aligned(line):
    return Blip2.load(line / 'stage1')


def test_asking_for_it_changes_nothing_and_what_does_not_exist_gets_nothing():
    model = blip2.Blip2(config.Blip2(vit=None, qformer=dataclasses.replace(QFORMER, depth=3), lm=None))
    params = jax.jit(lambda: blip2.init(model, jax.random.key(0)))()
    features = DRAW.normal(size=(2, 5, QFORMER.feature_width)).astype(np.float32)
    mask = np.arange(5)[None] < np.array([[5], [3]])

    @jax.jit
    def run(params):
        plain, asked = (
            model.apply({'params': params}, features, mask, keep_attention=keep, method='ask_queries')
            for keep in (False, True)
        )
        return plain, asked

    plain, asked = run(params)
    np.testing.assert_array_equal(plain.queries, asked.queries)
    assert plain.attention == () and len(asked.attention) == 2, 'layers 0 and 2 read'
    for weights in asked.attention:
        assert weights.shape == (2, QFORMER.heads, QFORMER.num_queries, 5)
        assert_close(weights.sum(axis=-1), jnp.ones(weights.shape[:-1]))
        assert (np.asarray(weights)[1, ..., 3:] == 0).all()


def test_maps_and_class_token_are_all_that_a_query_sees(aligned):
    found = attention.looks(aligned, small.draw_picture('red', 'circle'), TEXT)
    assert_close(found.maps.sum(axis=(-2, -1)) + found.class_token, np.ones(found.class_token.shape))
    assert found.layers == (0,) and found.maps.shape[0] == 1
    side = small.VIT.image_size // small.VIT.patch_size
    assert found.maps.shape[3:] == (side, side) and found.mean.shape == found.maps.shape[2:]
    seen = aligned.encode([small.draw_picture('red', 'circle')])
    assert_close(found.cosines.max(), aligned.similarity(seen, [TEXT])[0, 0])


def test_the_first_patch_is_at_the_top_left(aligned):
    """Patches go row by row behind the class token: with rows of G, patch 1 + G begins the second row."""
    picture = small.draw_picture('red', 'circle')
    found, seen = attention.looks(aligned, picture), aligned.encode([picture])
    weights = attention._weights(aligned.model, aligned.params, seen.features, seen.mask)[0]
    side = found.maps.shape[-1]
    np.testing.assert_array_equal(found.maps[..., 0, side - 1], weights[..., side])
    np.testing.assert_array_equal(found.maps[..., 1, 0], weights[..., side + 1])


def test_the_command_draws_and_keeps_arrays(line, tmp_path, capsys):
    picture = tmp_path / 'red.png'
    small.draw_picture('red', 'circle').save(picture)
    cli.run(['attention', str(line / 'stage1'), str(picture), '--text', TEXT, '--out', str(tmp_path / 'out')])
    assert f'wrote {tmp_path / "out" / "attention.png"}' in capsys.readouterr().out
    with np.load(tmp_path / 'out' / 'attention.npz') as kept:
        assert set(kept) == {'maps', 'class_token', 'layers', 'cosines'}
    with Image.open(tmp_path / 'out' / 'attention.png') as drawing:
        assert drawing.size[0] > 100 and len(drawing.getcolors(1 << 20)) > 50


def test_what_cannot_be_drawn_says_why(aligned, line):
    picture = small.draw_picture('red', 'circle')
    later = Blip2.load(line / 'stage2')
    later = dataclasses.replace(later, run=small.change(later.run, 'model', qformer=_mute(later.run)))
    with pytest.raises(UserError, match='neither read a text nor compare with one'):
        attention.looks(later, picture, TEXT)
    aware = dataclasses.replace(aligned, run=small.change(aligned.run, 'objective', instruction_aware=True))
    with pytest.raises(UserError, match='read a text: give one'):
        attention.looks(aware, picture)
    blind = dataclasses.replace(aligned, run=small.change(aligned.run, 'model', vit=None))
    with pytest.raises(UserError, match='give one with a vision tower'):
        attention.looks(blind, picture)


def _mute(run: config.Run) -> config.Qformer:
    return dataclasses.replace(run.model.qformer, text_side='none')
