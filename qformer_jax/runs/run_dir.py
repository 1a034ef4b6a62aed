"""The folder of a run: whose it is, what lies in it, and how a finished run is read.

    RUN/run.json         configuration, digests of what the run reads, and the fingerprint of both
    RUN/finished.json    written last: digests of the components in the weight store, SHA-256 of the tokenizers
    RUN/wordpiece.json, byte_bpe.json     the tokenizers
    RUN/log.jsonl, checkpoints/, tensorboard/, loss.png, skipped.json, evaluation/
    weights/DIGEST.safetensors            the weight store, beside the runs

Nothing in a run is code, and nothing in it names code: a connector of one's own comes from whoever uses the run.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from .. import config, json_file
from ..errors import UserError
from ..hashing import sha256
from ..models import blip2, connectors, lora, quantized, query_count, vocab_extension
from ..rules import flatten
from ..typing import Params
from . import weight_store

RUN, FINISHED, LOG, SKIPPED = 'run.json', 'finished.json', 'log.jsonl', 'skipped.json'
_COPY_IT = 'copy the file again from where the run was made'
_WRITTEN = ('checkpoints', 'tensorboard', 'evaluation', 'loss.png', FINISHED, LOG, SKIPPED, 'wordpiece.json',
            'byte_bpe.json', 'provenance.json', RUN)  # fmt: skip
"""What runs write, in the order in which it can be removed: half of it is no run that could go on."""


class Identity(msgspec.Struct, forbid_unknown_fields=True):
    """What run.json holds."""

    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]


class _FinishedFile(msgspec.Struct, forbid_unknown_fields=True):
    """What finished.json holds; the runs of earlier versions have neither `tokenizers` nor `sha256`."""

    last: dict[str, str]
    best: dict[str, str]
    frozen: dict[str, str] | None = None
    """Digest of the frozen parameters `before` and `after` training; None where nothing was trained."""
    tokenizers: dict[str, str] = {}
    """File -> SHA-256."""
    sha256: str = ''
    """Of the rest, as sorted JSON."""


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


def finished(folder: str | Path, connector: type | None = None) -> Finished:
    """Read a finished run; `connector` is the class of its connector, where that is none of the package's.

    Raises UserError when there is no run, it is not finished, one of its files is damaged or not the one that was
    written, or its LoRA is another model's.
    """
    folder = Path(folder)
    if not (folder / RUN).is_file():
        raise UserError(f"no run at '{folder}': give a folder that `qformer train CONFIG --run FOLDER` wrote")
    if not (folder / FINISHED).is_file():
        raise UserError(f"run '{folder}' is not finished: run its `qformer train` command again to continue it")
    identity = read_identity(folder)
    run = with_connector(config.from_tree(identity.config, str(folder / RUN)), connector)
    done = _read_finished(folder)
    _check_base(folder, identity.inputs, done.last | done.best)
    return Finished(folder, identity.fingerprint, run, identity.inputs, done.last, done.best)


def read_identity(folder: Path) -> Identity:
    """Return what run.json holds; raises UserError when it is damaged, or does not match its own fingerprint.

    The configuration is hashed as it is stored, so that the runs of earlier versions match too.
    """
    found = json_file.read(folder / RUN, Identity, _COPY_IT)
    known = {config.digest_of_tree(tree, found.inputs) for tree in (found.config, _without_paths(found.config))}
    if found.fingerprint not in known:
        raise UserError(
            f'{folder / RUN}: its configuration or inputs were changed, for their fingerprint is not '
            f"'{found.fingerprint}' any more: {_COPY_IT}, or train a run of the other configuration"
        )
    return found


def _without_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration without where data and weights lie, which no fingerprint depends on."""
    data, start = tree.get('data'), tree.get('start')
    if not isinstance(data, dict) or not isinstance(start, dict):
        return tree
    empty = {name: value for name, value in {'path': '', 'mixed_with': []}.items() if name in data}
    return tree | {'data': data | empty, 'start': {name: '' for name, value in start.items() if isinstance(value, str)}}


