"""A run as canonical JSON, back again, and its digest."""

import dataclasses
import hashlib
import json
from typing import Any, TypeVar, get_args

import msgspec

from ..errors import UserError, nearest
from .connectors import ConnectorConfig, QformerConfig, TimeConfig
from .run import Blip2Config, Data, Objective, Optimizer, Run, Start, Training
from .towers import GatesConfig, GroundingConfig, LmConfig, LoraConfig, VitConfig

_FAMILIES = {kind.family: kind for kind in get_args(LmConfig)}
_PARTS = {
    'vit': VitConfig,
    'qformer': QformerConfig,
    'connector': ConnectorConfig,
    'time': TimeConfig,
    'gates': GatesConfig,
}
_PARTS |= {'lora': LoraConfig, 'grounding': GroundingConfig}
_REST = {'data': Data, 'objective': Objective, 'optimizer': Optimizer, 'training': Training, 'start': Start}
_PROMPTS = ('question_prompt', 'caption_prompt', 'phrase_prompt')

Part = TypeVar('Part')


def to_tree(part: Any) -> dict[str, Any]:
    """Return a part of a configuration as nested dicts, which JSON can hold.

    Left out are fields that no JSON holds (`metadata={'json': False}`), and those that later versions added
    (`metadata={'later': True}`) while they are at their default, so that earlier fingerprints stay.
    """
    tree = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if not field.metadata.get('json', True) or (field.metadata.get('later') and value == field.default):
            continue
        tree[field.name] = to_tree(value) if dataclasses.is_dataclass(value) else value
    return tree


def to_json(run: Run) -> str:
    """Return the canonical JSON of a run: sorted keys."""
    return _dump(to_tree(run))


def digest(run: Run, inputs: dict[str, str]) -> str:
    """Return 12 hex digits that name a configuration and the content it reads (SHA-256 of canonical JSON)."""
    return digest_of_tree(to_tree(run), inputs)


def digest_of_tree(tree: dict[str, Any], inputs: dict[str, str]) -> str:
    """Return the digest of a configuration as its JSON stands, of whatever version."""
    text = _dump(tree) + json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _dump(tree: dict[str, Any]) -> str:
    return json.dumps(tree, sort_keys=True, indent=1)


def from_json(text: str) -> Run:
    """Return the run whose `to_json` is `text`; raises UserError when it is none that this version knows."""
    return from_tree(json.loads(text), 'the configuration')


def from_tree(tree: Any, where: str) -> Run:
    """Return the run whose `to_tree` is `tree`, made by this version or an earlier one.

    Raises UserError, naming `where` and the path of the value, for what is missing, unknown or of another type.
    """
    tree = _mapping(tree, where)
    needed = ('stage', 'model', *_REST)
    for name in [*(n for n in needed if n not in tree), *(n for n in tree if n not in needed)]:
        known = 'missing' if name in needed else f'unknown{nearest(name, needed)}'
        raise UserError(f"{where}: '{name}' is {known}")
    parts = {name: part_of(_upgraded(name, tree[name]), kind, f'{where}: {name}') for name, kind in _REST.items()}
    try:
        return msgspec.convert({'stage': tree['stage']}, _Stage).run(_model(tree['model'], f'{where}: model'), parts)
    except msgspec.ValidationError as error:
        raise UserError(f'{where}: {error}') from None


class _Stage(msgspec.Struct):
    """What of a run is no part of its own."""

    stage: Run.__annotations__['stage']

    def run(self, model: Blip2Config, parts: dict[str, Any]) -> Run:
        return Run(stage=self.stage, model=model, **parts)


def _model(tree: Any, where: str) -> Blip2Config:
    """Return the model: each of its parts by its own type, the language model by its family."""
    tree = dict(_mapping(tree, where))
    if tree.get('lm') is not None:
        family = _mapping(tree['lm'], f'{where}.lm').get('family', 'opt')
        if not isinstance(family, str) or family not in _FAMILIES:
            raise UserError(f'{where}.lm.family is {family!r}; known are {", ".join(_FAMILIES)}')
        tree['lm'] = part_of(tree['lm'], _FAMILIES[family], f'{where}.lm')
    for name, kind in _PARTS.items():
        if tree.get(name) is not None:
            tree[name] = part_of(tree[name], kind, f'{where}.{name}')
    _check_keys(tree, Blip2Config, where)
    word_head = tree.get('word_head', 0)
    if not isinstance(word_head, int) or isinstance(word_head, bool):
        raise UserError(f'{where}.word_head is {word_head!r}; expected int')
    return Blip2Config(**tree)


def part_of(tree: Any, kind: type[Part], where: str) -> Part:
    """Return a part whose `to_tree` is `tree`; fields that it lacks have their defaults; raises UserError."""
    _check_keys(_mapping(tree, where), kind, where)
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise UserError(f'{where}: {str(error).replace("`$.", "`")}') from None


def _upgraded(name: str, tree: Any) -> Any:
    """Return a part as this version writes it: runs before there were several prompts have one text."""
    if name != 'data' or not isinstance(tree, dict):
        return tree
    return tree | {n: [tree[n]] for n in _PROMPTS if isinstance(tree.get(n), str)}


def _mapping(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise UserError(f'{where} is {type(tree).__name__}; expected an object')
    return tree


def _check_keys(tree: dict[str, Any], kind: type, where: str) -> None:
    known = [field.name for field in dataclasses.fields(kind) if field.metadata.get('json', True)]
    for name in tree:
        if name not in known:
            raise UserError(f"{where} has an unknown field '{name}'{nearest(str(name), known)}")
