"""What a run begins with: a completed configuration, the content that it reads, and parameters.

Parameters come, a component at a time (`vit`, `qformer`, `connector`, `lm_projection`, `lm`...), from the first of
    1. resume      a checkpoint of this very run (`training/loop.py`)
    2. checkpoint  `start.checkpoint`, a finished run, if it holds the component
    3. pretrained  `start.vit`, `start.lm`: the run that pretrained that tower
    4. scratch     the initialisers, from `training.seed`
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from .. import config
from ..config.ranges import MILLION
from ..data.dataset import Dataset
from ..errors import UserError
from ..models import blip2, quantized, vocab_extension
from ..rules import flatten, match
from ..runs import weight_store
from ..runs.run_dir import check_same_shapes, finished
from ..typing import Params
from .check_data import lengths
from .stages import STAGES

_LENGTHS = 'max_text', 'max_lm_text'
"""Fields of `config.Data` that bound texts."""


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
    if m.gates and not dataset.lm_tokenizer.special_tokens.begin and not all(run.data.caption_prompt):
        raise UserError('data.caption-prompt is empty, and the texts of this language model begin with nothing: with '
                        'model.gates, give it a text for the first word to follow')  # fmt: skip
    if m.lm:
        ids = dataset.lm_tokenizer.vocab_size
        rows = _size('model.lm.vocab-size', m.lm.vocab_size, ids, spare=True)
        m = dataclasses.replace(m, lm=dataclasses.replace(m.lm, vocab_size=rows))
    if 'word_head' in STAGES[run.stage].needs:
        m = dataclasses.replace(m, word_head=_size('model.word-head', m.word_head, words))
    return _with_lengths(dataclasses.replace(run, model=m), dataset)


def _with_lengths(run: config.Run, dataset: Dataset) -> config.Run:
    """Return the run with the lengths of texts that are given as 0: those of the longest that it reads."""
    wanted = [name for name in _LENGTHS if not getattr(run.data, name)]
    if not wanted:
        return run
    found = longest(run, dataset)
    known = {name: found.get(name, getattr(config.Data(), name)) for name in wanted}  # the default: nobody reads it
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **known))


def longest(run: config.Run, dataset: Dataset) -> dict[str, int]:
    """Return the tokens of the longest texts that a run reads, by the field that bounds them; reads all records."""
    endless = dataclasses.replace(run, data=dataclasses.replace(run.data, **dict.fromkeys(_LENGTHS, MILLION)))
    found: dict[str, int] = {}
    for split in filter(None, (run.data.train_split, run.data.validation_split)):
        for name, texts in lengths(endless, dataset, split).items():
            found[name] = max(texts.tokens, found.get(name, 0))
    return found


def _feature_width(run: config.Run, dataset: Dataset) -> int:
    if run.model.vit:
        return run.model.vit.feature_width
    if not dataset.feature_shape:
        raise UserError(f"data set '{run.data.path}' holds pictures, but model.vit is None: give the run a tower")
    return dataset.feature_shape[1]


def _patches(m: config.Blip2Config) -> int:
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
    if STAGES[run.stage].row_format.pictures:
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


def check_frozen(run: config.Run, inputs: dict[str, str], dataset: Dataset) -> None:
    """Raise UserError for a component that is frozen and begins from the initialisers, unless the run asks for it."""
    wanted = blip2.shapes(run.model)
    given = inputs.keys() | set(run.start.scratch) | ({'vit'} if dataset.encoder else set())
    for name in sorted(wanted.keys() - given):
        rates = match(run.optimizer.rate_rules, flatten({name: wanted[name]}))
        if all(rate is None for rate in rates.values()):
            where = f'start.{name}' if name in ('vit', 'lm') else 'start.checkpoint'
            raise UserError(
                f"'{name}' is frozen and would begin from random numbers: name the run that trained it ({where}), let "
                f'it learn (optimizer.rate-rules), or ask for it (--start.scratch {name})'
            )


def import_weights(run: config.Run, inputs: dict[str, str], folder: Path) -> None:
    """Copy the components that a run starts from into the store beside it, if they lie beside runs elsewhere."""
    for path in filter(None, (run.start.checkpoint, run.start.vit, run.start.lm)):
        done = finished(path)
        for digest in sorted(set(inputs.values()) & set(done.last.values())):
            weight_store.copy(done.store, folder.parent / 'weights', digest)


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
            params[name] = weight_store.load(done.store, inputs[name])
            if quantized.any_in(params[name]):
                raise UserError(
                    f"'{path}' holds quantized weights, for use only: start from the run that it was made from"
                )
            check_same_shapes(name, wanted[name], params[name], path)
            source[name] = f'{"checkpoint" if kind == "checkpoint" else "pretrained"} {path}'
    missing = sorted(wanted.keys() - params.keys())
    if missing:
        params |= blip2.init(blip2.Blip2Module(run.model), jax.random.key(run.training.seed), tuple(missing))
        source |= dict.fromkeys(missing, 'scratch')
    for name in ('lm_projection', 'connector_projection'):
        if name in missing and source['lm'] != 'scratch' and not run.model.gates:
            params[name] = _like_tokens(params[name], params['lm']['word_embedding'])
    if 'grounding' in missing and source['lm'] != 'scratch':
        key = jax.random.fold_in(jax.random.key(run.training.seed), 2)
        params['grounding'] = jax.jit(functools.partial(vocab_extension.init, run.model.grounding))(params['lm'], key)
    return params, dict(sorted(source.items()))


def unused_components(run: config.Run) -> list[str]:
    """Return the components of `start.checkpoint` that the run's model has no place for."""
    held = finished(run.start.checkpoint).last.keys() if run.start.checkpoint else set()
    return sorted(held - blip2.shapes(run.model).keys())


def _like_tokens(projection: Params, table: np.ndarray) -> Params:
    """Scale a fresh projection so that the soft prefix is as large as the language model's token vectors.

    Its input has a variance of about 1 (layer-normed) and its kernel keeps that: the table's deviation is the factor.
    """
    return projection | {'kernel': projection['kernel'] * np.asarray(table, np.float32).std()}
