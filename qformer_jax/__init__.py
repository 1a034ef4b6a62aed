"""BLIP-2 and its Q-Former in JAX: train the connector between a frozen vision tower and a frozen language model.

    >>> from qformer_jax import Blip2
    >>> Blip2.load('runs/instruct').ask(['cat.jpg'], ['what animal is this?'])
    ['cat']

Importing the package alone imports nothing else: `Blip2`, and JAX with it, comes when it is named.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.blip2 import Blip2

__all__ = ['Blip2']


def __getattr__(name: str) -> Any:
    if name == 'Blip2':
        from .inference.blip2 import Blip2

        return Blip2
    if name == '__version__':
        from importlib import metadata

        return metadata.version('qformer_jax')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, '__version__'})
