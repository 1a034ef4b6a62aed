"""Ordered `(regex over a parameter path) -> value` tables: first match wins, and a path without a match is an error.

One engine answers every question asked of parameters one by one: learning-rate multiple, weight decay, frozen or not.

    >>> rules = ((r'lm/.*', None), (r'qformer/.*', 1.0))
    >>> match(rules, ['qformer/query_token', 'lm/norm/scale'])
    {'qformer/query_token': 1.0, 'lm/norm/scale': None}
"""

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import flax.traverse_util

from .errors import UserError
from .typing import Params

Value = TypeVar('Value')

TEXT_SIDE = (
    r'qformer/((word|added|position)_embedding|layer_\d+/text_mlp(_norm)?/.*|lm_head/.*'
    r'|(vision|text)_projection/.*|itm_head/.*|temperature)'
)
"""What of the Q-Former only stage 1 (and an instruction-aware Q-Former) uses."""
STAGE1_ONLY = r'qformer/(added_embedding|lm_head|(vision|text)_projection|itm_head|temperature).*'
"""What of the Q-Former only stage 1 uses, where it reads questions later."""


def flatten(params: Params) -> dict[str, object]:
    """Return `{'qformer/layer_0/...': array}` for a nested dict of parameters, in sorted order."""
    return dict(sorted(flax.traverse_util.flatten_dict(params, sep='/').items()))


def unflatten(flat: dict[str, object]) -> Params:
    """Undo `flatten`."""
    return flax.traverse_util.unflatten_dict(flat, sep='/')


def match(rules: Sequence[tuple[str, Value]], paths: Iterable[str]) -> dict[str, Value]:
    """Return the value of the first rule whose regex matches the whole path, for every path; raises UserError."""
    compiled = [(_regex(pattern), value) for pattern, value in rules]
    values = {}
    for path in paths:
        found = [value for pattern, value in compiled if pattern.fullmatch(path)]
        if not found:
            raise UserError(f"no rule matches parameter '{path}': end the table with ('.*', value)")
        values[path] = found[0]
    return values


def _regex(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"'{pattern}' is not a regular expression over parameter paths: {error}") from None


def split(params: Params, rules: Sequence[tuple[str, Value | None]]) -> tuple[Params, Params]:
    """Return `(trainable, frozen)`: two nested dicts; a parameter whose rule says None is frozen."""
    flat = flatten(params)
    values = match(rules, flat)
    trainable = {path: array for path, array in flat.items() if values[path] is not None}
    frozen = {path: array for path, array in flat.items() if values[path] is None}
    return unflatten(trainable), unflatten(frozen)


def merge(trainable: Params, frozen: Params) -> Params:
    """Undo `split`: one nested dict of everything."""
    return unflatten(flatten(trainable) | flatten(frozen))


def vit_layer_decay(depth: int, decay: float) -> tuple[tuple[str, float], ...]:
    """Return rate rules that fade towards the pixels: block i of `depth` learns at decay ** (depth - i).

    Worked example, depth 2 and decay 0.5: embeddings 0.125, `layer_0` 0.25, `layer_1` 0.5, everything else 1 (BEiT's
    rule, which LAVIS uses to fine-tune the tower).
    """
    layers = tuple((rf'vit/layer_{i}/.*', decay ** (depth - i)) for i in range(depth))
    embeddings = (r'vit/(patch_projection/.*|class_token|position_embedding|pre_norm/.*)', decay ** (depth + 1))
    return (embeddings, *layers)
