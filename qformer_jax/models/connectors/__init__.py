"""Connectors without a text side: a file each, with one class `Connector` (docs/variants.md says how to add one).

A connector is called with layer-normed features `[B, P, V]`, zero where the mask `[B, P]` says that none exists. It
returns tokens `[B, Q, D]` and which of them exist `[B, Q]`; what makes them as wide as the language model is not its
business.
"""

import importlib
import pkgutil

import flax.linen as nn
from jax.typing import DTypeLike

from ... import config
from ...errors import UserError, nearest


def names() -> list[str]:
    """Return the kinds that are here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def make(c: config.Connector, dtype: DTypeLike) -> nn.Module:
    """Return the connector that `c.kind` names; raises UserError where there is none."""
    path = f'{__name__}.{c.kind}' if c.kind in names() else c.kind
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f'{path}.'.startswith(f'{error.name}.'):  # something that the module itself imports
            raise
        raise UserError(
            f"no connector '{c.kind}'{nearest(c.kind, names())}: model.connector.kind is one of {', '.join(names())}, "
            'or the import path of a module with a class Connector'
        ) from None
    return module.Connector(c, dtype)