def fingerprint(run: config.Run, inputs: dict[str, str]) -> str:
    """Return 12 hex digits of what decides the result: the configuration and the content read, not where it lies."""
    data = replace(run.data, path='', mixed_with=())
    return config.digest(replace(run, data=data, start=config.Start()), inputs)


def write_identity(folder: Path, run: config.Run, inputs: dict[str, str]) -> str:
    """Write run.json and return the fingerprint."""
    mark = fingerprint(run, inputs)
    json_file.write(folder / RUN, {'fingerprint': mark, 'config': config.to_tree(run), 'inputs': inputs})
    return mark


def _read_finished(folder: Path) -> _FinishedFile:
    file = folder / FINISHED
    remedy = f"{_COPY_IT}, or delete it and run the run's `qformer train` command again"
    done = json_file.read(file, _FinishedFile, remedy)
    if done.sha256 and done.sha256 != _digest_of(msgspec.structs.asdict(done)):
        raise UserError(f'{file}: does not match its own SHA-256; {remedy}')
    if done.tokenizers and not done.sha256:
        raise UserError(f"{file}: 'sha256' is missing; {remedy}")
    for name, digest in done.tokenizers.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise UserError(f'{folder / name} is missing or damaged (its SHA-256 is not {digest[:12]}...): {_COPY_IT}')
    return done


def write_finished(
    folder: Path, last: dict[str, str], best: dict[str, str], frozen: dict[str, str] | None, tokenizers: list[str]
) -> None:
    """Write finished.json: from then on the run is finished. `tokenizers` names the files that it has."""
    held = {name: sha256(folder / name) for name in tokenizers}
    done = {'last': last, 'best': best, 'frozen': frozen, 'tokenizers': held}
    json_file.write(folder / FINISHED, done | {'sha256': _digest_of(done)})


