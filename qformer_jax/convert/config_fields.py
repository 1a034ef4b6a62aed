"""Fields of Hugging Face's `config.json` <-> fields of a configuration of ours, by tables.

A published `config.json` leaves out what equals the default of its class, so each row has that default too.
"""

import dataclasses
from typing import Any

from ..errors import UserError

Json = dict[str, Any]
Fields = tuple[tuple[str, str, Any], ...]
"""(our field, theirs, their default)."""


def read_fields(rows: Fields, hf_config: Json) -> Json:
    """Return our fields of a `config.json`."""
    return {field: hf_config.get(name, default) for field, name, default in rows}


def write_fields(rows: Fields, c: object) -> Json:
    """Return the fields of a `config.json` that say what `c` does."""
    values = dataclasses.asdict(c)
    return {name: values[field] for field, name, _ in rows}


def require(hf_config: Json, name: str, value: object) -> None:
    """Raise UserError when a field that we do not vary is there and has another value."""
    if hf_config.get(name, value) != value:
        raise UserError(f'config.json has {name} {hf_config[name]!r}, but this model here has {value!r} only')
