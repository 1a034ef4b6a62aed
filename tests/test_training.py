"""Training does what its configuration says: what learns, at which rate, from where, and what stops it."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from small import STAGES, change, recipe, without_tower

from qformer_jax import config, recipes
from qformer_jax.data import pipeline
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.pack import pack
from qformer_jax.data.records import Record
from qformer_jax.errors import UserError
from qformer_jax.models import blip2
from qformer_jax.parallel.mesh import data_mesh, put_batch
from qformer_jax.rules import flatten, match, split
from qformer_jax.runs import run_dir, weight_store
from qformer_jax.training import init_params, logs, loop, optimizer, stages, step

RULES = Path(__file__).parent / 'goldens' / 'parameter_rules.txt'
PART_OF = {'stage1': ('vit', 'qformer'), 'stage2': ('vit', 'qformer', 'lm', 'lm_projection')}
PART_OF['instruct_lora'] = (*PART_OF['stage2'], 'lora')


def logged(folder: Path) -> list[float]:
    return [record['loss'] for record in logs.records(folder) if record['kind'] == 'train']


@pytest.mark.parametrize('stage', STAGES)
def test_every_stage_learns_a_handful_of_pairs(line, stage):
    found = logged(line / stage)
    assert len(found) == small.STEPS
    assert np.mean(found[-10:]) < 0.6 * found[0]


def test_the_vision_stage_reaches_the_entropy_of_its_targets(line):
    """A caption of three words has the target 1/3 each: no loss below ln 3."""
    found = logged(line / 'vision')
    assert np.log(3) <= min(found) and found[-1] < np.log(3) + 0.2


@pytest.mark.parametrize('stage, before', [('stage1', 'vision'), ('stage2', 'stage1'), ('instruct', 'stage2')])
def test_only_trainable_parameters_change_and_frozen_ones_stay_byte_for_byte(line, stage, before):
    done = run_dir.finished(line / stage)
    earlier = run_dir.load_components(run_dir.finished(line / before))
    if stage == 'stage2':
        earlier |= run_dir.load_components(run_dir.finished(line / 'language'))
    later = run_dir.load_components(done)
    if stage == 'stage1':
        fresh = blip2.init(blip2.Blip2Module(done.run.model), jax.random.key(done.run.training.seed))
        earlier |= {'qformer': fresh['qformer']}
    trains = match(done.run.optimizer.rate_rules, flatten(later))
    earlier, later = flatten(earlier), flatten(later)
    for path in earlier.keys() & later.keys():
        same = np.asarray(earlier[path]).tobytes() == later[path].tobytes()
        assert same == (trains[path] is None), path
    assert {rate is None for rate in trains.values()} == {True, False}
    frozen = json.loads((line / stage / 'finished.json').read_text())['frozen']
    assert frozen['before'] == frozen['after']


def test_frozen_components_keep_their_digest_and_lie_on_the_disk_once(line):
    digests = {stage: run_dir.finished(line / stage).last for stage in STAGES}
    assert len({digests[stage]['vit'] for stage in ('vision', 'stage1', 'stage2', 'instruct')}) == 1
    assert len({digests[stage]['lm'] for stage in ('language', 'stage2', 'instruct')}) == 1
    assert len({digests[stage]['qformer'] for stage in ('stage1', 'stage2', 'instruct')}) == 3


def test_rules_of_every_parameter():
    """Each line: path, weight decay or not, and the multiple of the learning rate in each recipe of the line."""
    shapes = flatten(blip2.shapes(reference_model()))
    names = (
        'easy_vqa_stage1',
        'easy_vqa_stage2',
        'easy_vqa_instruct',
        'easy_vqa_instruct_aware',
        'easy_vqa_instruct_lora',
    )
    rates = [match(recipes.load(name)[0].optimizer.rate_rules, rate_paths(name, shapes)) for name in names]
    decays = match(optimizer.DECAY_RULES, shapes)
    rows = [['parameter', 'decay', *(name.removeprefix('easy_vqa_') for name in names)]]
    for path in shapes:
        shown = [{None: 'frozen', 'absent': '-'}.get(r.get(path, 'absent'), str(r.get(path))) for r in rates]
        rows.append([path, 'decay' if decays[path] else 'none', *shown])
    text = ''.join(f'{r[0]:52} ' + ' '.join(f'{cell:8}' for cell in r[1:]).rstrip() + '\n' for r in rows)
    if not RULES.exists():
        RULES.write_text(text)
        pytest.fail(f'{RULES.name} did not exist and was written: read it and commit it')
    assert text == RULES.read_text(), (
        f'a parameter gets another rate or decay. If that is meant, delete tests/goldens/{RULES.name} and run this once'
    )


def reference_model() -> config.Blip2Config:
    """Return the tiny model of all parts, with sizes where the recipes leave 0."""
    return config.Blip2Config(
        small.VIT,
        dataclasses.replace(small.QFORMER, feature_width=16, vocab_size=40),
        dataclasses.replace(small.OPT, vocab_size=300),
        config.LoraConfig(),
    )


def rate_paths(name: str, shapes: dict) -> list[str]:
    """Return the paths that a recipe's run has."""
    parts = PART_OF.get(name.removeprefix('easy_vqa_'), PART_OF['stage2'])
    return [path for path in shapes if path.split('/')[0] in parts]


