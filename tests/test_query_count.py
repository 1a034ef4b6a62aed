"""A start with another number of queries: those kept to the bit, copies with noise, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import small

from qformer_jax import cli, config
from qformer_jax.convert.lazy_tensors import in_memory
from qformer_jax.errors import UserError
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.models import blip2, query_count
from qformer_jax.rules import flatten
from qformer_jax.runs import import_export, run_dir
from qformer_jax.training import init_params

TABLE = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
C = config.Blip2Config(None, dataclasses.replace(small.QFORMER, feature_width=6, vocab_size=30, depth=1), lm=None)
RUN = config.Run('stage1', C)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A finished run with 4 queries that learned nothing."""
    folder = tmp_path_factory.mktemp('made') / 'run'
    arrays = flatten(blip2.init(blip2.Blip2Module(C), jax.random.key(0)))
    import_export.import_checkpoint(import_export.Model(RUN, in_memory(arrays), (), ()), folder)
    return folder


def table_of(folder) -> np.ndarray:
    return run_dir.load_components(run_dir.finished(folder))['qformer']['query_token']


def test_fewer_are_the_first_in_an_order():
    np.testing.assert_array_equal(query_count.resize(TABLE, 3), TABLE[:3])
    np.testing.assert_array_equal(query_count.resize(TABLE, 3, np.array([2, 0, 3, 1])), TABLE[[2, 0, 3]])


def test_more_are_copies_in_turn_each_with_noise_of_its_own():
    grown = query_count.resize(TABLE, 10, np.array([2, 0, 3, 1]))
    np.testing.assert_array_equal(grown[:4], TABLE[[2, 0, 3, 1]])
    away = grown[4:] - TABLE[[2, 0, 3, 1, 2, 0]]
    assert 0.8 < away.std() / (0.1 * TABLE.std()) < 1.2
    assert len(np.unique(grown, axis=0)) == 10
    np.testing.assert_array_equal(query_count.resize(TABLE, 10, np.array([2, 0, 3, 1])), grown)


@pytest.mark.parametrize('count', [1, 3, 9])
def test_a_run_becomes_the_start_of_one_with_another_number(made, tmp_path, count):
    cli.run(['convert', str(made), str(tmp_path / 'other'), '--queries', str(count)])
    np.testing.assert_array_equal(table_of(tmp_path / 'other'), query_count.resize(table_of(made), count))
    done = run_dir.finished(tmp_path / 'other')
    assert done.run.model.qformer.num_queries == count
    wanted = dataclasses.replace(RUN, model=done.run.model, start=config.Start(checkpoint=str(tmp_path / 'other')))
    params, sources = init_params.parameters(wanted, {'qformer': done.last['qformer']})
    assert sources['qformer'].startswith('checkpoint')
    np.testing.assert_array_equal(params['qformer']['query_token'], table_of(tmp_path / 'other'))


def test_fewer_from_the_start_are_what_use_takes(made, tmp_path):
    cli.run(['convert', str(made), str(tmp_path / 'few'), '--queries', '2'])
    cut, converted = Blip2.load(made, queries=2), Blip2.load(tmp_path / 'few')
    assert cut.run.model == converted.run.model
    jax.tree.map(np.testing.assert_array_equal, cut.params, converted.params)


def test_an_order_is_read_from_the_file_that_found_it(made, tmp_path):
    np.savez(tmp_path / 'queries.npz', order=np.array([3, 1, 0, 2]))
    words = ['--queries', '2', '--order', str(tmp_path / 'queries.npz')]
    cli.run(['convert', str(made), str(tmp_path / 'best'), *words])
    np.testing.assert_array_equal(table_of(tmp_path / 'best'), table_of(made)[[3, 1]])


@pytest.mark.parametrize(
    'order, says', [(np.arange(5), 'orders 5 queries, but this model has 4'), (None, 'holds no order of queries')]
)
def test_a_file_that_orders_other_queries_is_refused(made, tmp_path, order, says):
    if order is not None:
        np.savez(tmp_path / 'queries.npz', order=order)
    with pytest.raises(UserError, match=says):
        import_export.with_queries(import_export.read([made]), 2, tmp_path / 'queries.npz')


def test_an_order_alone_is_refused(made, tmp_path):
    with pytest.raises(UserError, match='name how many to keep'):
        cli.run(['convert', str(made), str(tmp_path / 'x'), '--order', 'queries.npz'])


def test_a_start_with_another_number_names_the_way_out(made):
    fewer = dataclasses.replace(C, qformer=dataclasses.replace(C.qformer, num_queries=2))
    run = dataclasses.replace(RUN, model=fewer, start=config.Start(checkpoint=str(made)))
    with pytest.raises(UserError, match=rf'query_token: \(4, 16\) .*: qformer convert {made} DEST --queries 2'):
        init_params.parameters(run, {'qformer': run_dir.finished(made).last['qformer']})


def test_what_has_no_queries_is_refused():
    with pytest.raises(UserError, match='no Q-Former'):
        query_count.resized(config.Blip2Config(qformer=None), 2)
