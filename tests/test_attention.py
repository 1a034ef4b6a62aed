"""Where the queries look: shares that sum to one, nothing else changed by asking, rollout, and the command."""

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
from qformer_jax.analysis.rollout import rollout
from qformer_jax.errors import UserError
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.models import blip2

DRAW = np.random.default_rng(0)
TEXT = 'a red circle'


@pytest.fixture(scope='module')
def aligned(line):
    return Blip2.load(line / 'stage1')


def test_asking_for_it_changes_nothing_and_what_does_not_exist_gets_nothing():
    model = blip2.Blip2Module(config.Blip2Config(vit=None, qformer=dataclasses.replace(QFORMER, depth=3), lm=None))
    params = jax.jit(lambda: blip2.init(model, jax.random.key(0)))()
    features = DRAW.normal(size=(2, 5, QFORMER.feature_width)).astype(np.float32)
    mask = np.arange(5)[None] < np.array([[5], [3]])
    text = np.array([[7, 8, 9], [7, 8, 0]], np.int32)

    @jax.jit
    def run(params):
        plain, kept = (
            model.apply(
                {'params': params}, features, mask, text, text > 0, keep_attention=keep, method='query_features'
            )
            for keep in (False, True)
        )
        return plain, kept

    plain, kept = run(params)
    np.testing.assert_array_equal(plain.queries, kept.queries)
    assert plain.attention == plain.self_attention == ()
    assert len(kept.attention) == 2 and len(kept.self_attention) == 3, 'layers 0 and 2 read'
    queries = QFORMER.num_queries
    for weights, shape in [(x, (queries, 5)) for x in kept.attention] + [
        (x, (queries + 3, queries + 3)) for x in kept.self_attention
    ]:
        assert weights.shape == (2, QFORMER.heads, *shape)
        assert_close(weights.sum(axis=-1), jnp.ones(weights.shape[:-1]))
    assert all((np.asarray(x)[1, ..., 3:] == 0).all() for x in kept.attention)
    assert all((np.asarray(x)[1, ..., -1] == 0).all() for x in kept.self_attention), 'the last word is padding'
    _check_first_self_attention(params['qformer'], kept)


def _check_first_self_attention(q, kept):
    """Layer 0 mixes what the embedding norm left: softmax of query times key, head by head."""
    x, own = np.asarray(kept.hidden_states[0])[0], jax.tree.map(np.asarray, q['layer_0']['self_attention'])
    query, key = (x @ own[name]['kernel'] + own[name]['bias'] for name in ('query', 'key'))
    width = QFORMER.width // QFORMER.heads
    for head in range(QFORMER.heads):
        part = slice(head * width, (head + 1) * width)
        weights = np.exp(query[:, part] @ key[:, part].T / np.sqrt(width))
        assert_close(kept.self_attention[0][0, head], weights / weights.sum(axis=1, keepdims=True))


def test_maps_and_class_token_are_all_that_a_query_sees(aligned):
    found = attention.attention_maps(aligned, attention.encode_picture(aligned, small.draw_picture('red', 'circle')))
    assert_close(found.maps.sum(axis=(-2, -1)) + found.class_token, np.ones(found.class_token.shape))
    assert found.layers == (0,) and found.maps.shape[0] == 1
    side = small.VIT.image_size // small.VIT.patch_size
    assert found.maps.shape[3:] == (side, side) and found.mean.shape == found.maps.shape[2:] == found.rollout.shape


def test_the_first_patch_is_at_the_top_left(aligned):
    """Patches go row by row behind the class token: with rows of G, patch 1 + G begins the second row."""
    image_features = attention.encode_picture(aligned, small.draw_picture('red', 'circle'))
    found, (weights, _) = attention.attention_maps(aligned, image_features), _weights(aligned, image_features)
    side = found.maps.shape[-1]
    np.testing.assert_array_equal(found.maps[..., 0, side - 1], weights[0][..., side])
    np.testing.assert_array_equal(found.maps[..., 1, 0], weights[0][..., side + 1])


def _weights(model, image_features, *text):
    return attention.weights(model.model, model.params, image_features.features, image_features.mask, *text)


def _softmax(shape):
    x = np.exp(DRAW.normal(size=shape))
    return x / x.sum(axis=-1, keepdims=True)


