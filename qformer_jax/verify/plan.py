"""Sorts what a case holds: inputs, arrays that we compute, gradients, and what nobody knows."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UserError
from ..typing import Params
from . import keys
from .case import Case
from .work import Arrays, Function, Work

KEY_BIAS = "softmax does not see a key's bias (its gradient is zero): compared by the keys that it gives"


def plan(
    case: Case,
    params: Params,
    inputs: Arrays,
    function: Function,
    gradients: dict[str, np.ndarray] | None = None,
    left_out: dict[str, str] | None = None,
    derived: dict[str, np.ndarray] | None = None,
    unstable: Iterable[str] = (),
) -> Work:
    """Return the work of a case; an array or a gradient file that nothing accounts for becomes a row that fails.

    `derived` is what follows from recorded arrays and is compared besides them; `unstable` is what rounding can turn.
    """
    gradients, left_out = gradients or {}, dict(left_out or {})
    left_out |= dict.fromkeys((name for name in gradients if name.endswith('/key/bias')), KEY_BIAS)

    def whole(params, inputs, dtype):
        return function(params, inputs, dtype) | keys.computed(params, dtype)

    arguments = jax.tree.map(jnp.asarray, (params, inputs))
    try:
        computed = jax.eval_shape(lambda p, x: whole(p, x, jnp.dtype('float32')), *arguments)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'{case.folder}: its arrays do not fit the sizes in its meta.json: {reason}') from error
    given = (name for name in inputs if name in case.arrays and name not in computed)
    left_out |= dict.fromkeys(given, 'input')
    expected = {name: x for name, x in case.arrays.items() if name in computed and name not in left_out}
    return Work(
        params,
        inputs,
        whole,
        expected | (keys.recorded(case.state) if params else {}) | (derived or {}),
        {name: x for name, x in gradients.items() if name not in left_out},
        tuple(_unknown(case, expected, gradients, left_out)),
        left_out,
        frozenset(unstable),
    )


def _unknown(case: Case, expected: Arrays, gradients: Arrays, left_out: dict[str, str]) -> Iterable[str]:
    yield from (name for name in case.arrays if name not in expected and name not in left_out)
    known = {name.partition(':')[0] for name in gradients}
    yield from (path.name for path in sorted(case.folder.glob('grads*.safetensors')) if path.name not in known)
