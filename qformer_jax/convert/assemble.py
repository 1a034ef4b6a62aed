"""One model out of several checkpoints: published LAVIS files hold only what was trained, so ViT and LM come beside."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from .. import config
from ..errors import UserError
from ..models import blip2
from ..models.vit import resize_positions
from ..rules import flatten
from .lazy_tensors import FLOATS, State, Tensor, in_memory
from .recognise import NOTHING, CheckpointSource, recognise
from .table import NewlyInitialized, check_complete, check_derived, to_jax

_POSITIONS = 'vit/position_embedding'


@dataclass(frozen=True)
class Assembled:
    """A whole model, by path of ours and unread, and what a user should know of how it came together."""

    model: config.Blip2Config
    tensors: dict[str, Tensor]
    sources: tuple[CheckpointSource, ...]
    notes: tuple[str, ...]


def assemble(paths: Sequence[Path], like: config.Blip2Config = NOTHING) -> Assembled:
    """Return the model that the checkpoints hold together; `like` is the recipe's, if the user names one.

    Raises UserError for whatever is missing, twice there, of another size, of no float type, or unknown.
    """
    with _named(paths):
        return _assemble(paths, like)


@contextmanager
def _named(paths: Sequence[Path]) -> Iterator[None]:
    """Put what was read before a complaint that does not name it."""
    try:
        yield
    except UserError as error:
        if any(str(path) in str(error) for path in paths):
            raise
        raise UserError(f'{", ".join(map(str, paths))}: {error}') from None


def _assemble(paths: Sequence[Path], like: config.Blip2Config) -> Assembled:
    sources = tuple(recognise(path, like) for path in paths)
    model, tensors = NOTHING, {}
    for source in sources:
        model = _merge(model, source)
        for path, tensor in _tensors_of(source).items():
            if path in tensors:
                raise UserError(f"{source.path} gives '{path}', which another source has given: name each part once")
            tensors[path] = tensor
    _check_parts(model, tensors)
    _check_depths(model, tensors)
    notes = []
    if model.qformer and not model.vit:
        notes.append(f'no vision tower: the model reads feature arrays [P, {model.qformer.feature_width}]')
    if like.vit and model.vit and like.vit.image_size != model.vit.image_size:
        model, tensors = _resized(model, tensors, like.vit.image_size, notes)
    rows = tuple(row for source in sources for row in source.table if isinstance(row, NewlyInitialized))
    fresh = check_complete(tensors, blip2.shapes(model), rows)
    if fresh:
        tensors |= _first_values(model, list(fresh))
        notes += sorted({f'fresh: {row.path}: {row.why}' for row in fresh.values()})
    return Assembled(model, {path: tensors[path] for path in sorted(tensors)}, sources, tuple(notes))


def check_repeats(assembled: Assembled) -> None:
    """Read the second names and buffers of every source and raise UserError where one disagrees."""
    for source in assembled.sources:
        with _named([source.path]):
            check_derived(source.table, source.tensors, to_jax(source.table, source.tensors))


def _merge(model: config.Blip2Config, source: CheckpointSource) -> config.Blip2Config:
    given = {name: part for name in ('vit', 'qformer', 'lm') if (part := getattr(source.model, name))}
    twice = [name for name in given if getattr(model, name)]
    if twice:
        raise UserError(f"{source.path} ({source.family}) brings a second '{twice[0]}': name each part once")
    return replace(model, **given)


def _tensors_of(source: CheckpointSource) -> dict[str, Tensor]:
    try:
        jax_state = to_jax(source.table, source.tensors)
    except UserError as error:
        raise UserError(f'{source.path} ({source.family}): {error}') from None
    for path, tensor in jax_state.items():
        if tensor.dtype.name not in FLOATS:
            raise UserError(f"{source.path}: '{path}' is {tensor.dtype}: weights must be {', '.join(FLOATS)}")
    return jax_state


def _check_parts(model: config.Blip2Config, tensors: State) -> None:
    if 'lm_projection/kernel' in tensors and not model.lm:
        raise UserError(
            'there is a projection to a language model, but no language model (published LAVIS files hold only what '
            'was trained): name its checkpoint as a further source'
        )
    if model.vit and model.qformer and model.vit.feature_width != model.qformer.feature_width:
        raise UserError(
            f'the tower gives features of width {model.vit.feature_width}, but the Q-Former reads '
            f'{model.qformer.feature_width}: they are not of one model'
        )


def _check_depths(model: config.Blip2Config, tensors: State) -> None:
    """Raise UserError for a part that should have more blocks than there are: a thousand take a minute to lay out."""
    t5 = isinstance(model.lm, config.T5Config)
    blocks = [('vit', 'vit', 'depth'), ('qformer', 'qformer', 'depth')]
    blocks += [('lm', 'lm/encoder' if t5 else 'lm', 'depth'), ('lm', 'lm/decoder', 'decoder_depth')][: 1 + t5]
    for name, path, field in blocks:
        there = {int(found[1]) for key in tensors if (found := re.match(rf'{path}/layer_(\d+)/', key))}
        stated = getattr(getattr(model, name), field, 0)
        if there and max(there) + 1 < stated:
            raise UserError(f'{path} has {max(there) + 1} blocks in the file, but its {field} should be {stated}')


def _resized(
    model: config.Blip2Config, tensors: State, size: int, notes: list[str]
) -> tuple[config.Blip2Config, dict[str, Tensor]]:
    """Resize the position table to pictures of `size` px, by the rule of the tower (EVA and CLIP differ)."""
    old, grid = tensors[_POSITIONS], size // model.vit.patch_size
    rule = model.vit.position_resize

    def read() -> np.ndarray:
        table = old.read()
        return np.asarray(resize_positions(table.astype(np.float32), (grid, grid), rule)).astype(table.dtype)

    notes.append(f'positions resized from {model.vit.image_size} to {size} px (bicubic, {rule})')
    new = Tensor((grid * grid + 1, old.shape[1]), old.dtype, read)
    return replace(model, vit=replace(model.vit, image_size=size)), {**tensors, _POSITIONS: new}


def _first_values(model: config.Blip2Config, paths: Sequence[str]) -> dict[str, Tensor]:
    """Return what an untrained model (seed 0) has at `paths`, all of them the Q-Former's."""
    alone = blip2.Blip2Module(replace(NOTHING, qformer=model.qformer))
    values = flatten(blip2.init(alone, jax.random.key(0)))
    return in_memory({path: np.asarray(values[path]) for path in paths})
