"""JSON files: read with errors that name file, line or path, and what was expected; written beside and renamed."""

import json
import re
from pathlib import Path
from types import GenericAlias
from typing import Any, TypeVar

import msgspec

from . import atomic
from .errors import UserError, nearest

Kind = TypeVar('Kind')

_DEPTH = 100  # levels of nesting; nothing of ours has ten
_SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')
_UNKNOWN = re.compile(r'Object contains unknown field `([^`]*)`')


def read(file: Path, kind: type[Kind] | GenericAlias, remedy: str) -> Kind:
    """Return what a JSON file holds as `kind` (a `msgspec.Struct`, or a type of builtins such as `dict[str, float]`).

    `remedy` says how to get an intact one. Raises UserError when the file is missing, unreadable, or holds anything
    else, naming the line, or the path of the value.
    """
    return typed(parse(read_text(file, remedy), str(file), remedy), kind, str(file), remedy)


def write(file: Path, tree: Any) -> None:
    """Write a tree of builtins, keys sorted; the file appears whole or not at all."""
    atomic.write_text(file, json.dumps(tree, indent=1, sort_keys=True))


def read_text(file: Path, remedy: str) -> str:
    """Return the text of a UTF-8 file without a byte-order mark; raises UserError when there is none."""
    try:
        return file.read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{file}: not UTF-8 text (byte {error.start}); {remedy}') from None
    except (OSError, ValueError) as error:
        raise UserError(f'{file}: {getattr(error, "strerror", None) or error}; {remedy}') from None


def parse(text: str, where: str, remedy: str) -> Any:
    """Return the tree of a JSON text; raises UserError, with the line, when it is none that can be used."""
    try:
        tree = json.loads(text)
        _check_depth(tree)
        if _SURROGATE.search(text):
            json.dumps(tree, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f' line {error.lineno}' if '\n' in text.strip() else ''
        raise UserError(f'{where}{line}: not JSON ({error.msg}, column {error.colno}); {remedy}') from None
    except RecursionError:
        raise UserError(f'{where}: nested deeper than {_DEPTH} levels; {remedy}') from None
    except UnicodeEncodeError:
        raise UserError(f'{where}: holds half of a surrogate pair, which is no text; {remedy}') from None
    except ValueError:
        raise UserError(f'{where}: holds a whole number of thousands of digits; {remedy}') from None
    return tree


def typed(tree: Any, kind: type[Kind] | GenericAlias, where: str, remedy: str) -> Kind:
    """Return a tree of builtins as `kind`; raises UserError that names the path and what was expected."""
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise UserError(f'{where}: {_named(str(error), kind)}; {remedy}') from None


def _named(message: str, kind: Any) -> str:
    """Return msgspec's message, with the nearest known key for one that is unknown at the top."""
    message = message.replace('`$.', '`').replace('`$', '`')
    unknown = _UNKNOWN.fullmatch(message)
    if not unknown:
        return message
    known = getattr(kind, '__struct_encode_fields__', ())
    return f"unknown key '{unknown.group(1)}'{nearest(unknown.group(1), known)}; known are {', '.join(known)}"


def _check_depth(tree: Any, depth: int = 0) -> None:
    if depth > _DEPTH:
        raise RecursionError
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _check_depth(value, depth + 1)
