"""The dimension legend, and the array types that signatures carry.

| letter | dimension                  | letter | dimension               |
|--------|----------------------------|--------|-------------------------|
| B      | batch                      | D      | Q-Former width          |
| Q      | queries                    | V      | vision (feature) width  |
| T      | text tokens                | L      | language-model width    |
| P      | patches (+ class token)    | E      | shared embedding width  |
| H      | heads                      | N      | vocabulary              |
| K      | width of one head          | M      | cache (keys seen)       |
| S      | sequence = queries + text  | C      | candidates              |
| G      | generated tokens           | W      | texts of a row (beams)  |

Signatures read `Float['B P V']`; `tests/` checks them at run time through jaxtyping and beartype.
"""

from typing import Any

import jax
import jaxtyping
import numpy as np

Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct  # the last one: what jax.eval_shape makes of arrays
Params = dict[str, Any]  # nested dict of arrays, one entry a layer: the canonical tree
Size = Any  # a length: an int, or a name for any while a function is exported for all sizes (jax.export)


class _Shaped:
    """`Float['B P V']`: jaxtyping's class for any array with that shape."""

    def __init__(self, kind: type):
        self.kind = kind

    def __getitem__(self, shape: str) -> Any:
        return self.kind[Array, shape]


Float = _Shaped(jaxtyping.Float)
Int = _Shaped(jaxtyping.Int)
Bool = _Shaped(jaxtyping.Bool)
UInt8 = _Shaped(jaxtyping.UInt8)
UInt32 = _Shaped(jaxtyping.UInt32)
