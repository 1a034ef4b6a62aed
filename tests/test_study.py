"""The studies of connectors: every cell is a run that may begin, texts fit the language model, tables say what is."""

import dataclasses
import json
import shutil
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest
import small

from experiments import nested, sweep
from experiments.ablations import minilm, prepare
from experiments.ablations.variants import VARIANTS as ABLATIONS
from experiments.connectors import cost, language, report, study
from experiments.connectors import prepare as connectors_prepare
from experiments.connectors.cell import Budget, Cell
from experiments.connectors.variants import VARIANTS, Variant
from qformer_jax import config
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.tokenizers import train_wordpiece
from qformer_jax.errors import UserError
from qformer_jax.evaluation import task
from qformer_jax.models import blip2
from qformer_jax.rules import flatten, match, split
from qformer_jax.runs import run_dir
from qformer_jax.training import init_params, loop

EVERY = (*VARIANTS, *ABLATIONS)


@pytest.mark.parametrize('variant', EVERY, ids=lambda variant: variant.name)
def test_every_cell_is_a_run_that_may_begin(variant: Variant, monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(loop, 'train', lambda run, folder: begun.append(run) or loop.check(run))
    cell = Cell(tmp_path, variant, 0, Budget())
    if variant.stage1:
        cell.stage1(1e-3)
    aligned = _finished(cell.folder / 'stage1_0.001') if variant.stage1 else None
    cell.instruct(1e-3, aligned)
    assert [run.stage for run in begun] == ['stage1', 'instruct'][not variant.stage1 :]
    assert begun[-1].start.checkpoint == (str(cell.folder / 'stage1_0.001') if variant.stage1 else '')


def test_features_in_other_words(arrays, tmp_path):
    """The arrays are linked, not copied; the Q-Former's words are others, the language model's are not."""
    for name in ('icons', 'canvases', 'easy_vqa'):
        shutil.copytree(arrays, tmp_path / 'features' / name)
    words = tmp_path / 'tokenizer.json'
    train_wordpiece(['entirely other words'], 60).save(str(words))
    options = prepare.Options(tmp_path, tower=tmp_path, blocks=())
    for _ in range(2):
        prepare.in_words_of(options, words)
    before, after = (Dataset.open(tmp_path / folder / 'icons') for folder in ('features', 'features_minilm'))
    assert after.fingerprint != before.fingerprint and after.lm_tokenizer.ids('red') == before.lm_tokenizer.ids('red')
    assert after.text_tokenizer.decode(after.text_tokenizer.encode('other words', 8)[0]) == 'other words'
    assert np.array_equal(after.source('train')[0].features, before.source('train')[0].features)
    assert (after.path / 'index.npz').stat().st_ino == (before.path / 'index.npz').stat().st_ino


def test_variants_that_begin_as_minilm_have_its_sizes():
    recipe = minilm.config().model.qformer
    begun = [v.model.qformer for v in ABLATIONS if v.begins]
    assert begun and all(dataclasses.replace(recipe, vocab_size=0, feature_width=0) == found for found in begun)


@pytest.mark.parametrize('variant', [v for v in EVERY if v.rate_rules], ids=lambda variant: variant.name)
def test_rates_of_a_variant_leave_its_text_side_at_rest(variant: Variant, monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(loop, 'train', lambda run, folder: begun.append(run))
    Cell(tmp_path, variant, 0, Budget()).instruct(1e-3, None)
    paths = 'qformer/layer_0/text_mlp/out/kernel', 'qformer/word_embedding', 'qformer/layer_0/query_mlp/out/kernel'
    text, words, queries = match(begun[0].optimizer.rate_rules, paths).values()
    assert text is None and words is None and 0 < queries < 1


def test_nested_queries_are_drawn(tmp_path):
    measured = dict.fromkeys(nested.MEASURES, 0.5)
    rows = [{'way': way, 'queries': m, 'seed': 0} | measured for way in ('alone', 'nested') for m in (1, 2)]
    nested.draw(rows, tmp_path / 'nested.png')
    assert (tmp_path / 'nested.png').stat().st_size > 1000


def test_names_are_folders_of_their_own():
    folders = {Cell(Path(), variant, 0, Budget()).folder for variant in EVERY}
    assert len(folders) == len(EVERY)


def test_a_search_trains_seed_0_to_the_end_with_each_rate(monkeypatch, tmp_path):
    """What serves best in validation (and not in the test) is what the cell goes on with, and other seeds train.

    Seed 1 asks nothing of seed 0's runs again.
    """
    losses = {'stage1_0.0003': 2.0, 'stage1_0.001': 3.0, 'instruct_0.0005': 9.0, 'instruct_0.002': 1.0}
    right = {'instruct_0.0005': 0.75, 'instruct_0.002': 0.5, 'stage1_0.0003': 0.5}
    trained, served = [], []

    def train(run, folder):
        if folder not in trained:
            trained.append(folder)
            folder.mkdir(parents=True)
            said = {'step': 1, 'kind': 'validation', 'loss': losses[folder.name]}
            (folder / 'log.jsonl').write_text(json.dumps(said) + '\n')
        return _finished(folder)

    def evaluate(folder, name, split, data):
        share = right[folder.name]
        served.extend([folder.name] if split == 'validation' else [])
        return defaultdict(lambda: share if split == 'validation' else 1 - share)

    monkeypatch.setattr(loop, 'train', train)
    monkeypatch.setattr(task, 'evaluate', evaluate)
    monkeypatch.setattr(cost, 'of', lambda run: {})
    for seed in (0, 1):
        found = Cell(tmp_path, VARIANTS[0], seed, Budget()).run()
        assert (found['peak rate of stage 1'], found['peak rate']) == (3e-4, 5e-4)
        assert found['search'] == {'loss of stage 1': {3e-4: 2.0, 1e-3: 3.0}, 'right answers': {5e-4: 0.75, 2e-3: 0.5}}
    assert served == ['instruct_0.0005'] * 3 + ['instruct_0.002'] * 3, 'icons, canvases and easy-VQA'
    places = [str(folder.relative_to(folder.parents[1])) for folder in trained]
    assert places == [*(f'seed0/{name}' for name in losses), 'seed1/stage1_0.0003', 'seed1/instruct_0.0005']


def test_the_table_has_what_is_finished_and_names_what_is_missing(monkeypatch, tmp_path):
    """Of three connectors, one is finished, one is chosen and ends without a result, and one is left for later."""
    variants, options = VARIANTS[:3], study.Options(tmp_path, seeds=(0, 1), only=(VARIANTS[1].name,))
    for seed, row in enumerate(ROWS[:2]):
        cell = Cell(tmp_path, variants[0], seed, options.budget)
        cell.folder.mkdir(parents=True)
        cell.result.write_text(json.dumps(row | COST | {'peak rate': 5e-4}))
    for needed in (*(f'features/{name}' for name in connectors_prepare.DATA), 'runs/language'):
        (tmp_path / needed).mkdir(parents=True)
    begun = []
    monkeypatch.setattr(sweep, 'run_process', lambda options, number, name, words: begun.append(words[4]))
    monkeypatch.setattr(study, 'timed', lambda cell, rate: {'ms a step': 1.0})
    with pytest.raises(SystemExit, match='2 cells are missing'):
        study.run(options, variants, tmp_path)
    assert begun == [variants[1].name]
    assert [json.loads(line)['seed'] for line in (tmp_path / 'results.jsonl').read_text().splitlines()] == [0, 1]


def test_a_second_call_puts_rows_in_place_of_the_first_ones(tmp_path, capsys):
    for share in (0.25, 0.5):
        judge = lambda variant, seed: {'variant': variant, 'seed': seed, 'steps': 9, 'share': share}  # noqa: B023, E731
        sweep.in_turn(judge, ('b', 'a'), (0, 1), tmp_path / 'results.jsonl')
    rows = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert [(row['variant'], row['seed'], row['share']) for row in rows] == [
        ('a', 0, 0.5), ('a', 1, 0.5), ('b', 0, 0.5), ('b', 1, 0.5),
    ]  # fmt: skip
    assert len(capsys.readouterr().out.splitlines()) == 8, 'a line a cell'


@pytest.mark.parametrize(
    ('only', 'said'), [('Q-Fromer', r"nearest: 'Q-Former'.*linear"), ('Q-Former', r"'Q-Former' reads .*icons.*prepare")]
)
def test_a_name_that_is_not_in_the_study_and_data_that_nobody_made(only, said, tmp_path):
    with pytest.raises(UserError, match=said):
        study.run(study.Options(tmp_path, only=(only,)), VARIANTS, tmp_path)


def test_pictures_that_nobody_drew(tmp_path):
    with pytest.raises(UserError, match=r'icons: no train/captions.jsonl.*experiments.datasets.icons.make --out'):
        connectors_prepare.main(connectors_prepare.Options(tmp_path, tmp_path / 'icons', tmp_path / 'canvases'))


def _finished(folder: Path) -> run_dir.Finished:
    return run_dir.Finished(folder, '', config.Run('instruct'), {}, {}, {})


def test_a_step_takes_time_and_holds_what_it_trains(arrays, monkeypatch):
    """One row through a wide language model: its weights are three times what a step computes beside them."""
    monkeypatch.setattr(cost, '_BATCH', 1)
    monkeypatch.setattr(cost, '_SECONDS', 0.0)
    run = init_params.complete(small.without_tower(small.recipe('stage2', arrays)), Dataset.open(arrays))
    run = small.change(run, 'model', lm=dataclasses.replace(run.model.lm, width=256, mlp_width=512))
    params = jax.device_get(blip2.init(blip2.Blip2Module(run.model), jax.random.key(0)))
    found = cost.measured(run, params)
    trained, frozen = (sum(x.nbytes for x in flatten(p).values()) for p in split(params, run.optimizer.rate_rules))
    assert found['ms a step'] > 0 and found['MiB a step'] * 2**20 > 3 * trained + frozen, 'and both moments of AdamW'


def test_places_and_contexts():
    assert language.place((0.0, 0.0, 0.2, 0.2)) == 'row 1 column 1'
    assert language.place((0.8, 0.3, 1.0, 0.5)) == 'row 2 column 4'
    rows = list(language.records(['cat', 'red heart', 'tree', 'dog', 'left arrow'], 200, np.random.default_rng(0)))
    lengths = [len(row['caption'].split()) for row in rows]
    assert min(lengths) <= 3 and 40 < max(lengths) <= 50, 'contexts of all lengths, none that would be cut'
    for row in rows:
        for entry in row['questions']:
            (answer,) = entry['answers']
            assert answer in row['caption'], 'the answer stands in the context'


ROWS = [
    {'variant': 'a', 'seed': 0, 'place': 0.5, 'name, exact match': 0.1, 'easy-VQA': 0.9, 'ITM accuracy': 0.7},
    {'variant': 'a', 'seed': 1, 'place': 0.6, 'name, exact match': 0.1, 'easy-VQA': 0.9, 'ITM accuracy': 0.8},
    {'variant': 'b', 'seed': 0, 'place': 0.55, 'name, exact match': 0.3, 'easy-VQA': 0.8},
    {'variant': 'c', 'seed': 0, 'place': 0.2, 'name, exact match': 0.2, 'easy-VQA': 0.7},
]
COST = {'LLM tokens': 16, 'MFLOP, connector': 3.44, 'MFLOP, LLM': 71.4, 'trained parameters': 99392}


def test_the_table_calls_ties_and_what_is_not_there():
    """c is below a's lowest seed; b is within a's range: a tie; b and c have no text side, and a seed less."""
    head, _, a, b, c = report.table([row | COST for row in ROWS]).splitlines()
    assert head.startswith('| connector | ITM accuracy | name, exact match | place | easy-VQA | LLM tokens |')
    assert '| **55.0%** (50.0 to 60.0) |' in a and '| **55.0%** |' in b and '| 20.0% |' in c
    assert a.startswith('| a |') and b.startswith('| b (1 of 2 seeds) | n/a |')
    assert a.endswith('| 16 | 99,392 | 3.4 | 71 |')


def test_results_are_written_and_drawn(tmp_path):
    files = report.write([row | COST for row in ROWS], tmp_path)
    assert [file.name for file in files] == ['results.jsonl', 'table.md', 'pareto.png']
    assert all(file.stat().st_size > 100 for file in files)
