"""The loop: batches in, steps out; everything that can stop it leaves a run that the same command continues.

The metrics of step k are read after step k + 1 was sent to the device, so the device never waits for Python.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from .. import config
from ..atomic import check_writable
from ..data import pipeline
from ..data.dataset import Dataset
from ..errors import Stopped, UserError
from ..lock import one_writer
from ..models.blip2 import shapes
from ..parallel.mesh import check_batch, data_mesh, put_batch, replicated
from ..rules import flatten, split, unflatten
from ..runs import run_dir, weight_store
from ..typing import Params
from . import device_features, first_step, init_params, language_model, skipped_steps, step
from .check import check
from .check_data import check_data
from .checkpoint import Checkpoints
from .checksum import checksum
from .logs import Log, Progress, draw_curves
from .stages import STAGES


def say(line: str) -> None:
    """Print one line of what happens, on standard error."""
    print(line, file=sys.stderr, flush=True)


def train(
    run: config.Run, folder: Path, wait: bool = False, restart: str = '', mesh: Mesh | None = None
) -> run_dir.Finished:
    """Train a run in `folder` to its end, from wherever it stands; returns the finished run.

    `wait`: until another process that trains there has ended. `restart`: the folder's name, to remove another run.
    `mesh`: the devices to train on; default: all.
    Raises UserError for bad input and `Stopped` when a signal asked for an orderly stop.
    """
    check(run)
    alone = one_writer(folder, wait) if jax.process_index() == 0 else contextlib.nullcontext()
    with alone:
        return _train(run, folder, restart, mesh or data_mesh())


def _train(run: config.Run, folder: Path, restart: str, mesh: Mesh) -> run_dir.Finished:
    check_writable(folder.absolute().parent)
    dataset = language_model.open_dataset(run)
    run = init_params.complete(run, dataset)
    check_batch(mesh, run.training.batch_size, run.training.accumulate)
    inputs = init_params.inputs_of(run, dataset)
    if not run_dir.has_begun(folder, run, inputs):
        for line in check_data(run, dataset, mesh.size):
            say(f'  {line}')
        init_params.check_frozen(run, inputs, dataset)
    fingerprint = run_dir.open_run_dir(folder, run, inputs, dataset.tokenizer_files, restart)
    if (folder / run_dir.FINISHED).exists():
        say(f"run '{folder}' ({fingerprint}) is finished already: nothing to do")
        return run_dir.finished(folder, run.model.connector and run.model.connector.module)
    init_params.import_weights(run, inputs, folder)
    say(f"{run.stage}: run '{folder}' ({fingerprint}), {run.training.steps} steps of {run.training.batch_size}, "
        f'{mesh.size} {jax.default_backend()} device(s), seed {run.training.seed}')  # fmt: skip
    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(folder / 'checkpoints')) as checkpoints:
        trainer = _prepare(run, dataset, inputs, mesh, checkpoints, folder)
        with contextlib.closing(Log(folder, int(trainer.state.step))) as log:
            _steps(trainer, log)
        checkpoints.wait()
        done = _finish(trainer)
    if skipped := int(trainer.state.optimizer.total_notfinite):
        say(f'{skipped} of {run.training.steps} steps were skipped, since their gradients were not finite; '
            f'{skipped_steps.first(folder)}')  # fmt: skip
    files = folder / run_dir.FINISHED, draw_curves(folder), folder / run_dir.LOG, folder / 'tensorboard'
    say('wrote ' + ', '.join(map(str, files)))
    return done


@dataclass
class Trainer:
    """What the loop holds between steps; `state` is replaced at each one."""

    run: config.Run
    dataset: Dataset
    inputs: dict[str, str]
    folder: Path
    mesh: Mesh
    program: step.Program
    state: step.State
    frozen: Params
    frozen_checksum: str
    batches: Iterator
    guesses: dict[str, tuple[float, str]]
    """What the losses of the first step would be for a network that knows nothing."""
    features_on_device: device_features.DeviceFeatures | None
    """What the batches leave out; None where they hold everything."""
    checkpoints: Checkpoints


def _prepare(
    run: config.Run, dataset: Dataset, inputs: dict[str, str], mesh: Mesh, checkpoints: Checkpoints, folder: Path
) -> Trainer:
    """Build parameters, optimizer, data and state, and resume if there is a checkpoint; says where each came from."""
    params, sources = init_params.parameters(run, inputs)
    trainable, frozen = split(params, run.optimizer.rate_rules)
    if not flatten(trainable):
        raise UserError('optimizer.rate-rules freeze every parameter: nothing to train')
    if 'lora' in params and 'lm' in trainable:
        raise UserError(
            "model.lora needs a frozen language model, and optimizer.rate-rules train it: add ('lm/.*', None)"
        )
    dtype = np.dtype(jax.numpy.dtype(run.training.dtype))
    frozen = jax.device_put(jax.tree.map(lambda x: np.asarray(x, dtype), frozen), replicated(mesh))
    trainable = jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float32), trainable), replicated(mesh))
    state = jax.device_put(step.new_state(trainable, run), replicated(mesh))
    shard = (jax.process_index(), jax.process_count())
    features_on_device = device_features.load(run, dataset, mesh) if device_features.fits(run, dataset) else None
    options = {'training': True, 'shard': shard, 'features': features_on_device is None}
    batches = pipeline.batches(run, STAGES[run.stage].row_format, dataset, run.data.train_split, **options)
    resumed = checkpoints.restore(jax.tree.map(_abstract, state), batches)
    if resumed:
        state = resumed[0]
        say(f'resumed from the checkpoint of step {resumed[1]}')
    else:
        for name, source in sources.items():
            say(f'  {name:14} from {source}')
        for name in init_params.unused_components(run):
            say(f'  {name:14} stays behind in {run.start.checkpoint}: this model has none')
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (trainable, frozen)]
    say(f'  {sizes[0]:,} parameters train, {sizes[1]:,} are frozen')
    program = step.Program.of(run)
    return Trainer(
        run,
        dataset,
        inputs,
        folder,
        mesh,
        program,
        state,
        frozen,
        checksum(frozen),
        batches,
        {} if resumed else first_step.expected(run, sources),
        features_on_device,
        checkpoints,
    )


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _steps(trainer: Trainer, log: Log) -> None:
    """Run from the state's step to the last one."""
    run, total = trainer.run, trainer.run.training.steps
    names = list(flatten(trainer.state.trainable))
    first = int(trainer.state.step)
    pending = None
    with Progress(run.stage, total, first) as progress, _signals() as stop:
        for number in range(first + 1, total + 1):
            began = time.perf_counter()
            rows = next(trainer.batches)
            if number == 1:
                _say_before(trainer, rows)
            batch = put_batch(trainer.mesh, rows)
            batch = trainer.features_on_device.join(batch) if trainer.features_on_device else batch
            waited = time.perf_counter() - began
            trainer.state, metrics = step.train_step(
                trainer.program, trainer.mesh, trainer.state, trainer.frozen, batch
            )
            if pending:
                _record(trainer, log, progress, names, *pending)
            timing = {'data_wait': waited, 'seconds': time.perf_counter() - began}
            pending = (number, metrics, timing, rows['image_id'])
            due = number % run.training.checkpoint_every == 0 or number == total
            if due or stop:
                _record(trainer, log, progress, names, *pending)
                pending = None
                _save(trainer, log, number, validate=due)
            trainer.checkpoints.poll()
            if stop and number < total:
                trainer.checkpoints.wait()
                raise Stopped(f'{stop[0]}: stopped after step {number} of {total}; the same command continues')


