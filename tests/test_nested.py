"""Nested queries: masked in training, cut off in use, and both give the same."""

import dataclasses
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from qformer_jax import config
from qformer_jax.errors import UserError
from qformer_jax.inference import decode
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.models import blip2, nested
from qformer_jax.parallel.mesh import data_mesh
from qformer_jax.rules import flatten, unflatten
from qformer_jax.training import loop, losses, step
from qformer_jax.training.loss_context import LossContext

DRAW = np.random.default_rng(0)
Q, M = 6, 3
FIRST = jnp.arange(Q) < M
QFORMER = dataclasses.replace(small.QFORMER, feature_width=6, vocab_size=30, num_queries=Q)
TEXT_MASK = np.arange(5)[None] < np.array([[5], [3], [4]])
BATCH = jax.tree.map(
    jnp.asarray,
    {
        'features': DRAW.normal(size=(3, 4, 6)).astype(np.float32),
        'feature_mask': np.arange(4)[None] < np.array([[4], [2], [3]]),
        'text': DRAW.integers(4, 30, size=(3, 5)).astype(np.int32),
        'text_mask': TEXT_MASK,
        'image_id': np.arange(3, dtype=np.int32),
        'lm_text': DRAW.integers(4, 40, size=(3, 5)).astype(np.int32),
        'lm_mask': TEXT_MASK,
        'lm_target': TEXT_MASK & (np.arange(5)[None] >= 2),
    },
)
STAGE1 = config.Objective(cross_modal=0.5, in_modal=0.5)
AWARE = config.Objective(instruction_aware=True)
VOICES = {
    'opt': dataclasses.replace(small.OPT, vocab_size=40),
    't5': dataclasses.replace(reference.T5, vocab_size=40),
}


def randomised(c: config.Blip2Config) -> dict:
    """Return parameters of which none is zero or one."""
    shapes = flatten(blip2.shapes(c))
    return {k: jnp.asarray(DRAW.normal(size=x.shape) / 4 + (x.ndim < 1), jnp.float32) for k, x in shapes.items()}


def model_of(lm: config.OptConfig | None = None, **fields) -> tuple[blip2.Blip2Module, dict]:
    c = config.Blip2Config(None, dataclasses.replace(QFORMER, **fields), lm=lm)
    return blip2.Blip2Module(c), unflatten(randomised(c))


def cut(model: blip2.Blip2Module, params: dict) -> tuple[blip2.Blip2Module, dict]:
    """Return the model with its first M queries alone."""
    c = dataclasses.replace(model.config.qformer, num_queries=M)
    fewer = params | {'qformer': params['qformer'] | {'query_token': params['qformer']['query_token'][:M]}}
    return blip2.Blip2Module(dataclasses.replace(model.config, qformer=c)), fewer


def stage1(model, query_mask=None):
    return losses.stage1(model, BATCH, LossContext(jax.random.key(0), STAGE1, query_mask=query_mask))


def generation(model, query_mask=None):
    return losses.generation(model, BATCH, LossContext(jax.random.key(0), AWARE, query_mask=query_mask))


def gradients(model: blip2.Blip2Module, params: dict, loss, query_mask=None):
    """Return (loss, metrics), and the gradients of all parameters."""
    call = lambda params: model.apply({'params': params}, query_mask, method=loss)  # noqa: E731
    return jax.jit(jax.value_and_grad(call, has_aux=True))(params)


@pytest.mark.parametrize('loss, lm', [(stage1, None), *((generation, name) for name in VOICES)])
def test_masked_queries_are_as_if_they_were_not_there(loss, lm):
    """Every term, and every gradient; those of the masked queries are zero, to the bit."""
    model, params = model_of(VOICES.get(lm))
    (_, metrics), masked = gradients(model, params, loss, FIRST)
    (_, want), sliced = gradients(*cut(model, params), loss)
    assert metrics.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)
    table = masked['qformer'].pop('query_token')
    assert (table[M:] == 0).all() and (np.abs(table[:M]).max(axis=1) > 0).all()
    np.testing.assert_allclose(table[:M], sliced['qformer'].pop('query_token'), atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), masked, sliced)


@pytest.mark.parametrize('loss, lm', [(stage1, None), (generation, 'opt')])
def test_with_all_queries_the_loss_is_the_plain_one_to_the_bit(loss, lm):
    model, params = model_of(VOICES.get(lm), depth=1)
    call = jax.jit(lambda params, query_mask: model.apply({'params': params}, query_mask, method=loss)[0])
    assert call(params, jnp.ones(Q, bool)) == call(params, None)


