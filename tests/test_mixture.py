"""Several data sets as one: shares, order, resuming, hosts, identity, validation, and what is refused."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from data_sets import feature_record, record
from small import change, recipe, write_recipe
from test_data_pipeline import run, same

from qformer_jax import cli, config
from qformer_jax.config import VitConfig
from qformer_jax.data import mixture
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.encoder import Encoder
from qformer_jax.data.pack import BYTE_BPE, WORDPIECE, pack
from qformer_jax.data.pipeline import batches
from qformer_jax.errors import UserError
from qformer_jax.runs import run_dir
from qformer_jax.training import language_model, logs, loop
from qformer_jax.training.stages import STAGES

LARGE, SMALL = 25, 9  # 5/8 and 3/8


def tokenizers(folder) -> dict:
    return {'text_tokenizer': folder / WORDPIECE, 'lm_tokenizer': folder / BYTE_BPE}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Packed data sets: `large`, `small` and `twin` go together, each other one differs from `large` in one thing."""
    out = tmp_path_factory.mktemp('mixture')
    arrays = lambda *numbers: [feature_record(n) for n in range(*numbers)]  # noqa: E731
    pack({'train': arrays(LARGE), 'test': arrays(8)}, out / 'large')
    shared = tokenizers(out / 'large')
    pack({'train': arrays(100, 100 + SMALL), 'test': arrays(8, 16)}, out / 'small', **shared)
    pack({'train': arrays(200, 200 + LARGE)}, out / 'twin', **shared)
    pack({'train': arrays(3, 9)}, out / 'words')
    pack({'train': [record(n) for n in range(8)]}, out / 'pictures', **shared)
    wide = [dataclasses.replace(r, features=np.ones((2, 5), np.float32)) for r in arrays(8)]
    pack({'train': wide}, out / 'wide', **shared)
    encoder = Encoder('runs/x', 'digest', VitConfig(), 'float32')
    pack({'train': arrays(8)}, out / 'seen', **shared, encoder=encoder)
    return out


def opened(folder, *names) -> Dataset:
    return mixture.join([Dataset.open(folder / name) for name in names])


def mixed(folder, count, *, names=('large', 'small'), training=True, shard=(0, 1)) -> list[dict]:
    """Return the first `count` batches of stage 1, 8 rows together on all hosts."""
    of = run(folder / 'large', vit=None, batch=8)
    given = of, STAGES[of.stage].row_format, opened(folder, *names), 'train'
    return list(itertools.islice(batches(*given, training=training, shard=shard), count))


def image_ids(found: list[dict]) -> list[int]:
    return np.concatenate([batch['image_id'] for batch in found]).tolist()


def test_shares_are_those_of_instructblip():
    np.testing.assert_allclose(mixture.shares([900, 100]), [0.75, 0.25])
    np.testing.assert_allclose(mixture.shares([7]), [1.0])
    np.testing.assert_allclose(mixture.shares([1, 4, 9]), [1 / 6, 2 / 6, 3 / 6])


def test_rows_come_in_their_shares_and_every_set_has_epochs_of_its_own(folder):
    ids = image_ids(mixed(folder, 100))
    rows, share = len(ids), mixture.shares([LARGE, SMALL])[1]
    small = [n for n in ids if n >= LARGE]
    assert abs(len(small) - rows * share) < 3 * np.sqrt(rows * share * (1 - share))
    assert abs(len(small) / rows - share) < 0.01  # by turns, so better than drawing
    for part, numbers in (([n for n in ids if n < LARGE], range(LARGE)), (small, range(LARGE, LARGE + SMALL))):
        length = len(numbers)
        whole = [tuple(part[i : i + length]) for i in range(0, len(part) - length + 1, length)]
        assert len(whole) > 10
        assert all(sorted(epoch) == list(numbers) for epoch in whole)
        assert len(set(whole)) == len(whole)


def test_sets_of_one_size_have_orders_of_their_own(folder):
    ids = image_ids(mixed(folder, 6, names=('large', 'twin')))
    assert [n for n in ids if n < LARGE] != [n - LARGE for n in ids if n >= LARGE]


def test_image_id_tells_the_sets_apart_and_names_the_record(folder):
    values = {}
    for batch in mixed(folder, 30):
        for number, features in zip(batch['image_id'].tolist(), batch['features'], strict=True):
            values.setdefault(number, set()).add(float(features[0, 0]))
    assert values == {n: {n + 1.0} for n in range(LARGE)} | {LARGE + n: {n + 101.0} for n in range(SMALL)}


def test_a_mixture_of_one_is_the_data_set(folder):
    of, alone = run(folder / 'large', vit=None, batch=8), Dataset.open(folder / 'large')
    plain = itertools.islice(batches(of, STAGES[of.stage].row_format, alone, 'train', training=True), 8)
    assert all(map(same, mixed(folder, 8, names=('large',)), plain))
    assert opened(folder, 'large').fingerprint == alone.fingerprint