def _say_before(trainer: Trainer, rows: dict[str, np.ndarray]) -> None:
    """Say what the first step can be judged by."""
    if STAGES[trainer.run.stage].needs_negatives:
        say(first_step.say_negatives(trainer.run, rows))
    if trainer.guesses:
        say(first_step.say_expected(trainer.guesses))


def _record(
    trainer: Trainer, log: Log, progress: Progress, names: list[str], number: int, metrics, timing, ids: np.ndarray
) -> None:
    """Fetch one step's metrics, write and show them; raises UserError when too many steps were not finite.

    `ids` are the positions of the step's records.
    """
    metrics = jax.device_get(metrics)
    nonfinite = metrics.pop('bad')
    skipped = int(metrics['skipped'])
    values = {name: float(value) for name, value in metrics.items()}
    log.write(number, 'train', values, timing)
    if number == 1 and trainer.guesses:
        say(first_step.say_seen(trainer.guesses, values))
    if nonfinite.any():
        skipped_steps.note(
            trainer.folder, number, pipeline.names(trainer.dataset, trainer.run.data.train_split, ids.tolist())
        )
    rate = trainer.run.training.batch_size / timing['seconds']
    progress.update(number, values['loss'], rate, timing['data_wait'] / timing['seconds'])
    if skipped > trainer.run.training.max_skipped:
        culprit = names[int(np.argmax(nonfinite))] if nonfinite.any() else 'none this step'
        raise UserError(
            f'step {number}: {skipped} steps had gradients that are not finite (training.max-skipped is '
            f"{trainer.run.training.max_skipped}); first bad tensor: '{culprit}'; "
            f'{skipped_steps.first(trainer.folder)}'
        )


