"""What a run begins with: a completed configuration, an identity, and parameters.

Parameters come, a component at a time (`vit`, `qformer`, `connector`, `lm_projection`, `lm`...), from the first of
    1. resume      a checkpoint of this very run (`training/loop.py`)
    2. checkpoint  `start.checkpoint`, a finished run, if it holds the component
    3. pretrained  `start.vit`, `start.lm`: the run that pretrained that tower
    4. scratch     the initialisers, from `training.seed`
"""

import dataclasses
import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from .. import config
from ..convert import store
from ..data.dataset import Dataset
from ..errors import UserError
from ..models import added, blip2, lora, quantized, query_count
from ..rules import flatten, match
from ..typing import Params

FINISHED = 'finished.json'
RUN = 'run.json'


@dataclass(frozen=True)
class Finished:
    """A finished run: its configuration and the digests of its components in the weight store."""

    folder: Path
    fingerprint: str
    run: config.Run
    inputs: dict[str, str]
    last: dict[str, str]
    """Component -> digest after the last step."""
    best: dict[str, str]
    """Component -> digest at the lowest validation loss; empty if the last step is the best, or none was computed."""

    @property
    def store(self) -> Path:
        """The weight store beside the runs."""
        return self.folder.parent / 'weights'


def finished(folder: str | Path) -> Finished:
    """Read a finished run; raises UserError when there is none, it is not finished, or its LoRA is another model's."""
    folder = Path(folder)
    if not (folder / RUN).is_file():
        raise UserError(f"no run at '{folder}': give a folder that `qformer train CONFIG --run FOLDER` wrote")
    if not (folder / FINISHED).is_file():
        raise UserError(f"run '{folder}' is not finished: run its `qformer train` command again to continue it")
    identity = json.loads((folder / RUN).read_text())
    done = json.loads((folder / FINISHED).read_text())
    run = config.from_json(json.dumps(identity['config']))
    _check_base(folder, identity['inputs'], done['last'] | done['best'])
    return Finished(folder, identity['fingerprint'], run, identity['inputs'], done['last'], done['best'])


def _check_base(folder: Path, inputs: dict[str, str], held: dict[str, str]) -> None:
    """Refuse a LoRA beside another language model than it was trained on: shapes would not tell."""
    if 'lora' in held and held['lm'] != inputs.get('lm'):
        raise UserError(
            f"'{folder}' holds a LoRA that was trained on the language model {inputs.get('lm')}, beside another one, "
            f'{held["lm"]}: put back the first into its {FINISHED}, or train the LoRA again on the other'
        )


def load_components(done: Finished, which: str = 'last') -> Params:
    """Return a finished run's parameters as one nested dict (numpy), `last` or `best`."""
    digests = done.last | (done.best if which == 'best' else {})
    return {name: store.load(done.store, digest) for name, digest in digests.items()}


def for_use(done: Finished, which: str = 'last') -> tuple[config.Run, Params]:
    """Return a finished run and its parameters, a LoRA and added rows merged into its language model."""
    params = load_components(done, which)
    m = done.run.model
    return merged(done.run), added.merge(lora.merge(params, m.lora), m.grounding)


def merged(run: config.Run) -> config.Run:
    """Return the run that a run is once its LoRA and added rows are merged."""
    return dataclasses.replace(run, model=added.merged(dataclasses.replace(run.model, lora=None)))


def complete(run: config.Run, dataset: Dataset) -> config.Run:
    """Fill in the sizes that depend on the data set (given as 0), and check the ones that were given."""
    m = run.model
    words = dataset.text_tokenizer.vocab_size
    for name in ('qformer', 'connector'):
        if part := getattr(m, name):
            width = _size(f'model.{name}.feature-width', part.feature_width, _feature_width(run, dataset))
            m = dataclasses.replace(m, **{name: dataclasses.replace(part, feature_width=width)})
    if m.time:
        m = dataclasses.replace(m, time=dataclasses.replace(m.time, patches=_patches(m)))
    if m.qformer:
        rows = _size('model.qformer.vocab-size', m.qformer.vocab_size, words)
        m = dataclasses.replace(m, qformer=dataclasses.replace(m.qformer, vocab_size=rows))
    if m.gates and not dataset.lm_tokenizer.marks.begin and not all(run.data.caption_prompt):
        raise UserError('data.caption-prompt is empty, and the texts of this language model begin with nothing: with '
                        'model.gates, give it a text for the first word to follow')  # fmt: skip
    if m.lm:
        ids = dataset.lm_tokenizer.vocab_size
        rows = _size('model.lm.vocab-size', m.lm.vocab_size, ids, spare=True)
        m = dataclasses.replace(m, lm=dataclasses.replace(m.lm, vocab_size=rows))
    if run.stage == 'vision':
        m = dataclasses.replace(m, word_head=_size('model.word-head', m.word_head, words))
    return dataclasses.replace(run, model=m)


