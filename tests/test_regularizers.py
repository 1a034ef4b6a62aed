"""The weighted terms of stage 1: regularizers against loops, and what a weight of zero leaves out."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import QFORMER, assert_close

from qformer_jax import config
from qformer_jax.errors import UserError
from qformer_jax.models import blip2
from qformer_jax.objectives import regularizers
from qformer_jax.objectives.contrastive import QueryEmbedding
from qformer_jax.training import loop, losses
from qformer_jax.training.loss_context import LossContext
from qformer_jax.training.stage1_forward import unimodal

DRAW = np.random.default_rng(0)


def unit(*shape: int) -> np.ndarray:
    x = DRAW.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


IMAGE, TEXT = unit(5, 4, 6), unit(5, 6)
N = range(5)


def test_cross_modal_consistency_equals_loops():
    best = lambda j, k: max(query @ TEXT[k] for query in IMAGE[j])  # noqa: E731
    want = sum((best(j, k) - best(k, j)) ** 2 for j in N for k in N) / 5
    assert_close(regularizers.cross_modal_consistency(QueryEmbedding(IMAGE), TEXT), want)


def test_in_modal_consistency_equals_loops():
    means = [picture.mean(0) / np.linalg.norm(picture.mean(0)) for picture in IMAGE]
    want = sum((means[j] @ means[k] - TEXT[j] @ TEXT[k]) ** 2 for j in N for k in N) / 5
    assert_close(regularizers.in_modal_consistency(QueryEmbedding(IMAGE), TEXT), want)


def test_pictures_that_lie_as_their_texts_do_cost_nothing():
    same = QueryEmbedding(np.repeat(TEXT[:, None], 4, axis=1))
    assert regularizers.cross_modal_consistency(same, TEXT) == 0
    assert_close(regularizers.in_modal_consistency(same, TEXT), 0, 1e-6)


def test_contrast_of_views_equals_loops():
    """Inputs 0 and 2 belong together, so each may find either."""
    one, other, positive = unit(5, 6), unit(5, 6), np.eye(5, dtype=bool)
    positive[0, 2] = positive[2, 0] = True

    def mean_loss(a, b):
        scores = [[x @ y / 0.5 for y in b] for x in a]
        log_p = [[s - np.log(np.exp(row).sum()) for s in row] for row in scores]
        return -np.mean([np.mean([log_p[j][k] for k in N if positive[j, k]]) for j in N])

    found = regularizers.intra_modal(one, other, jnp.float32(0.5), positive)
    assert_close(found, (mean_loss(one, other) + mean_loss(other, one)) / 2)


QUERYING = dataclasses.replace(QFORMER, depth=2, dropout=0.2)
MODEL = blip2.Blip2Module(config.Blip2Config(vit=None, qformer=QUERYING, lm=None))
BATCH = {
    'features': DRAW.normal(size=(4, 5, QUERYING.feature_width)).astype(np.float32),
    'feature_mask': np.ones((4, 5), bool),
    'text': np.pad(DRAW.integers(4, 20, size=(4, 6)), ((0, 0), (1, 0)), constant_values=2).astype(np.int32),
    'text_mask': np.ones((4, 7), bool),
    'image_id': np.arange(4, dtype=np.int32),
}
BATCH = {name: jnp.asarray(x) for name, x in BATCH.items()}


@functools.cache
def stage1(**weights: float):
    """Return loss and metrics of stage 1, and the FLOPs that they take."""
    shapes, random = blip2.shapes(MODEL.config), np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), jnp.float32), shapes)
    params['qformer']['temperature'] = jnp.float32(0.5)
    context = LossContext(jax.random.key(1), config.Objective(**weights), train=True)
    call = nn.apply(lambda model: losses.stage1(model, BATCH, context), MODEL)
    compiled = jax.jit(lambda p: call({'params': p}, rngs={'dropout': jax.random.key(2)})).lower(params).compile()
    return *compiled(params), compiled.cost_analysis()['flops']


def test_terms_add_up_and_a_term_of_weight_zero_is_not_computed():
    whole, said, flops = stage1()
    assert {'itc', 'itm', 'itg', 'itc_accuracy', 'itm_accuracy', 'itg_accuracy'} < said.keys()
    part, left, fewer = stage1(itc=2.0, itm=0.0, itg=0.5)
    assert_close(whole, said['itc'] + said['itm'] + said['itg'])
    assert_close(part, 2 * said['itc'] + said['itg'] / 2)
    assert left.keys() == said.keys() - {'itm', 'itm_accuracy'}
    assert fewer < 0.7 * flops, 'three rows of [queries, text] a pair are most of stage 1'


def test_regularizers_are_added_by_their_weights():
    _, plain, _ = stage1()
    loss, said, _ = stage1(cross_modal=0.25, in_modal=0.5, intra_modal=0.1)
    for name in ('itc', 'itm', 'itg'):
        assert_close(said[name], plain[name])
    weighed = 0.25 * said['cross_modal'] + 0.5 * said['in_modal'] + 0.1 * said['intra_modal']
    assert_close(loss, sum(plain[name] for name in ('itc', 'itm', 'itg')) + weighed)
    assert all(said[name] > 0 for name in ('cross_modal', 'in_modal', 'intra_modal'))


@pytest.mark.parametrize('train', [True, False])
def test_two_views_differ_by_their_dropout_only(train):
    def views(model):
        context = LossContext(jax.random.key(1), config.Objective(), train)
        passes = [unimodal(model.qformer, BATCH['features'], BATCH['feature_mask'], BATCH, context) for _ in range(2)]
        return [(x.image_embedding.vectors, x.text_embedding) for x in passes]

    params = jax.jit(lambda: blip2.init(MODEL, jax.random.key(0)))()
    one, other = jax.jit(nn.apply(views, MODEL))({'params': params}, rngs={'dropout': jax.random.key(2)})
    for x, y in zip(one, other, strict=True):
        assert (np.abs(x - y).max(axis=-1) > 1e-3).all() == train


@pytest.mark.parametrize(
    'weights, words',
    [
        ({'itm': -1.0}, r'objective\.itm is -1\.0, it must be at least 0'),
        ({'itc': 0.0, 'itm': 0.0, 'itg': 0.0}, 'one must be above 0'),
        ({'intra_modal': float('nan')}, r'objective\.intra-modal is nan, it must be at least 0'),
        ({'intra_modal': 0.1}, 'dropout, and model.qformer.dropout is 0'),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, words):
    queries = dataclasses.replace(QFORMER, dropout=0.0)
    run = config.Run(
        stage='stage1',
        model=config.Blip2Config(vit=None, qformer=queries, lm=None),
        objective=config.Objective(**weights),
    )
    with pytest.raises(UserError, match=words):
        loop.check(run)
