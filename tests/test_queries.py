"""What each query does for a text: gradients by weights, scores without a query, winners of ITC, and the command."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from PIL import Image
from reference import assert_close

from qformer_jax import cli
from qformer_jax.analysis import attention, leave_one_out, query_importance, relevance, scores
from qformer_jax.data.dataset import Dataset
from qformer_jax.errors import UserError
from qformer_jax.inference import forward
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.prompts import target_rows
from qformer_jax.models.blip2 import Prefix
from qformer_jax.models.layers import Attention
from qformer_jax.rules import flatten

DRAW = np.random.default_rng(0)
TEXT = 'a red circle'
QUERIES, HEADS = small.QFORMER.num_queries, small.QFORMER.heads


@pytest.fixture(scope='module')
def aligned(line):
    return Blip2.load(line / 'stage1')


@pytest.fixture(scope='module')
def answering(line):
    return Blip2.load(line / 'instruct')


def see(model):
    return attention.encode_picture(model, small.draw_picture('red', 'circle'))


def test_a_nudge_is_added_to_the_weights():
    layer = Attention(width=6, heads=2)
    x, memory = DRAW.normal(size=(1, 3, 6)), DRAW.normal(size=(1, 4, 6))
    nudge = DRAW.normal(size=(1, 2, 3, 4)).astype(np.float32)
    params = layer.init(jax.random.key(0), x, memory, method=lambda m, x, s: m(x, m.project(s), None))['params']
    output = jax.tree.map(np.asarray, params['output'])

    def read(layer):
        keys = layer.project(memory)
        return layer(x, keys, None), layer.weights(x, keys, None), keys.value

    (plain, weights, value), (nudged, same, _) = (
        layer.apply({'params': params, **more}, method=read)
        for more in ({}, {'attention_perturbation': {'weights': nudge}})
    )
    np.testing.assert_array_equal(weights, same)
    for given, out in ((np.zeros_like(nudge), plain), (nudge, nudged)):
        heads = [(weights[0, h] + given[0, h]) @ value[0, :, h] for h in range(2)]
        want = np.concatenate(heads, axis=1) @ output['kernel'] + output['bias']
        assert_close(out[0], want)


def _inputs(model, image_features):
    if model.run.model.lm is None:
        return scores.odds, (image_features.features, image_features.mask, *model.text_arrays([TEXT]))
    rows = target_rows(model.lm_tokenizer, model.question_prompts(['what color is it?']), ['red'])
    return scores.log_p, (image_features.features, image_features.mask, (), *rows)


@pytest.mark.parametrize('name', ['aligned', 'answering'])
def test_weights_times_gradient_is_what_the_values_of_each_head_do(name, request):
    """What is read is linear in weights and values: sum A dscore/dA = sum W dscore/dW, W making the values."""
    model = request.getfixturevalue(name)
    image_features = see(model)
    score, inputs = _inputs(model, image_features)
    text = inputs[2:4] if name == 'aligned' else ()
    reads, _ = attention.weights(model.model, model.params, image_features.features, image_features.mask, *text)
    by = scores.gradient(model.model, model.params, score, *inputs)
    value = model.params['qformer']['layer_0']['cross_attention']['value']

    def moved(value):
        layer = model.params['qformer']['layer_0']
        layer = layer | {'cross_attention': layer['cross_attention'] | {'value': value}}
        params = model.params | {'qformer': model.params['qformer'] | {'layer_0': layer}}
        return forward.bound(score)(model.model, params, *inputs).sum()

    products = jax.tree.leaves(jax.tree.map(lambda w, g: w * g, value, jax.grad(moved)(value)))
    want = sum(each.reshape(-1, HEADS, small.QFORMER.width // HEADS).sum(axis=(0, 2)) for each in products)
    assert np.abs(want).max() > 1e-3
    assert_close((reads * by)[0, 0].sum(axis=(1, 2)), want)


def test_one_weight_more_moves_the_score_as_its_gradient_says(aligned):
    """The second query's reading of patch 2 in head 1, by finite differences."""
    score, inputs = _inputs(aligned, see(aligned))
    by = scores.gradient(aligned.model, aligned.params, score, *inputs)

    def at(step):
        nudge = jnp.zeros(by.shape[:1] + by.shape[2:]).at[0, 1, 1, 2].set(step)
        given = {'qformer': {'layer_0': {'cross_attention': {'weights': nudge}}}}
        out = aligned.model.apply({'params': aligned.params, 'attention_perturbation': given}, *inputs, method=score)
        return float(out[0])

    np.testing.assert_allclose((at(0.02) - at(-0.02)) / 0.04, by[0, 0, 1, 1, 2], rtol=2e-3, atol=1e-4)