def _feature_width(run: config.Run, dataset: Dataset) -> int:
    if run.model.vit:
        return run.model.vit.feature_width
    if not dataset.feature_shape:
        raise UserError(f"data set '{run.data.path}' holds pictures, but model.vit is None: give the run a tower")
    return dataset.feature_shape[1]


def _patches(m: config.Blip2) -> int:
    """Return the features of a frame."""
    if m.vit:
        tower = (m.vit.image_size // m.vit.patch_size) ** 2 + 1
        return _size('model.time.patches', m.time.patches, tower)
    if not m.time.patches:
        raise UserError('model.time.patches is 0, and there is no tower to take it from: set it to those of a frame')
    return m.time.patches


def _size(name: str, given: int, needed: int, spare: bool = False) -> int:
    """Return the size to use; `spare` allows more rows than needed, as OPT's table has."""
    if given not in (0, needed) and not (spare and given > needed):
        raise UserError(
            f'--{name} is {given}, but the data set, or its tokenizer, needs {needed} (0 takes it from there)'
        )
    return given or needed


def inputs_of(run: config.Run, dataset: Dataset) -> dict[str, str]:
    """Return the content that a run reads, by digest: the data set, and each component that it starts from."""
    inputs = {'data': dataset.fingerprint}
    if run.start.checkpoint:
        inputs |= finished(run.start.checkpoint).last
    for name in ('vit', 'lm'):
        path = getattr(run.start, name)
        if path and name not in inputs:
            digests = finished(path).last
            if name not in digests:
                raise UserError(f"run '{path}' holds no '{name}', only {sorted(digests)}: see start.{name}")
            inputs[name] = digests[name]
    if run.stage != 'language':
        dataset.check_tower(inputs.get('vit'), run.model.vit)
        _check_fixed(run, dataset)
    parts = set(blip2.shapes(run.model))
    return {name: digest for name, digest in inputs.items() if name == 'data' or name in parts}


def _check_fixed(run: config.Run, dataset: Dataset) -> None:
    """Refuse what the features of a tower cannot give: crops and mirrored pictures, and a tower that learns."""
    if not dataset.encoder:
        return
    if run.data.crop_scale != (1, 1) or run.data.flip:
        raise UserError(f"'{dataset.path}' holds features of whole pictures, which are neither cropped nor mirrored: "
                        'add --data.crop-scale 1 1 --data.no-flip, or train from the pictures')  # fmt: skip
    tower = [path for path in flatten(blip2.shapes(run.model)) if path.startswith('vit/')]
    if any(rate is not None for rate in match(run.optimizer.rate_rules, tower).values()):
        raise UserError(f"'{dataset.path}' holds features of a frozen tower, and optimizer.rate-rules train it: begin "
                        'them with (vit/.*, None), or train from the pictures')  # fmt: skip


def bring_weights(run: config.Run, inputs: dict[str, str], folder: Path) -> None:
    """Copy the components that a run starts from into the store beside it, if they lie beside runs elsewhere."""
    for path in filter(None, (run.start.checkpoint, run.start.vit, run.start.lm)):
        done = finished(path)
        for digest in sorted(set(inputs.values()) & set(done.last.values())):
            store.copy(done.store, folder.parent / 'weights', digest)


def fingerprint(run: config.Run, inputs: dict[str, str]) -> str:
    """Return 12 hex digits of what decides the result: the configuration and the content read, not where it lies."""
    data = dataclasses.replace(run.data, path='', mixed_with=())
    return config.digest(dataclasses.replace(run, data=data, start=config.Start()), inputs)


def claim(folder: Path, run: config.Run, inputs: dict[str, str], dataset: Dataset) -> str:
    """Make `folder` this run's, or check that it is; returns the fingerprint; raises UserError on another run's.

    A run that never began to train, for a mistake that is corrected now, gives its folder up. The tokenizers are copied
    there, so that a run can be used without its data set.
    """
    mark = fingerprint(run, inputs)
    path = folder / RUN
    other = json.loads(path.read_text()) if path.exists() else None
    if other and other['fingerprint'] == mark:
        return mark
    if other and (folder / 'log.jsonl').exists():  # its log: it began to train
        differs = _differences(other, {'config': dataclasses.asdict(run), 'inputs': inputs})
        raise UserError(f"'{folder}' belongs to another run ({other['fingerprint']}, this is {mark}): {differs}")
    if not other and folder.exists() and any(folder.iterdir()):
        raise UserError(f"'{folder}' is not empty and holds no run: give --run a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in dataset.tokenizer_files.items():
        shutil.copy(file, folder / name)
    identity = {'fingerprint': mark, 'config': dataclasses.asdict(run), 'inputs': inputs}
    partial = path.with_suffix('.partial')
    partial.write_text(json.dumps(identity, indent=1, sort_keys=True))
    partial.replace(path)
    return mark


def _differences(there: dict, here: dict, limit: int = 5) -> str:
    """Return `training.steps 100 there, 200 here; ...` for two nested dicts."""
    there, here = flatten(json.loads(json.dumps(there))), flatten(json.loads(json.dumps(here)))
    names = [n for n in sorted(there.keys() | here.keys()) if there.get(n) != here.get(n) and n != 'fingerprint']
    rows = [f'{n.replace("/", ".")} {there.get(n)} there, {here.get(n)} here' for n in names]
    return '; '.join(rows[:limit]) + (f'; and {len(rows) - limit} more' if len(rows) > limit else '')


def parameters(run: config.Run, inputs: dict[str, str]) -> tuple[Params, dict[str, str]]:
    """Return the first parameters and, for each component, where it came from.

    Where the data set holds the tower's features, the tower is not among them: nothing reads it.
    """
    wanted = blip2.shapes(run.model)
    params, source = {}, {}
    if 'vit' in wanted and Dataset.open(run.data.path).encoder:
        del wanted['vit']
        source['vit'] = f'{run.data.path}, as features'
    for kind, path in (('checkpoint', run.start.checkpoint), ('vit', run.start.vit), ('lm', run.start.lm)):
        if not path:
            continue
        done = finished(path)
        names = wanted.keys() & (done.last.keys() if kind == 'checkpoint' else {kind}) - params.keys()
        for name in sorted(names):
            params[name] = store.load(done.store, inputs[name])
            if quantized.any_in(params[name]):
                raise UserError(
                    f"'{path}' holds quantized weights, for use only: start from the run that it was made from"
                )
            _check_same_shapes(name, wanted[name], params[name], path)
            source[name] = f'{"checkpoint" if kind == "checkpoint" else "pretrained"} {path}'
    missing = sorted(wanted.keys() - params.keys())
    if missing:
        model = blip2.Blip2(run.model)
        fresh = jax.jit(lambda key: {name: blip2.init(model, key)[name] for name in missing})
        params |= fresh(jax.random.key(run.training.seed))
        source |= dict.fromkeys(missing, 'scratch')
    for name in ('lm_projection', 'connector_projection'):
        if name in missing and source['lm'] != 'scratch' and not run.model.gates:
            params[name] = _like_tokens(params[name], params['lm']['word_embedding'])
    if 'grounding' in missing and source['lm'] != 'scratch':
        key = jax.random.fold_in(jax.random.key(run.training.seed), 2)
        params['grounding'] = jax.jit(functools.partial(added.init, run.model.grounding))(params['lm'], key)
    return params, dict(sorted(source.items()))


def left_behind(run: config.Run) -> list[str]:
    """Return the components of `start.checkpoint` that the run's model has no place for."""
    held = finished(run.start.checkpoint).last.keys() if run.start.checkpoint else set()
    return sorted(held - blip2.shapes(run.model).keys())


def _like_tokens(projection: Params, table: np.ndarray) -> Params:
    """Scale a fresh projection so that the soft prefix is as large as the language model's token vectors.

    Its input has a variance of about 1 (layer-normed) and its kernel keeps that: the table's deviation is the factor.
    """
    return projection | {'kernel': projection['kernel'] * np.asarray(table, np.float32).std()}


def _check_same_shapes(name: str, wanted: Params, found: Params, path: str) -> None:
    wanted, found = ({k: tuple(v.shape) for k, v in flatten(tree).items()} for tree in (wanted, found))
    rows = [
        f'{name}/{k}: {found.get(k, "absent")} there, {wanted.get(k, "absent")} here'
        for k in sorted(wanted.keys() | found.keys())
        if wanted.get(k) != found.get(k)
    ]
    if rows:
        more = f'; and {len(rows) - 4} more' if len(rows) > 4 else ''
        way_out = ''
        if rows[0].startswith(query_count.TABLE) and len(rows) == 1:
            count = wanted['query_token'][0]
            way_out = f': qformer convert {path} DEST --queries {count}, and start from DEST'
        raise UserError(
            f"'{path}' was made with another configuration of '{name}': {'; '.join(rows[:4])}{more}{way_out}"
        )
