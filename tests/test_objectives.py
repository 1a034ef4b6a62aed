"""The objectives against plain NumPy: positives, hard negatives, means, and passes that may be shared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import QFORMER, assert_close

from qformer_jax import config
from qformer_jax.models import blip2, masks
from qformer_jax.objectives import captioning, contrastive, matching
from qformer_jax.objectives.contrastive import QueryEmbedding

RANDOM = np.random.default_rng(0)
TEXT = np.array([[2, 7, 3], [2, 8, 3], [2, 7, 3], [2, 9, 3], [2, 5, 3]], np.int32)  # rows 0 and 2: one caption
IMAGE_ID = np.array([0, 1, 2, 3, 1], np.int32)  # rows 1 and 4: one picture
POSITIVE = np.eye(5, dtype=bool)
POSITIVE[0, 2] = POSITIVE[2, 0] = POSITIVE[1, 4] = POSITIVE[4, 1] = True


def test_equal_captions_and_equal_pictures_are_positives():
    np.testing.assert_array_equal(contrastive.positives(TEXT, IMAGE_ID, 'shared'), POSITIVE)
    np.testing.assert_array_equal(contrastive.positives(TEXT, IMAGE_ID, 'diagonal'), np.eye(5, dtype=bool))


def smoothed_cross_entropy(logits: np.ndarray, positive: np.ndarray) -> float:
    """Return the mean over rows, by loops and in float64."""
    total = 0.0
    for row, good in zip(logits.astype(np.float64), positive, strict=True):
        log_p = row - np.log(np.exp(row).sum())
        target = 0.9 * good / good.sum() + 0.1 / len(row)
        total -= (target * log_p).sum()
    return total / len(logits)


@pytest.mark.parametrize('positive', [POSITIVE, np.eye(5, dtype=bool)])
def test_itc_equals_loops(positive):
    image, text = RANDOM.normal(size=(5, 4, 6)).astype(np.float32), RANDOM.normal(size=(5, 6)).astype(np.float32)
    out = contrastive.itc(
        QueryEmbedding(image), text, jnp.float32(0.5), positive, label_smoothing=0.1, gather_grad='local'
    )
    similarity = np.array([[max(query @ t for query in picture) for t in text] for picture in image]) / 0.5
    assert_close(out.image_to_text, similarity)
    assert_close(out.text_to_image, similarity.T)
    both = smoothed_cross_entropy(similarity, positive) + smoothed_cross_entropy(similarity.T, positive.T)
    assert_close(out.loss, both / 2)
    assert_close(out.accuracy, np.mean([positive[i, similarity[i].argmax()] for i in range(5)]))


def test_local_gradients_move_only_the_asking_side():
    """One direction alone: the picture asks, so the gathered texts stay where they are."""
    image, text = RANDOM.normal(size=(3, 2, 4)).astype(np.float32), RANDOM.normal(size=(3, 4)).astype(np.float32)

    def first_term(text, rule):
        out = contrastive.itc(
            QueryEmbedding(image), text, jnp.float32(1), np.eye(3, dtype=bool), label_smoothing=0.0, gather_grad=rule
        )
        return out.image_to_text[0, 1]

    assert (jax.grad(first_term)(text, 'local') == 0).all()
    assert (jax.grad(first_term)(text, 'global')[1] != 0).all()


DRAWS = 20_000


@pytest.fixture(scope='module')
def drawn():
    """Return the weights of one batch, and many draws from them."""
    image_to_text, text_to_image = 2 * RANDOM.normal(size=(2, 5, 5)).astype(np.float32)

    def draw(key):
        out = matching.draw_negatives(key, image_to_text, text_to_image, POSITIVE)
        return {'text': out.text, 'image': out.image, 'exists': out.text_exists & out.image_exists}

    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), DRAWS))
    text_weights = matching.weights(image_to_text, POSITIVE)
    return text_weights, matching.weights(text_to_image, POSITIVE.T), jax.tree.map(np.asarray, draws)


def test_positives_are_never_drawn(drawn):
    _, _, draws = drawn
    rows = np.broadcast_to(np.arange(5)[None], (DRAWS, 5))
    assert not POSITIVE[rows, draws['text']].any()
    assert not POSITIVE[draws['image'], rows].any()
    assert draws['exists'].all()


def test_draws_follow_the_weights(drawn):
    """Every frequency lies within 5 standard deviations of its probability: 50 of them, a fixed seed."""
    text_weights, image_weights, draws = drawn
    for weights, chosen in ((text_weights, draws['text']), (image_weights, draws['image'])):
        p = np.asarray(weights / weights.sum(axis=1, keepdims=True))
        frequency = np.stack([np.bincount(chosen[:, row], minlength=5) for row in range(5)]) / DRAWS
        assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / DRAWS)).all()
        assert ((p > 0.02).sum(axis=1) > 1).any()  # so that a fixed choice would show


def test_a_batch_of_positives_has_no_negatives():
    logits = np.zeros((3, 3), np.float32)
    out = matching.draw_negatives(jax.random.key(0), logits, logits, np.ones((3, 3), bool))
    assert not out.text_exists.any() and not out.image_exists.any()


def test_itm_counts_only_the_rows_that_exist():
    logits = RANDOM.normal(size=(6, 2)).astype(np.float32)
    matched = np.array([1, 1, 0, 0, 0, 0], np.int32)
    counts = np.array([1, 1, 1, 0, 1, 0], bool)
    loss, accuracy = matching.itm(jnp.asarray(logits), jnp.asarray(matched), jnp.asarray(counts))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert_close(loss, -np.mean([log_p[i, matched[i]] for i in range(6) if counts[i]]))
    assert_close(accuracy, np.mean([logits[i].argmax() == matched[i] for i in range(6) if counts[i]]))


def test_token_losses_equal_the_smoothed_definition():
    logits, targets = RANDOM.normal(size=(1, 4, 5)).astype(np.float32), np.array([[0, 4, 2, 2]], np.int32)
    one_hot = np.eye(5, dtype=bool)[targets[0]]
    assert_close(captioning.token_losses(logits, targets, 0.1).mean(), smoothed_cross_entropy(logits[0], one_hot))


def test_token_mean_worked_example():
    values, counts = np.array([[2.0, 9, 9], [4, 4, 4]], np.float32), np.array([[1, 0, 0], [1, 1, 1]], bool)
    assert captioning.token_mean(values, counts) == 3.5
    assert captioning.token_mean(values, counts, shards=2) == 3


SMALL = dataclasses.replace(QFORMER, depth=2)
MODEL = config.Blip2Config(vit=None, qformer=SMALL, lm=None)
BATCH = jax.tree.map(
    jnp.asarray,
    {
        'features': RANDOM.normal(size=(5, 4, 48)).astype(np.float32),
        'feature_mask': np.arange(4)[None] < np.array([[4], [3], [4], [2], [4]]),
        'text': TEXT,
        'text_mask': np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]], bool),
    },
)


@pytest.fixture(scope='module')
def params():
    shapes = blip2.shapes(MODEL)
    random = jax.tree.map(lambda x: jnp.asarray(0.2 * RANDOM.normal(size=x.shape).astype(np.float32)), shapes)
    random['qformer']['temperature'] = jnp.float32(0.1)
    return random


def test_itc_and_itg_may_share_the_pass_over_the_queries(params):
    """The text of ITG reads the cache of ITC's queries; one pass over [queries, text] gives the same."""
    q = SMALL.num_queries

    def run(model):
        memory = model.qformer.project_image(BATCH['features'], BATCH['feature_mask'])
        unimodal = masks.unimodal(q, BATCH['text_mask'])[:, :, :q, :q]
        causal = masks.multimodal_causal(q, BATCH['text_mask'])
        queries = model.qformer(unimodal, image=memory)
        shared = model.qformer(causal[:, :, q:], text=BATCH['text'], prefix=queries.cache)
        return queries.queries, shared.text, model.qformer(causal, image=memory, text=BATCH['text'])

    queries, text, both = jax.jit(lambda params: blip2.Blip2Module(MODEL).apply({'params': params}, method=run))(params)
    assert_close(queries, both.queries, 2e-6)
    assert_close(text, both.text, 2e-6)