def test_rollout_is_the_product_of_all_steps_over_positions_and_patches():
    """The oracle: one matrix over positions and patches a step, where what does not mix has an identity."""
    queries, positions, patches, heads = 3, 5, 4, 2
    own = [_softmax((heads, positions, positions)) for _ in range(3)]
    reads = [_softmax((heads, queries, patches)), None, _softmax((heads, queries, patches))]
    everything = np.eye(positions + patches)
    for self_attention_weights, cross_attention_weights in zip(own, reads, strict=True):
        step = np.eye(positions + patches)
        step[:positions, :positions] = (np.eye(positions) + sum(self_attention_weights) / heads) / 2
        everything = step @ everything
        if cross_attention_weights is not None:
            step = np.eye(positions + patches)
            step[:queries, :queries] /= 2
            step[:queries, positions:] = sum(cross_attention_weights) / heads / 2
            everything = step @ everything
    of_patches, of_positions = rollout(own, reads)
    assert_close(of_patches, everything[:queries, positions:])
    assert_close(of_positions, everything[:queries, :positions])
    assert_close(of_patches.sum(axis=1) + of_positions.sum(axis=1), np.ones(queries))


def test_rollout_of_the_worked_example_and_of_a_patch_that_comes_through_another_query():
    alone, first = np.eye(2)[None], np.array([[[1.0, 0.0], [0.0, 1.0]]])
    of_patches, of_positions = rollout([alone], [first])
    assert_close(of_patches, np.eye(2) / 2)
    assert_close(of_positions, np.eye(2) / 2)
    swapped = alone[:, ::-1]
    of_patches, _ = rollout([alone, swapped], [first, None])
    assert_close(of_patches, np.full((2, 2), 0.25))


def test_a_run_rolls_out_the_weights_of_its_own_layers(aligned):
    """With cross-attention in layer 0 only, of 2: what a query read there is halved, mixed and halved again."""
    image_features = attention.encode_picture(aligned, small.draw_picture('red', 'circle'))
    reads, self_attention_weights = _weights(aligned, image_features)
    mixed = np.asarray(self_attention_weights)[0, 1].mean(axis=0)
    want = (np.eye(len(mixed)) + mixed) / 2 @ np.asarray(reads)[0, 0].mean(axis=0) / 2
    assert_close(attention.attention_maps(aligned, image_features).rollout, attention.grid(want))


def test_instruction_aware_queries_read_the_prompt_that_the_language_model_reads(line):
    model = Blip2.load(line / 'instruct')
    aware = dataclasses.replace(model, run=small.change(model.run, 'objective', instruction_aware=True))
    image_features = attention.encode_picture(aware, small.draw_picture('red', 'circle'))
    found = attention.attention_maps(aware, image_features, 'Is it red?')
    weights, _ = _weights(aware, image_features, *aware.text_arrays(aware.question_prompts(['Is it red?'])))
    np.testing.assert_array_equal(found.maps, attention.grid(np.asarray(weights)[0]))
    np.testing.assert_array_equal(
        attention.attention_maps(model, image_features, 'is it red?').maps,
        attention.attention_maps(model, image_features).maps,
    )


def test_the_command_draws_and_keeps_arrays(line, tmp_path, capsys):
    picture, out = tmp_path / 'red.png', tmp_path / 'out'
    small.draw_picture('red', 'circle').save(picture)
    shown = {'maps', 'class_token', 'layers', 'rollout'}
    words = ['attention', str(line / 'stage1'), str(picture), '--out', str(out)]
    for more, kept in (([], set()), (['--text', TEXT], {'cosines', 'score_itc', 'score_itm', 'drop_itc', 'drop_itm'})):
        cli.run([*words, *more])
        with np.load(out / 'attention.npz') as arrays:
            assert set(arrays) == shown | kept | ({'gradient'} if more else set())
        assert f'wrote {out / "attention.png"}' in capsys.readouterr().out
        with Image.open(out / 'attention.png') as drawing:
            assert drawing.size[0] > 100 and len(drawing.getcolors(1 << 20)) > 50
    cli.run(['attention', str(line / 'instruct'), *words[2:], '--text', 'red', '--question', 'What color is it?'])
    assert '"red": log p of the text' in capsys.readouterr().out


def test_what_cannot_be_drawn_says_why(aligned, line):
    picture = small.draw_picture('red', 'circle')
    with pytest.raises(UserError, match='no language model to ask'):
        attention.attention_maps(aligned, attention.encode_picture(aligned, picture), 'is it red?')
    blind = dataclasses.replace(aligned, run=small.change(aligned.run, 'model', vit=None))
    with pytest.raises(UserError, match='give one with a vision tower'):
        attention.encode_picture(blind, picture)
    with pytest.raises(UserError, match='no qformer'):
        attention.encode_picture(Blip2.load(line / 'vision'), picture)