def test_it_resumes_exactly(folder):
    of, dataset = run(folder / 'large', vit=None, batch=8), opened(folder, 'large', 'small')
    iterator = batches(of, STAGES[of.stage].row_format, dataset, 'train', training=True)
    for _ in range(7):
        next(iterator)
    state, want = iterator.get_state(), [next(iterator) for _ in range(9)]
    other = batches(of, STAGES[of.stage].row_format, dataset, 'train', training=True)
    next(other)
    other.set_state(state)
    assert all(same(batch, next(other)) for batch in want)


@pytest.mark.parametrize('training', [True, False])
def test_two_hosts_share_the_rows_of_one(folder, training):
    one = mixed(folder, 12, training=training)
    hosts = [mixed(folder, 12, training=training, shard=(i, 2)) for i in range(2)]
    for whole, *halves in zip(one, *hosts, strict=True):
        for i, half in enumerate(halves):
            assert same({key: value[i::2] for key, value in whole.items()}, half)


def test_without_training_the_sets_take_turns(folder):
    found = mixed(folder, 5, training=False)
    assert image_ids(found[:3]) == [*range(8), *range(LARGE, LARGE + 8), *range(8, 16)]
    assert image_ids([found[3]]) == list(range(LARGE, LARGE + 8))  # one batch of 8 in 9 records


def test_the_fingerprint_covers_every_set(folder):
    sets = [('large',), ('small',), ('large', 'small'), ('small', 'large')]
    assert len({opened(folder, *names).fingerprint for names in sets}) == len(sets)


@pytest.mark.parametrize(
    'other, message',
    [
        ('large', r'large is among the data sets already'),
        (
            'words',
            r'words and .*large have different tokenizers \(wordpiece.json\).*-tokenizer .*large/wordpiece',
        ),
        ('pictures', r'large holds features of width 4, .*pictures holds pictures'),
        ('wide', r'wide holds features of width 5'),
        ('seen', r'from different towers'),
        ('smal', r"no such folder \(nearest: '.*small'\)"),
    ],
)
def test_sets_that_do_not_go_together_are_refused(folder, other, message):
    with pytest.raises(UserError, match=message):
        opened(folder, 'large', other)


def test_a_batch_that_a_set_cannot_fill_is_refused(folder):
    with pytest.raises(UserError, match=r'batch_size 40 exceeds the 9 records .* in .*small'):
        of = run(folder / 'large', vit=None, batch=40)
        batches(of, STAGES[of.stage].row_format, opened(folder, 'large', 'small'), 'train', training=True)


def test_a_pretrained_language_models_tokenizer_serves_every_set(folder):
    """The sets' own byte BPEs are then read by nobody, and may differ."""
    file = folder / 'words' / BYTE_BPE
    parts = [dataclasses.replace(Dataset.open(folder / name), lm_file=file) for name in ('large', 'small')]
    assert mixture.join(parts).tokenizer_files[BYTE_BPE] == file


def test_a_run_over_two_sets_trains_and_says_how_each_does(folder, tmp_path):
    of = change(recipe('language', folder / 'large', steps=4), 'data', validation_split='test')
    of = change(change(of, 'optimizer', warmup_steps=1), 'training', validation_batches=1)
    words = ('train', write_recipe(tmp_path / 'mine.py', of), '--run', tmp_path / 'run')
    cli.run([*map(str, words), '--data.mixed-with', str(folder / 'small')])
    (last,) = (r for r in logs.records(tmp_path / 'run') if r['kind'] == 'validation')
    assert last['loss_of_set_1'] != last['loss_of_set_2']
    np.testing.assert_allclose(last['loss'], (last['loss_of_set_1'] + last['loss_of_set_2']) / 2)
    done = run_dir.finished(tmp_path / 'run')
    assert done.run.data.mixed_with == (str(folder / 'small'),)
    assert done.inputs['data'] == opened(folder, 'large', 'small').fingerprint
    assert loop.train(done.run, tmp_path / 'run').last == done.last


def test_where_the_sets_lie_is_no_part_of_a_runs_fingerprint(folder):
    of = change(recipe('language', folder / 'large'), 'data', mixed_with=(str(folder / 'small'),))
    inputs = {'data': language_model.open_dataset(of).fingerprint}
    moved = change(of, 'data', path='elsewhere', mixed_with=('there',))
    assert run_dir.fingerprint(of, inputs) == run_dir.fingerprint(moved, inputs)


def test_a_run_json_without_the_field_is_a_run_over_one_set(folder):
    tree = json.loads(config.to_json(recipe('stage1', folder / 'large')))
    del tree['data']['mixed_with']
    assert config.from_json(json.dumps(tree)) == recipe('stage1', folder / 'large')