def test_draws_are_the_first_1_2_4_or_all():
    assert nested.counts(1) == (1,) and nested.counts(6) == (1, 2, 4, 6) and nested.counts(8) == (1, 2, 4, 8)
    drawn = jax.vmap(lambda key: nested.draw(key, 6))(jax.random.split(jax.random.key(0), 400))
    kept = Counter(np.asarray(drawn).sum(axis=1).tolist())
    assert kept.keys() == {1, 2, 4, 6} and min(kept.values()) > 70
    assert (np.diff(np.asarray(drawn).astype(int), axis=1) <= 0).all()  # those that exist come first


def test_each_step_of_training_draws_and_validation_does_not():
    model, params = model_of(depth=1)
    run = small.change(small.recipe('stage1', 'nowhere'), 'model', vit=None, qformer=model.config.qformer)
    run = small.change(run, 'objective', nested_queries=True)
    loss = jax.jit(partial(step.loss, step.Program.of(run), data_mesh(1)), static_argnums=4)
    keys = [jax.random.key(seed) for seed in range(6)]
    history = [loss(params, {}, BATCH, key, True)[1] for key in keys]
    assert len({float(metrics['queries']) for metrics in history}) > 1
    plain = small.change(run, 'objective', nested_queries=False)
    assert 'queries' not in loss(params, {}, BATCH, keys[0], False)[1]
    want = step.loss(step.Program.of(plain), data_mesh(1), params, {}, BATCH, keys[0], False)
    assert want[0] == loss(params, {}, BATCH, keys[0], False)[0]


def test_in_use_cutting_gives_what_masking_gives(tmp_path):
    """ITC vectors, ITM logits, and texts."""
    model, params = model_of(VOICES['opt'])
    whole = Blip2(config.Run('stage2', model=model.config), params, tmp_path)
    few = whole.with_queries(M)
    assert few.run.model.qformer.num_queries == M and few.params['qformer']['query_token'].shape == (M, QFORMER.width)
    image, text = (BATCH['features'], BATCH['feature_mask']), (BATCH['text'], BATCH['text_mask'])
    prompt, settings = (BATCH['lm_text'][:, ::-1], BATCH['lm_mask'][:, ::-1]), GenerationConfig(6, end_ids=(2,))

    def run(model, query_mask=None):
        alone = model.query_features(*image, query_mask=query_mask)
        both = model.query_features(*image, *text, query_mask=query_mask)
        return model.qformer.embed_image(alone.queries)[:, :M], model.qformer.match(both.queries, both.query_mask), \
            model.soft_prefix(*image, query_mask=query_mask)  # fmt: skip

    masked = jax.jit(partial(model.apply, method=run))({'params': params}, FIRST)
    sliced = jax.jit(partial(few.model.apply, method=run))({'params': few.params})
    for a, b in zip(masked[:2], sliced[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    written = [decode.with_lm(m, p, prefix, *prompt, settings=settings) for m, p, prefix in (
        (model, params, masked[2]), (few.model, few.params, sliced[2]))]  # fmt: skip
    np.testing.assert_array_equal(written[0].tokens, written[1].tokens)
    np.testing.assert_allclose(written[0].scores, written[1].scores, atol=1e-5)


@pytest.mark.parametrize('count, says', [(0, 'at least 1'), (7, r'7 queries: this run has 6')])
def test_no_more_queries_than_there_are(count, says, tmp_path):
    model, params = model_of()
    with pytest.raises(UserError, match=says):
        Blip2(config.Run('stage1', model=model.config), params, tmp_path).with_queries(count)


@pytest.mark.parametrize('fields', [{'query_bank': 2}, {'local_queries': 4}, {'gated_residual': True}])
def test_queries_that_are_more_than_a_vector_cannot_be_cut(fields):
    run = small.change(small.recipe('stage1', 'nowhere'), 'objective', nested_queries=True)
    run = small.change(run, 'model', qformer=dataclasses.replace(small.QFORMER, **fields))
    with pytest.raises(UserError, match='the number of queries cannot change: model.qformer.' + next(iter(fields))[:5]):
        loop.check(run)


def test_nothing_to_draw_is_refused():
    with pytest.raises(UserError, match=r'nested-queries draws how many .* there is none'):
        loop.check(small.change(small.recipe('vision', 'nowhere'), 'objective', nested_queries=True))
