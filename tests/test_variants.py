"""The Q-Former's variants: each is the plain one where it is not taken, or not yet trained, and what it changes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small
from reference import QFORMER, assert_close

from qformer_jax import config
from qformer_jax.convert import bert, published
from qformer_jax.convert.table import NewlyInitialized
from qformer_jax.errors import UserError
from qformer_jax.export.artifacts import artefact
from qformer_jax.export.functions import functions
from qformer_jax.inference import decode
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.models import blip2, masks, queries
from qformer_jax.rules import flatten, match, unflatten
from qformer_jax.training import loop, losses
from qformer_jax.training.loss_context import LossContext
from qformer_jax.training.optimizer import decay_rules

PLAIN = dataclasses.replace(QFORMER, depth=2, num_queries=5, dropout=0.0)
VARIANTS = {
    'bank': {'query_bank': 3},
    'windows': {'local_queries': 4},
    'residual': {'gated_residual': True},
    'all': {'query_bank': 3, 'local_queries': 4, 'gated_residual': True},
}
DRAW = np.random.default_rng(0)
FEATURES = DRAW.normal(size=(3, 17, PLAIN.feature_width)).astype(np.float32)
MASK = np.ones((3, 17), bool)
BATCH = {
    'features': FEATURES,
    'feature_mask': MASK,
    'text': np.pad(DRAW.integers(4, 20, size=(3, 6)), ((0, 0), (1, 0)), constant_values=2).astype(np.int32),
    'text_mask': np.ones((3, 7), bool),
    'image_id': np.arange(3, dtype=np.int32),
}
BATCH = {name: jnp.asarray(x) for name, x in BATCH.items()}


def network(**fields) -> blip2.Blip2Module:
    return blip2.Blip2Module(config.Blip2Config(vit=None, qformer=dataclasses.replace(PLAIN, **fields), lm=None))


@functools.cache
def drawn(**fields) -> dict:
    """Return random parameters by path, norms and biases too; those that networks share are the same."""
    found = {}
    for path, x in flatten(blip2.shapes(network(**fields).config)).items():
        draw = np.random.default_rng(sum(path.encode()))
        found[path] = (draw.normal(size=x.shape) / 3).astype(np.float32)
    return found


@functools.cache
def _ask(model: blip2.Blip2Module):
    return jax.jit(lambda params, *arrays: model.apply({'params': params}, *arrays, method='query_features').queries)


def ask(params: dict, features=FEATURES, mask=MASK, **fields) -> np.ndarray:
    return np.asarray(_ask(network(**fields))(unflatten(params), features, mask))


def test_a_plain_qformer_has_no_other_parameters():
    added = drawn(**VARIANTS['all']).keys() - drawn().keys()
    assert added == {
        *(f'qformer/query_mixer/{part}/{name}' for part in ('up', 'down') for name in ('kernel', 'bias')),
        *('qformer/residual_projection/kernel', 'qformer/residual_gate'),
    }
    decays = match(decay_rules(added), added)
    assert {path for path, through in decays.items() if through} == {path for path in added if path.endswith('kernel')}


# dynamic queries


def test_mixtures_are_convex_and_equal_loops():
    bank, logits = DRAW.normal(size=(6, 4)).astype(np.float32), DRAW.normal(size=(2, 6)).astype(np.float32)
    found = queries.mixtures(bank, logits, 3)
    for b in range(2):
        for q in range(2):
            weights = np.exp(logits[b, 3 * q : 3 * q + 3])
            want = sum(w * bank[3 * q + j] for j, w in enumerate(weights / weights.sum()))
            assert_close(found[b, q], want)
    assert_close(queries.mixtures(bank, jnp.zeros((2, 6)), 3)[0], queries.means(bank, 3))
    np.testing.assert_array_equal(queries.means(bank, 1), bank)


@pytest.mark.parametrize('kind', ['even weights', 'equal entries'])
def test_a_mixture_that_cannot_vary_is_a_learned_query(kind):
    mixed, plain = dict(drawn(query_bank=3)), drawn()
    token = mixed['qformer/query_token']
    if kind == 'equal entries':
        mixed['qformer/query_token'] = token = np.repeat(token[::3], 3, axis=0)
    else:
        mixed |= {path: np.zeros_like(x) for path, x in mixed.items() if 'query_mixer/down' in path}
    same = plain | {'qformer/query_token': token.reshape(5, 3, -1).mean(axis=1)}
    assert_close(ask(mixed, query_bank=3), ask(same))
    assert np.abs(ask(drawn(query_bank=3), query_bank=3) - ask(same)).max() > 1e-2, 'it does vary'


def test_pictures_choose_their_queries_by_what_exists_of_them():
    params, fields = drawn(query_bank=3), {'query_bank': 3}
    start = lambda features, mask: network(**fields).apply(  # noqa: E731
        {'params': unflatten(params)}, features, mask, method=lambda m, *x: m.qformer.project_image(*x).start
    )
    mask = MASK.copy()
    mask[0, 5:] = False
    longer = np.where(mask[..., None], FEATURES, 7.0)
    assert_close(start(longer, mask)[0], start(FEATURES[:1, :5], MASK[:1, :5])[0])
    assert np.abs(np.diff(start(FEATURES, MASK), axis=0)).max() > 1e-2, 'each has its own'


def stage1(params: dict, objective: config.Objective, **fields):
    """Return loss and metrics of stage 1, jitted."""
    call = nn.apply(lambda m: losses.stage1(m, BATCH, LossContext(jax.random.key(1), objective)), network(**fields))
    return jax.jit(lambda params: call({'params': params}))(unflatten(params))


def test_the_static_branch_is_stage_1_of_the_mean_queries():
    mixed = drawn(query_bank=3, depth=1) | {'qformer/temperature': np.float32(0.5)}
    mean = {'qformer/query_token': mixed['qformer/query_token'].reshape(5, 3, -1).mean(axis=1)}
    value, said = stage1(mixed, config.Objective(static_queries=0.5), query_bank=3, depth=1)
    want, plain = stage1({p: x for p, x in mixed.items() if 'mixer' not in p} | mean, config.Objective(), depth=1)
    assert_close(said['static_queries'], want)
    assert_close(value, said['itc'] + said['itm'] + said['itg'] + want / 2)
    assert 'static_queries' not in plain and abs(said['itc'] - plain['itc']) > 1e-4


# windows


def test_windows_are_as_drawn():
    lines = masks.__doc__[masks.__doc__.index('Where queries look') :].splitlines()
    rows = [line[9:].ljust(21) for line in lines if line.startswith(('    g', '    l'))]
    drawn = [[letter == 'x' for letter in row[:1] + row[2:6] + row[7:11] + row[12:16] + row[17:21]] for row in rows]
    np.testing.assert_array_equal(masks.windows(1, 4, MASK[:1])[0, 0], drawn)


@pytest.mark.parametrize('first', [0, 1])
def test_a_local_query_depends_on_its_window_only(first):
    """By gradient, of one layer: behind it, queries tell each other. The last window is the lower right quarter."""
    fields = {'local_queries': 4, 'depth': 1}
    call = _ask(network(**fields))
    features = FEATURES[:1, : 16 + first]
    reads = lambda x, query: call(unflatten(drawn(**fields)), x, MASK[:1, : 16 + first])[0, query].sum()  # noqa: E731
    for query, visible in (
        (0, np.ones((4, 4))),
        (1, np.pad(np.ones((2, 2)), (0, 2))),
        (4, np.pad(np.ones((2, 2)), (2, 0))),
    ):
        slope = np.abs(jax.grad(reads)(features, query)[0]).max(axis=-1) > 0
        np.testing.assert_array_equal(slope[first:].reshape(4, 4), visible)
        assert not first or slope[0] == (query == 0), 'the class token is of the global ones'


def test_windows_of_a_masked_grid_leave_out_what_does_not_exist():
    feature_mask = MASK.copy()
    feature_mask[0, 1] = False
    visible = masks.windows(1, 4, feature_mask)
    assert visible.shape == (3, 1, 5, 17) and not visible[0, :, :, 1].any() and visible[1, 0, 1, 1]


# the gated residual


def test_a_shut_gate_is_the_plain_network_and_learns():
    shut = drawn(gated_residual=True) | {'qformer/residual_gate': np.float32(0)}
    assert_close(ask(shut, gated_residual=True), ask(drawn()), 1e-6)
    fresh = jax.jit(lambda: blip2.init(network(gated_residual=True), jax.random.key(0)))()
    assert fresh['qformer']['residual_gate'] == 0
    call = _ask(network(gated_residual=True))
    slope = jax.grad(lambda params: jnp.square(call(params, FEATURES, MASK)).sum())(unflatten(shut))
    assert np.abs(slope['qformer']['residual_gate']) > 1e-2


def test_an_open_gate_adds_the_pooled_features():
    """Query i gets part i of the features that exist: of 5 and 5 queries, feature i."""
    open_ = drawn(gated_residual=True)
    mask = np.zeros((3, 17), bool)
    mask[:, [0, 3, 4, 8, 16]] = True
    added = ask(open_, mask=mask, gated_residual=True) - ask(drawn(), mask=mask)
    norm = {name: open_[f'qformer/feature_norm/{name}'] for name in ('scale', 'bias')}
    x = FEATURES[:, mask[0]]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + PLAIN.feature_norm_eps)
    want = np.tanh(open_['qformer/residual_gate']) * (
        (x * norm['scale'] + norm['bias']) @ open_['qformer/residual_projection/kernel']
    )
    assert_close(added, want)


# all of them


def test_stage_1_trains_every_parameter():
    params = drawn(**VARIANTS['all']) | {'qformer/temperature': np.float32(0.5)}
    call = nn.apply(
        lambda m: losses.stage1(m, BATCH, LossContext(jax.random.key(1), config.Objective()))[0],
        network(**VARIANTS['all']),
    )
    slope = flatten(jax.jit(jax.grad(lambda params: call({'params': params})))(unflatten(params)))
    assert all(np.isfinite(x).all() for x in slope.values())
    still = {path for path, x in slope.items() if not np.abs(x).max() > 0}
    assert all(path.endswith('key/bias') for path in still), still


@pytest.mark.parametrize('name', VARIANTS)
def test_pictures_do_not_disturb_each_other(name):
    params, fields = drawn(**VARIANTS[name]), VARIANTS[name]
    assert_close(ask(params, **fields)[1:], ask(params, FEATURES[1:], MASK[1:], **fields))


def test_the_qformer_writes_with_all_variants():
    """A picture's text is that picture's, whatever is beside it."""
    model, params = network(**VARIANTS['all']), unflatten(drawn(**VARIANTS['all']))
    written = lambda x, mask: (  # noqa: E731
        decode.with_qformer(model, params, x, mask, settings=GenerationConfig(max_new_tokens=4)).tokens
    )
    np.testing.assert_array_equal(written(FEATURES, MASK)[1:], written(FEATURES[1:], MASK[1:]))


def picture_function(model: config.Blip2Config):
    """Return what a stage-1 run makes of a picture."""
    return functions(config.Run('stage1', model), flatten(blip2.shapes(model)))[0]


def test_an_artefact_takes_any_number_of_features():
    fields = {'query_bank': 3, 'gated_residual': True, 'depth': 1}
    part = picture_function(network(**fields).config)
    outside = jax.export.deserialize(bytearray(artefact(part).serialize()))
    weights = {path: drawn(**fields)[path] for path in part.weights}
    for rows, count in ((1, 4), (3, 17)):
        inputs = FEATURES[:rows, :count], MASK[:rows, :count]
        found = jax.jit(outside.call)(weights, *inputs)
        assert_close(found, jax.jit(part.call)(weights, *inputs))
        assert found.shape == (rows, 5, PLAIN.embed_width)


def test_an_artefact_with_windows_takes_pictures():
    """Feature arrays have any size, which no function can cut into windows."""
    qformer = network(**VARIANTS['windows']).config.qformer
    with pytest.raises(UserError, match='this needs a vision tower'):
        artefact(picture_function(config.Blip2Config(vit=None, qformer=qformer, lm=None)))
    tower = dataclasses.replace(small.VIT, depth=1, width=PLAIN.feature_width)
    made = artefact(picture_function(config.Blip2Config(tower, qformer, lm=None)))
    assert str(made.out_avals[0].shape) == f'(b, 5, {PLAIN.embed_width})'


def test_published_classes_hold_no_variant_and_bert_begins_all():
    for field, value in VARIANTS['all'].items():
        model = config.Blip2Config(reference.EVA, dataclasses.replace(PLAIN, **{field: value}), lm=None)
        for choose, whose in ((published.for_lavis, 'LAVIS'), (published.for_huggingface, 'Hugging Face')):
            with pytest.raises(
                UserError, match=f"no class of {whose}'s .* model.qformer.{field.replace('_', '-')} {value}"
            ):
                choose(model, False)
    fresh = {row.path for row in bert.ENCODER if isinstance(row, NewlyInitialized)}
    assert drawn(**VARIANTS['all']).keys() - drawn().keys() <= fresh


def test_what_cannot_be():
    for words, fields in {
        'query-bank is 0, it must be at least 1': {'query_bank': 0},
        'local-queries is 5, .* a square number, such as 4 or 9': {'local_queries': 5},
        'local-queries is 9, of 5 queries in all': {'local_queries': 9},
        'local-queries is -1': {'local_queries': -1},
    }.items():
        with pytest.raises(UserError, match=words):
            dataclasses.replace(PLAIN, **fields)
    with pytest.raises(UserError, match=r'15 features are no square grid of patches.*nearest are 9 or 10'):
        ask(drawn(local_queries=4), FEATURES[:, :15], MASK[:, :15], local_queries=4)
    run = config.Run('stage1', network().config, objective=config.Objective(static_queries=1.0))
    with pytest.raises(UserError, match='static-queries trains the bank'):
        loop.check(run)