def _save(trainer: Trainer, log: Log, number: int, validate: bool) -> None:
    """Compute the validation losses (at the regular steps), then start saving."""
    info = {'step': number, 'validation_loss': None}
    if validate and trainer.run.data.validation_split:
        values = validation(trainer)
        log.write(number, 'validation', values, {})
        info['validation_loss'] = values['loss']
    trainer.checkpoints.save(number, trainer.state, trainer.batches, info)


def validation(trainer: Trainer) -> dict[str, float]:
    """Return the mean metrics over the first batches of the validation split, always the same ones.

    Where several data sets are mixed, each gives as many batches, and `loss_of_set_N` is the mean of the Nth alone: a
    mean over all says little when a set of easy captions stands beside one of hard questions.
    """
    run, parts, split = trainer.run, len(trainer.dataset.parts), trainer.run.data.validation_split
    shard, devices = (jax.process_index(), jax.process_count()), trainer.mesh.size
    options = {'training': False, 'shard': shard, 'devices': devices}
    given = run, STAGES[run.stage].row_format, trainer.dataset, split
    batches, sizes = pipeline.batches(*given, **options), pipeline.held_out_sizes(*given, devices)
    key = jax.random.key(run.training.seed)
    rows = []
    for n in range(run.training.validation_batches * parts):
        batch = put_batch(trainer.mesh, next(batches), rows_split=sizes[n % parts] % devices == 0)
        rows.append(
            step.evaluation_step(trainer.program, trainer.mesh, trainer.state.trainable, trainer.frozen, batch, key)
        )
    rows = jax.device_get(rows)
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for n in range(parts if parts > 1 else 0):
        means[f'loss_of_set_{n + 1}'] = float(np.mean([row['loss'] for row in rows[n::parts]]))
    return means


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect SIGTERM and SIGINT in a list instead of dying of them; a second one is not caught."""
    received: list[str] = []
    before = {}

    def note(number, _frame):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(trainer: Trainer) -> run_dir.Finished:
    """Put every component into the weight store and write the done mark; proves that frozen stayed frozen."""
    frozen = {'before': trainer.frozen_checksum, 'after': checksum(trainer.frozen)}
    if frozen['before'] != frozen['after']:
        raise RuntimeError(f'frozen parameters changed during training: {frozen}')
    last = _export(trainer, trainer.state)
    found = trainer.checkpoints.best(jax.tree.map(_abstract, trainer.state), held=trainer.run.training.steps)
    best = _export(trainer, found[0]) if found else {}
    tokenizers = trainer.dataset.tokenizer_files
    run_dir.copy_tokenizers(trainer.folder, tokenizers)
    run_dir.write_finished(trainer.folder, last, best, frozen, list(tokenizers))
    connector = trainer.run.model.connector
    return run_dir.finished(trainer.folder, connector and connector.module)


def _export(trainer: Trainer, state: step.State) -> dict[str, str]:
    """Store each component and return its digest; what was wholly frozen, or not loaded, keeps the digest it came with.

    In a partly frozen component the frozen tensors are taken from where they came, not from a bfloat16 copy.
    """
    folder = trainer.folder.parent / 'weights'
    trained, frozen = state.trainable, trainer.frozen
    digests = {name: trainer.inputs[name] for name in shapes(trainer.run.model).keys() - trained.keys() - frozen.keys()}
    for name in trained.keys() | frozen.keys():
        origin = trainer.inputs.get(name)
        if origin and name not in trained:
            digests[name] = origin
            continue
        still = weight_store.load(folder, origin) if origin and name in frozen else jax.device_get(frozen.get(name, {}))
        learned = flatten(jax.device_get(trained.get(name, {})))
        digests[name] = weight_store.save(folder, unflatten(flatten(still) | learned))
    return digests