def test_rates_are_multiplied_and_decay_follows_the_path():
    """With zero gradients AdamW only decays: p -> p * (1 - rate * multiple * decay), and vectors stay."""
    params = {'vit': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}, 'qformer': {'query_token': jnp.ones((2, 2))}}
    o = config.Optimizer(
        peak_rate=0.1, final_rate=0.1, warmup_start=0.1, warmup_steps=1, weight_decay=0.5,
        rate_rules=(('vit/.*', 0.2), ('.*', 1.0)),
    )  # fmt: skip
    constants = optimizer.Constants.of(o)
    state = optimizer.init(constants, params, optimizer.rates(o, 10))
    updates, _ = optimizer.make(constants, params).update(jax.tree.map(jnp.zeros_like, params), state, params)
    new = flatten(optax.apply_updates(params, updates))
    for path, expected in {'vit/kernel': 0.99, 'vit/bias': 1.0, 'qformer/query_token': 0.95}.items():
        np.testing.assert_allclose(new[path], expected, rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm_only_when_asked():
    params = {'kernel': jnp.ones((2, 2))}
    grads = {'kernel': jnp.full((2, 2), 50.0)}  # norm 100
    for clip_norm, expected in ((1.0, 0.5), (0.0, 50.0)):
        o = config.Optimizer(clip_norm=clip_norm)
        constants = optimizer.Constants.of(o)
        state = optimizer.init(constants, params, optimizer.rates(o, 10_000))
        _, state = optimizer.make(constants, params).update(grads, state, params)
        moment = optax.tree.get(state, 'mu')['kernel']
        np.testing.assert_allclose(moment, expected * (1 - o.beta1), rtol=1e-5)


def test_the_papers_schedule_warms_up_and_ends_at_its_final_rate():
    rate = optimizer.schedule(config.Optimizer(peak_rate=1.0, final_rate=0.1, warmup_steps=10), 110)
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 60, 110)], [0, 0.5, 1, 0.55, 0.1], atol=1e-6)


def first_batch(run: config.Run) -> dict[str, np.ndarray]:
    row_format, dataset = stages.STAGES[run.stage].row_format, Dataset.open(run.data.path)
    return next(pipeline.batches(run, row_format, dataset, 'train', training=True))