def test_itc_without_a_query_is_the_best_of_the_others():
    each = DRAW.normal(size=(5, 4))
    want = [[row.max() - np.delete(row, q).max() for q in range(4)] for row in each]
    assert_close(leave_one_out.itc_drop(each), np.array(want))
    with pytest.raises(UserError, match='one query'):
        leave_one_out.itc_drop(each[:, :1])


def test_winners_are_counted_one_a_picture():
    image, text = DRAW.normal(size=(6, 3, 2)), DRAW.normal(size=(6, 2))
    image[0, 2] = image[0, 1] = 100 * text[0]
    want = [0, 0, 0]
    for queries, words in zip(image, text, strict=True):
        want[max(range(3), key=lambda q: (queries[q] @ words, -q))] += 1
    counts = leave_one_out.itc_wins(image, text)
    np.testing.assert_array_equal(counts, want)
    assert counts.sum() == 6 and counts[1] > 0


def test_itm_without_a_query_is_the_mean_of_the_others(aligned):
    """The oracle: the head over the remaining queries."""
    image_features, text = see(aligned), aligned.text_arrays([TEXT])
    each = np.asarray(
        scores.odds_each(aligned.model, aligned.params, image_features.features, image_features.mask, *text)
    )
    rest = [each[:, [p for p in range(QUERIES) if p != q]].mean(axis=1) for q in range(QUERIES)]
    assert_close(leave_one_out.itm_drop(each), each.mean(axis=1, keepdims=True) - np.stack(rest, axis=1))
    no, yes = aligned.match(image_features, text, np.array([0]), np.array([0]))[0]
    assert_close(each.mean(), yes - no)


def test_a_text_without_a_query_is_read_after_a_prefix_without_it(answering):
    """The oracle: a prefix of one token fewer."""
    image_features = see(answering)
    prompts, targets = answering.question_prompts(['what color is it?']), ['red']
    prefix = answering.soft_prefix(image_features, prompts)
    log_p, drops = leave_one_out.lm_drop(answering, prefix, prompts, targets)
    losses, _ = answering.losses(image_features, prompts, targets)
    assert_close(log_p, -losses.sum(axis=1))
    rows = target_rows(answering.lm_tokenizer, prompts, targets)
    shorter = [jax.tree.map(lambda x, q=q: np.delete(x, q, axis=1), prefix) for q in range(QUERIES)]
    without = [-forward.target_losses(answering.model, answering.params, each, *rows).sum(axis=1) for each in shorter]
    assert_close(drops, log_p[:, None] - np.stack(without, axis=1))
    assert np.abs(drops).max() > 1e-3


def test_the_worked_example_of_leaving_out():
    vectors, token_mask = np.arange(4.0)[None, :, None], np.array([[False, True, True, True]])
    left = leave_one_out.leave_out(Prefix(vectors, token_mask), 1)
    np.testing.assert_array_equal(left.mask, [[False, False, True, True]])
    np.testing.assert_array_equal(left.vectors[0, 2:, 0], [1, 3])


