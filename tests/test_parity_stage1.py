"""Stage 1 against LAVIS: losses, similarities, ITM logits and every gradient, with the recorded negatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import CLIP, EVA, QFORMER, assert_close, assert_gradients_close, nhwc

from qformer_jax import config
from qformer_jax.convert import lavis
from qformer_jax.convert.table import convert
from qformer_jax.models import blip2
from qformer_jax.objectives import captioning
from qformer_jax.objectives.matching import Negatives, weights
from qformer_jax.training import losses

EVA_MODEL = config.Blip2(EVA, QFORMER, None)
CLIP_MODEL = config.Blip2(CLIP, QFORMER, None)
LOSSES = {'loss': 'loss', 'itc': 'loss_itc', 'itm': 'loss_itm', 'itg': 'loss_lm'}


@pytest.fixture
def parts(monkeypatch):
    """Return the dict into which `stage1` leaves its similarities and ITM logits, which it does not report."""
    seen = {}

    def spy(module, name, keep):
        original = getattr(module, name)

        def wrapped(*args, **options):
            out = original(*args, **options)
            seen.update(keep(args, out))
            return out

        monkeypatch.setattr(module, name, wrapped)

    spy(losses.contrastive, 'itc', lambda _, out: {'sim_i2t': out.image_to_text, 'sim_t2i': out.text_to_image})
    spy(losses.matching, 'itm', lambda args, _: {'itm_logits': args[0], 'itm_labels': args[1]})
    return seen


def batch_of(case: str) -> dict[str, jax.Array]:
    want = reference.arrays(case)
    size = len(want['pixels'])
    batch = {
        'pixels': nhwc(want['pixels']),
        'feature_mask': np.ones((size, 17), bool),
        'text': want['input_ids'],
        'text_mask': want['attention_mask'].astype(bool),
        'image_id': np.arange(size),
    }
    return jax.tree.map(jnp.asarray, batch)


def recorded(image: np.ndarray, text: np.ndarray) -> Negatives:
    exists = np.ones(image.shape, bool)
    return Negatives(image, text, exists, exists)


def stage1(c: config.Blip2, batch: dict, negatives: Negatives, objective: config.Objective, parts: dict, **options):
    """Return loss(params) -> (loss, (metrics, parts)); the pixels are normalised, so they go straight to the tower."""

    def run(model, batch):
        features = model.vit(batch['pixels']).features
        loss, metrics = losses.stage1(
            model, batch | {'features': features}, jax.random.key(0), objective, negatives=negatives, **options
        )
        return loss, (metrics, dict(parts))

    return lambda params: blip2.Blip2(c).apply({'params': params}, batch, method=run)


@pytest.mark.parametrize('gather_grad, file', [('local', 'grads'), ('global', 'grads_gather_with_grad')])
def test_losses_and_gradients_equal_lavis(gather_grad, file, parts):
    want = reference.arrays('stage1')
    objective = config.Objective(positives='diagonal', gather_grad=gather_grad)
    negatives = recorded(want['neg_image_idx'], want['neg_text_idx'])
    function = stage1(EVA_MODEL, batch_of('stage1'), negatives, objective, parts)
    params = reference.params('stage1', EVA_MODEL)
    (_, (metrics, seen)), gradients = jax.value_and_grad(function, has_aux=True)(params)
    for ours, theirs in LOSSES.items():
        assert_close(metrics[ours], want[theirs])
    for name in seen:
        assert_close(seen[name], want[name])
    files = reference.tensors('stage1', file)
    if gather_grad == 'local':  # the tower's gradients were recorded in this mode only
        files |= reference.tensors('stage1', 'grads_vit')
    else:
        del gradients['vit']
    shapes = {name: tree for name, tree in blip2.shapes(EVA_MODEL).items() if name in gradients}
    assert_gradients_close(gradients, convert(lavis.blip2(EVA_MODEL), files, shapes))


def test_losses_with_the_clip_tower_equal_lavis(parts):
    want = reference.arrays('stage1_clip')
    negatives = recorded(want['neg_image_idx'], want['neg_text_idx'])
    function = stage1(CLIP_MODEL, batch_of('stage1_clip'), negatives, config.Objective(positives='diagonal'), parts)
    _, (metrics, seen) = jax.jit(function)(reference.params('stage1_clip', CLIP_MODEL))
    for ours, theirs in LOSSES.items():
        assert_close(metrics[ours], want[theirs])
    for name in seen:
        assert_close(seen[name], want[name])


@functools.cache
def two_processes() -> dict[str, np.ndarray]:
    """Return what two LAVIS processes recorded, the rows of process 0 first."""
    want = reference.arrays('stage1_world2')
    names = {name.split('.', 1)[1] for name in want}
    return {name: np.stack([want[f'rank{rank}.{name}'] for rank in (0, 1)]) for name in names}


def as_one_batch(itm_rows: np.ndarray) -> np.ndarray:
    """Return ITM rows of two processes in the order of one: matches, wrong pictures, wrong texts."""
    return itm_rows.reshape(2, 3, 3, 2).swapaxes(0, 1).reshape(18, 2)


def test_two_processes_equal_one_global_batch(parts):
    want = two_processes()
    negatives = recorded(want['neg_image_idx'].reshape(6), want['neg_text_idx'].reshape(6))
    objective = config.Objective(positives='diagonal')
    function = stage1(EVA_MODEL, batch_of('stage1'), negatives, objective, parts, shards=2)
    params = reference.params('stage1', EVA_MODEL)
    (_, (metrics, seen)), gradients = jax.value_and_grad(function, has_aux=True)(params)
    for ours, theirs in LOSSES.items():
        assert_close(metrics[ours], want[theirs].mean())
    assert_close(seen['sim_i2t'], want['sim_i2t'].reshape(6, 6))
    assert_close(seen['sim_t2i'], want['sim_t2i'].reshape(6, 6))
    assert_close(seen['itm_logits'], as_one_batch(want['itm_logits']))
    del gradients['vit']
    shapes = {'qformer': blip2.shapes(EVA_MODEL)['qformer']}
    expected = convert(lavis.blip2(EVA_MODEL), reference.tensors('stage1_world2', 'grads_mean'), shapes)
    assert_gradients_close(gradients, expected)


def test_the_captioning_mean_is_per_shard_or_global():
    """Numbers from the recordings: mean of two processes' means, and the mean over all tokens of the batch."""
    want = reference.arrays('stage1')
    text, counts = want['input_ids'][:, 1:], want['attention_mask'][:, 1:].astype(bool)
    token_losses = captioning.token_losses(want['lm_logits'][:, :-1], text, 0.1)
    assert abs(captioning.token_mean(token_losses, counts, shards=2) - 11.46747) < 1e-5
    assert abs(captioning.token_mean(token_losses, counts) - 11.46437) < 1e-5
    assert abs(captioning.token_mean(token_losses, counts) - want['loss_lm']) < 1e-5