def _digest_of(tree: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in tree.items() if name != 'sha256'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def with_connector(run: config.Run, connector: type | None) -> config.Run:
    """Return the run with the class of its own connector, if one is given; raises UserError where it needs none."""
    if connector is None:
        return run
    c = run.model.connector
    if c is None or c.kind in connectors.names():
        has = f"the package's '{c.kind}'" if c else 'none'
        raise UserError(f'this run has no connector of your own, but {has}: leave --connector out')
    return replace(run, model=replace(run.model, connector=replace(c, module=connector)))


def _check_base(folder: Path, inputs: dict[str, str], held: dict[str, str]) -> None:
    """Refuse a LoRA beside another language model than it was trained on: shapes would not tell."""
    if 'lora' in held and held.get('lm') != inputs.get('lm'):
        raise UserError(
            f"'{folder}' holds a LoRA that was trained on the language model {inputs.get('lm')}, beside another one, "
            f'{held.get("lm")}: put back the first into its {FINISHED}, or train the LoRA again on the other'
        )


def load_components(done: Finished, which: Literal['last', 'best'] = 'last') -> Params:
    """Return a finished run's parameters as one nested dict (numpy), `last` or `best`.

    Raises UserError when weights are missing or damaged, or are not those of the run's configuration.
    """
    digests, wanted = done.last | (done.best if which == 'best' else {}), blip2.shapes(done.run.model)
    if digests.keys() != wanted.keys():
        raise UserError(
            f'{done.folder / FINISHED} names the components {sorted(digests)}, and the model of {RUN} has '
            f'{sorted(wanted)}: {_COPY_IT}'
        )
    params = {name: weight_store.load(done.store, digest) for name, digest in digests.items()}
    for name in params:
        check_same_shapes(name, wanted[name], params[name], str(done.folder))
    return params


def check_same_shapes(name: str, wanted: Params, found: Params, path: str) -> None:
    """Raise UserError when a component found in the run at `path` has other arrays than are wanted."""
    wanted, found = ({k: _shape(k, v) for k, v in flatten(tree).items()} for tree in (wanted, found))
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


def _shape(path: str, leaf: Any) -> tuple[int, ...]:
    """Return the shape of a parameter; of a quantized one, that of the parameter that it stands for."""
    if not isinstance(leaf, quantized.Quantized):
        return tuple(leaf.shape)
    return leaf.shape[::-1] if path.split('/')[-1] == 'kernel' else leaf.shape


def for_use(done: Finished, which: Literal['last', 'best'] = 'last') -> tuple[config.Run, Params]:
    """Return a finished run and its parameters, a LoRA and added rows merged into its language model."""
    params = load_components(done, which)
    m = done.run.model
    return merged(done.run), vocab_extension.merge(lora.merge(params, m.lora), m.grounding)


def merged(run: config.Run) -> config.Run:
    """Return the run that a run is once its LoRA and added rows are merged."""
    return replace(run, model=vocab_extension.merged(replace(run.model, lora=None)))


def open_run_dir(
    folder: Path, run: config.Run, inputs: dict[str, str], tokenizers: Mapping[str, Path], restart: str = ''
) -> str:
    """Make `folder` this run's, or check that it is; returns the fingerprint; raises UserError on another run's.

    A run that never began to train, for a mistake that is corrected now, gives its folder up; so does any other where
    `restart` repeats the folder's name. The tokenizers (name -> file) are copied there, so that a run can be used
    without its data set.
    """
    mark = fingerprint(run, inputs)
    other = read_identity(folder) if (folder / RUN).exists() else None
    if other and other.fingerprint == mark:
        return mark
    if other and restart:
        _remove_run(folder, restart)
    elif other and (folder / LOG).exists():  # its log: it began to train
        here = {'config': config.to_tree(run), 'inputs': inputs}
        differs = _differences({'config': other.config, 'inputs': other.inputs}, here)
        name = folder.resolve().name
        raise UserError(
            f"'{folder}' belongs to another run ({other.fingerprint}, this is {mark}): {differs}. Give --run another "
            f'folder, or remove that run and begin this one there: --restart {name}'
        )
    elif not other and folder.exists() and any(folder.iterdir()):
        raise UserError(f"'{folder}' is not empty and holds no run: give --run a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    copy_tokenizers(folder, tokenizers)
    return write_identity(folder, run, inputs)


def has_begun(folder: Path, run: config.Run, inputs: dict[str, str]) -> bool:
    """Return whether this very run has begun to train in a folder: what it needs was checked then."""
    begun = (folder / RUN).exists() and (folder / LOG).exists()
    return begun and read_identity(folder).fingerprint == fingerprint(run, inputs)


def copy_tokenizers(folder: Path, tokenizers: Mapping[str, Path]) -> None:
    """Copy tokenizers into a run's folder, each under its name."""
    for name, file in tokenizers.items():
        shutil.copy(file, folder / name)


def _remove_run(folder: Path, name: str) -> None:
    """Remove what a run wrote into its folder, and nothing else; raises UserError when `name` is another one's."""
    if name != folder.resolve().name:
        raise UserError(f"--restart {name}: the run in '{folder}' is named '{folder.resolve().name}'")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.removed-') as removed:
        for written in filter(Path.exists, (folder / part for part in _WRITTEN)):
            written.rename(Path(removed) / written.name)


def _differences(there: dict, here: dict, limit: int = 5) -> str:
    """Return `config.training.steps 100 there, 200 here; ...` for two nested dicts."""
    there, here = flatten(json.loads(json.dumps(there))), flatten(json.loads(json.dumps(here)))
    names = [n for n in sorted(there.keys() | here.keys()) if there.get(n) != here.get(n)]
    rows = [f'{n.replace("/", ".")} {there.get(n)} there, {here.get(n)} here' for n in names]
    return '; '.join(rows[:limit]) + (f'; and {len(rows) - limit} more' if len(rows) > limit else '')