def test_a_fit_of_stage_1_holds_both_scores(aligned):
    image_features = see(aligned)
    found, other = (relevance.relevance(aligned, image_features, text) for text in (TEXT, 'a blue square'))
    similar = {kind: aligned.similarity(image_features, [TEXT], by=kind)[0, 0] for kind in ('itc', 'itm')}
    assert_close(found.scores['itc'], similar['itc'])
    assert_close(found.cosines.max(), similar['itc'])
    assert found.scores['itc'] > other.scores['itc'] and found.scores['itm'] > other.scores['itm']
    score, inputs = _inputs(aligned, image_features)
    reads, _ = attention.weights(aligned.model, aligned.params, *inputs)
    by = np.asarray(scores.gradient(aligned.model, aligned.params, score, *inputs))
    assert (by < 0).any() and (by > 0).any()
    assert_close(found.gradient, attention.grid(reads * np.where(by > 0, by, 0))[0])


def test_a_fit_with_a_language_model_is_of_the_text_after_the_prompt(answering):
    image_features = see(answering)
    found = relevance.relevance(answering, image_features, ' Red', 'What color is it?')
    losses, _ = answering.losses(image_features, answering.question_prompts(['what color is it?']), ['red'])
    assert_close(found.scores['lm'], -losses.sum())
    assert found.cosines is None and set(found.drops) == {'lm'} and found.gradient.max() > 0
    score, inputs = _inputs(answering, image_features)
    assert_close(forward.bound(score)(answering.model, answering.params, *inputs)[0], found.scores['lm'])


def test_a_split_counts_what_each_picture_says(aligned, pictures):
    records = list(Dataset.open(pictures).source('test'))
    found = query_importance.query_importance(dataclasses.replace(aligned, batch_size=4), records)
    images = [r.image for r in records]
    image, text = aligned.features(images), aligned.features(texts=[r.captions[0] for r in records], mode='text')
    np.testing.assert_array_equal(found.wins, leave_one_out.itc_wins(image, text))
    assert found.count == found.wins.sum() == 8
    assert_close(found.drops['itc'], leave_one_out.itc_drop(leave_one_out.cosines(image, text)))
    single = [
        relevance.relevance(aligned, aligned.encode_images([r.image]), r.captions[0]).drops['itm'] for r in records
    ]
    assert_close(found.drops['itm'], np.stack(single))
    assert (np.diff(found.wins[found.order]) <= 0).all()


def test_a_run_that_answers_is_judged_by_every_answer(answering, pictures):
    records = list(Dataset.open(pictures).source('test'))
    found = query_importance.query_importance(answering, records)
    assert found.wins is None and found.count == 16 and set(found.drops) == {'lm'}
    one = relevance.relevance(
        answering, answering.encode_images([records[1].image]), records[1].answers[1][0], records[1].questions[1]
    )
    assert_close(found.drops['lm'][3], one.drops['lm'])
    assert (np.diff(found.means['lm'][found.order]) <= 0).all()
    silent = [dataclasses.replace(record, questions=(), answers=()) for record in records]
    with pytest.raises(UserError, match='no text to judge'):
        query_importance.query_importance(answering, silent)


def test_the_command_draws_and_keeps_arrays(line, tmp_path, capsys):
    for stage, arrays in (('stage1', {'order', 'wins', 'drop_itc', 'drop_itm'}), ('stage2', {'order', 'drop_lm'})):
        cli.run(['queries', str(line / stage), '--out', str(tmp_path / stage)])
        assert f'wrote {tmp_path / stage / "queries.png"}' in capsys.readouterr().out
        with np.load(tmp_path / stage / 'queries.npz') as kept:
            assert set(kept) == arrays and sorted(kept['order']) == list(range(QUERIES))
        with Image.open(tmp_path / stage / 'queries.png') as drawing:
            assert drawing.size[0] > 100 and len(drawing.getcolors(1 << 20)) > 10


def test_every_path_of_nudges_is_that_of_a_cross_attention(aligned):
    layers = scores.reading_layers(aligned.run.model.qformer)
    found = {path.split('/')[1] for path in flatten(aligned.params) if '/cross_attention/' in path}
    assert found == {f'layer_{i}' for i in layers}
