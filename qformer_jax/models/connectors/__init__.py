"""Connectors without a text side: a file each, with one class `Connector` (docs/variants.md says how to add one).

A connector is called with layer-normed features `[B, P, V]`, zero where the mask `[B, P]` says that none exists. It
returns tokens `[B, Q, D]` and which of them exist `[B, Q]`; what makes them as wide as the language model is not its
business.
"""

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

import flax.linen as nn
from jax.typing import DTypeLike

from ... import config
from ...errors import UserError, nearest


def names() -> list[str]:
    """Return the kinds that are here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def make(c: config.ConnectorConfig, dtype: DTypeLike) -> nn.Module:
    """Return the connector that `c` names, or the one of its `module`; raises UserError where there is none.

    A name never imports anything but the files of this folder: it may come from a run that somebody else made.
    """
    built_in = c.kind in names()
    if c.module and built_in:
        raise UserError(f"model.connector.kind '{c.kind}' is one of the package's: name your own (module) otherwise")
    if c.module:
        return c.module(c, dtype)
    if not built_in:
        raise UserError(
            f"no connector '{c.kind}'{nearest(c.kind, names())}: model.connector.kind is one of {', '.join(names())}; "
            f"of your own, a recipe gives the class (Connector(kind='{c.kind}', module=YourClass)), and whoever uses "
            'the run names its file (--connector FILE)'
        )
    return importlib.import_module(f'{__name__}.{c.kind}').Connector(c, dtype)


def from_file(path: Path) -> type[nn.Module]:
    """Return the class `Connector` of a Python file, which is run; raises UserError where there is none."""
    if not path.is_file() or path.suffix != '.py':
        raise UserError(f"'{path}' is no .py file: name the one with your class Connector")
    spec = importlib.util.spec_from_file_location(f'{path.stem}_{abs(hash(path.resolve()))}', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names of their annotations
    spec.loader.exec_module(module)
    if not isinstance(found := getattr(module, 'Connector', None), type):
        raise UserError(f"'{path}' defines no class Connector (docs/variants.md has one)")
    return found