def test_accumulation_is_the_whole_batch(pictures):
    """Rows of different lengths, so that a mean of means would be another number."""
    run = init_params.complete(recipe('stage2', pictures), Dataset.open(pictures))
    run = change(run, 'data', max_lm_text=12)
    batch = first_batch(run)
    keep = np.array([1, 2, 3, 4, 5, 5, 5, 5])
    batch['lm_target'] &= np.arange(12)[None] < keep[:, None]
    results = [one_step(change(run, 'training', accumulate=parts), batch) for parts in (1, 2)]
    for state, metrics in results[1:]:
        np.testing.assert_allclose(metrics['loss'], results[0][1]['loss'], rtol=1e-6)
        np.testing.assert_allclose(metrics['gradient_norm'], results[0][1]['gradient_norm'], rtol=1e-5)
        for path, moment in flatten(optax.tree.get(state.optimizer, 'mu')).items():
            expected = flatten(optax.tree.get(results[0][0].optimizer, 'mu'))[path]
            np.testing.assert_allclose(moment, expected, atol=1e-6, err_msg=path)


def one_step(run: config.Run, batch: dict) -> tuple[step.State, dict]:
    """Return state and metrics after one step from the run's initial parameters."""
    advance, arguments = first_step(run, batch)
    with jax.set_mesh(data_mesh(1)):
        return advance(*arguments)


def first_step(run: config.Run, batch: dict) -> tuple[Callable, tuple]:
    """Return the jitted step, and what the first one is given."""
    mesh = data_mesh(1)
    with jax.set_mesh(mesh):
        params = blip2.init(blip2.Blip2Module(run.model), jax.random.key(0))
        trainable, frozen = split(params, run.optimizer.rate_rules)
        state = step.new_state(trainable, run)
        return step.train_step, (step.Program.of(run), mesh, state, frozen, put_batch(mesh, batch))


def test_accumulation_is_refused_where_it_would_take_negatives_away(pictures, tmp_path):
    run = change(recipe('stage1', pictures), 'training', accumulate=2)
    with pytest.raises(UserError, match=r'accumulate must be 1 in stage1: .*negatives'):
        loop.train(run, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def feature_data(folder: Path, poisoned: range) -> Path:
    """Pack 8 feature arrays; those in `poisoned` are NaN, which a folder of files would be refused for."""
    pack({'train': [one_array(n, np.nan if n in poisoned else 1.0) for n in range(8)]}, folder)
    return folder


def poisoned_run(data: Path) -> config.Run:
    return change(without_tower(recipe('stage2', data, steps=6)), 'training', batch_size=4)


def one_array(number: int, value: float) -> Record:
    array = np.random.default_rng(number).normal(size=(2, 6)).astype(np.float32) * np.float32(value)
    return Record(image_id=f'{number}', features=array, captions=(f'number {number}',))


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, capsys):
    data = feature_data(tmp_path / 'data', range(1))
    run = poisoned_run(data)
    done = loop.train(run, tmp_path / 'run')
    records = logs.records(tmp_path / 'run')
    bad = [r['loss'] is None for r in records]
    assert sum(bad) == 3, 'each epoch of two batches meets the poisoned array once'
    first = json.loads((tmp_path / 'run' / 'skipped.json').read_text())
    assert first['step'] == bad.index(True) + 1 and '0' in first['records'] and len(first['records']) == 4
    said = capsys.readouterr().err
    assert (
        f'3 of 6 steps were skipped, since their gradients were not finite; the first was step {first["step"]}' in said
    )
    assert f'of the records {", ".join(first["records"])} ({tmp_path / "run" / "skipped.json"})' in said
    assert [r['skipped'] for r in records] == np.cumsum(bad).tolist()
    assert all(np.isfinite(x).all() for x in flatten(run_dir.load_components(done)).values())


def test_too_many_skipped_steps_stop_the_run_naming_a_tensor(tmp_path):
    data = feature_data(tmp_path / 'data', range(8))
    run = change(poisoned_run(data), 'training', max_skipped=2)
    with pytest.raises(
        UserError,
        match=r"step 3: 3 steps .*max-skipped is 2\); first bad tensor: 'lm_projection/.*'; the first was step 1, of",
    ):
        loop.train(run, tmp_path / 'run')
    assert len(logs.records(tmp_path / 'run')) == 3


