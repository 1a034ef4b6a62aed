"""Fields of Hugging Face's `config.json` <-> fields of a configuration of ours, by tables.

A published `config.json` leaves out what equals the default of its class, so each row has that default too. Whatever is
read from one goes through `value`, `section` or `read_fields`, which hold it to the type and range that we expect.
"""

import dataclasses
import typing
from typing import Any, TypeVar

import msgspec

from ..config.ranges import check_ranges
from ..errors import UserError

Json = dict[str, Any]
Fields = tuple[tuple[str, str, Any], ...]
"""(our field, theirs, their default)."""

Kind = TypeVar('Kind')
_KINDS = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'a text'}


def value(hf_config: Json, name: str, kind: Any, default: Any) -> Any:
    """Return a field of a `config.json`, of a type that msgspec knows; raises UserError where it is of another."""
    found = hf_config.get(name, default)
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        expected = f'expected {_KINDS[kind]}' if kind in _KINDS else error
        raise UserError(f'config.json has {name} {found!r:.40}: {expected}') from None


def section(hf_config: Json, name: str) -> Json:
    """Return a part of a `config.json` that has fields of its own, {} where it has none; raises UserError."""
    found = hf_config.get(name, {})
    if not isinstance(found, dict):
        raise UserError(f'config.json has {name} {found!r:.40}: expected an object')
    return found


def read_fields(rows: Fields, hf_config: Json, kind: type[Kind], **others: Any) -> Kind:
    """Return the configuration `kind` of a `config.json`: the fields of the rows, and others that were read before.

    Raises UserError, with their name of the field, for a value of another type or out of range.
    """
    hints, names = typing.get_type_hints(kind), {field: name for field, name, _ in rows}
    fields = {field: value(hf_config, name, hints[field], default) for field, name, default in rows}
    found = kind(**fields | others)
    check_ranges(found, lambda field: f'config.json: {names.get(field, field)}')
    return found


def write_fields(rows: Fields, c: object) -> Json:
    """Return the fields of a `config.json` that say what `c` does."""
    values = dataclasses.asdict(c)
    return {name: values[field] for field, name, _ in rows}


def require(hf_config: Json, name: str, value: object) -> None:
    """Raise UserError when a field that we do not vary is there and has another value."""
    if hf_config.get(name, value) != value:
        raise UserError(f'config.json has {name} {hf_config[name]!r:.40}, but this model here has {value!r} only')