def test_keys_of_wrong_pictures_may_be_shared_or_projected_again(parts):
    """`share_image_keys` moves data differently, and nothing else: loss and gradients within 1e-6."""
    want = reference.arrays('stage1')
    negatives = recorded(want['neg_image_idx'], want['neg_text_idx'])
    params = reference.params('stage1', EVA_MODEL)
    batch = batch_of('stage1') | {'feature_mask': jnp.arange(17)[None] < jnp.arange(12, 18)[:, None]}
    objective, results = config.Objective(), []
    for share in (True, False):
        function = stage1(EVA_MODEL, batch, negatives, objective, parts, share_image_keys=share)
        results.append(jax.value_and_grad(function, has_aux=True)(params))
    ((shared, _), shared_gradients), ((again, _), gradients) = results
    assert_close(shared, again, 1e-6)
    assert_gradients_close(shared_gradients, jax.tree.map(np.asarray, gradients), 1e-6)


@pytest.mark.parametrize('case', ['stage1', 'stage1_clip'])
def test_negatives_are_weighted_as_in_lavis(case):
    want = reference.arrays(case)
    own = np.eye(len(want['pixels']), dtype=bool)
    assert_close(weights(want['sim_i2t'], own), want['weights_i2t'])
    assert_close(weights(want['sim_t2i'], own), want['weights_t2i'])