def test_bfloat16_holds_frozen_weights_and_trains_in_float32(pictures, line, tmp_path, monkeypatch):
    captured = {}
    real = step.train_step

    def spy(program, mesh, state, frozen, batch):
        new, metrics = real(program, mesh, state, frozen, batch)
        captured.update(state=new, frozen=frozen, metrics=metrics)
        return new, metrics

    monkeypatch.setattr(step, 'train_step', spy)
    run = change(recipe('instruct', pictures, steps=6), 'training', dtype='bfloat16')
    done = loop.train(dataclasses.replace(run, start=config.Start(checkpoint=str(line / 'stage2'))), tmp_path / 'run')
    assert {x.dtype for x in jax.tree.leaves(captured['frozen'])} == {jnp.dtype('bfloat16')}
    assert {x.dtype for x in jax.tree.leaves(captured['state'].trainable)} == {jnp.dtype('float32')}
    moments = optax.tree.get(captured['state'].optimizer, 'mu'), optax.tree.get(captured['state'].optimizer, 'nu')
    assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype('float32')}
    assert captured['metrics']['loss'].dtype == jnp.float32 and np.isfinite(captured['metrics']['loss'])
    frozen_before = flatten(run_dir.load_components(run_dir.finished(line / 'stage2'))['qformer'])
    frozen_after = flatten(run_dir.load_components(done)['qformer'])
    np.testing.assert_array_equal(frozen_after['word_embedding'], frozen_before['word_embedding'])
    assert frozen_after['word_embedding'].dtype == np.float32, 'stored from where it came, not as a bfloat16 copy'


@pytest.mark.parametrize('stage', small.STAGES)
def test_a_second_training_of_the_same_shape_compiles_nothing(stage, pictures, tmp_path):
    """Other folder, other seed, other learning rates: all of them are data, and the programs are there."""
    jax.clear_caches()  # of tests before this one
    run = change(recipe(stage, pictures, steps=8), 'data', validation_split='test')
    first, again, wider = tmp_path / 'first', tmp_path / 'again', tmp_path / 'wider'
    with compiled() as programs:
        loop.train(change(run, 'training', checkpoint_every=4), first)
    assert {'jit(train_step)', 'jit(evaluation_step)'} <= set(programs)
    other = change(change(run, 'training', checkpoint_every=4, seed=7), 'optimizer', peak_rate=3e-3, warmup_steps=2)
    with compiled() as programs:
        loop.train(other, again)
    assert not programs
    with compiled() as programs:
        loop.train(change(run, 'training', batch_size=16), wider)
    assert 'jit(train_step)' in programs


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """Collect the names of the programs that are compiled inside, or taken from the compilation cache."""
    names = []

    def note(event: str, seconds: float, fun_name: str = '', **_) -> None:
        if event.endswith('backend_compile_duration'):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_runs_that_differ_in_their_rates_share_one_program(pictures):
    """A search over rates finds the program in the compilation cache."""
    run = init_params.complete(recipe('stage1', pictures), Dataset.open(pictures))
    batch = first_batch(run)
    changes = {}, {'peak_rate': 3e-4, 'final_rate': 1e-5, 'warmup_steps': 2}, {'weight_decay': 0.5}
    programs = []
    for each in changes:
        advance, arguments = first_step(change(run, 'optimizer', **each), batch)
        with jax.set_mesh(data_mesh(1)):
            programs.append(advance.lower(*arguments).as_text())
    assert programs[0] == programs[1] != programs[2]


def test_components_come_from_checkpoint_then_pretrained_then_scratch(pictures, line, tmp_path, capsys):
    """`start.vit` names a tower that the checkpoint holds too: the checkpoint wins."""
    begun = dataclasses.replace(
        recipe('stage2', pictures, steps=6),
        start=config.Start(checkpoint=str(line / 'stage1'), vit=str(line / 'vision'), lm=str(line / 'language')),
    )
    loop.train(begun, tmp_path / 'run')
    said = capsys.readouterr().err
    expected = {
        'lm': f'pretrained {line / "language"}',
        'lm_projection': 'scratch',
        'qformer': f'checkpoint {line / "stage1"}',
        'vit': f'checkpoint {line / "stage1"}',
    }
    for name, source in expected.items():
        assert f'  {name:14} from {source}\n' in said
    loop.train(begun, tmp_path / 'run')
    assert 'is finished already: nothing to do' in capsys.readouterr().err


def test_a_resumed_run_says_so_and_takes_nothing_else(pictures, tmp_path, capsys):
    run = change(recipe('language', pictures, steps=6), 'training', checkpoint_every=2)
    loop.train(run, tmp_path / 'run')
    (tmp_path / 'run' / run_dir.FINISHED).unlink()
    before = logged(tmp_path / 'run')
    capsys.readouterr()
    loop.train(run, tmp_path / 'run')
    said = capsys.readouterr().err
    assert 'resumed from the checkpoint of step 6' in said and 'scratch' not in said
    assert logged(tmp_path / 'run') == before


def test_a_fresh_projection_is_as_large_as_the_tokens_of_a_pretrained_language_model(pictures, line):
    run = init_params.complete(recipe('stage2', pictures), Dataset.open(pictures))
    starts = config.Start(checkpoint=str(line / 'stage1'), lm=str(line / 'language'))
    run = dataclasses.replace(run, start=starts)
    params, _ = init_params.parameters(run, init_params.inputs_of(run, Dataset.open(pictures)))
    kernel, table = params['lm_projection']['kernel'], params['lm']['word_embedding']
    inputs = jax.random.normal(jax.random.key(0), (200, kernel.shape[0]))
    assert 0.7 < (inputs @ kernel).std() / table.std() < 1.4


def test_a_checkpoint_of_other_sizes_is_refused_with_both_sides(pictures, line, tmp_path):
    run = recipe('stage2', pictures)
    run = change(run, 'model', qformer=dataclasses.replace(run.model.qformer, num_queries=5))
    run = dataclasses.replace(run, start=config.Start(checkpoint=str(line / 'stage1'), lm=str(line / 'language')))
    with pytest.raises(UserError, match=r"another configuration of 'qformer': .*\(4, 16\) there, \(5, 16\) here"):
        loop.train(run, tmp_path / 'run')


def test_a_run_that_trains_nothing_is_refused(pictures, tmp_path):
    run = change(recipe('language', pictures), 'optimizer', rate_rules=(('.*', None),))
    with pytest.raises(UserError, match='freeze every parameter'):
        loop.train(run, tmp_path / 'run')


def test_a_warm_up_longer_than_the_run_is_refused(pictures, tmp_path):
    with pytest.raises(UserError, match=r'warmup-steps 5 must be below training.steps 5'):
        loop.train(recipe('language', pictures, steps=5), tmp_path / 'run')


def test_a_run_may_start_from_runs_elsewhere(pictures, line, tmp_path):
    """Its own store then holds every component, so that it can be loaded without theirs."""
    run = dataclasses.replace(
        recipe('instruct', pictures, steps=6), start=config.Start(checkpoint=str(line / 'stage2'))
    )
    done = loop.train(run, tmp_path / 'elsewhere' / 'run')
    stored = {path.stem for path in (tmp_path / 'elsewhere' / 'weights').glob('*.safetensors')}
    assert set(done.last.values()) <= stored
    assert done.last['vit'] == run_dir.finished(line / 'stage2').last['vit']


def test_damaged_weights_are_refused_by_name(pictures, line, tmp_path):
    done = run_dir.finished(line / 'vision')
    copy = tmp_path / 'weights'
    digest = weight_store.save(copy, run_dir.load_components(done)['vit'])
    file = copy / f'{digest}.safetensors'
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match='damaged'):
        weight_store.load(copy, digest)
