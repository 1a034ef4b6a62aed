"""Sorts what a case holds: inputs, arrays that we compute, gradients, and what nobody knows."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ...errors import UserError
from ...typing import Params
from . import key_bias
from .case import Case
from .comparison import PRECISION, Arrays, Function, Work

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

    @partial(jax.jit, static_argnums=(2, 3))  # what `eval_shape` traces here serves the first computation too
    def whole(params: Params, inputs: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        return function(params, inputs, dtype, gradients) | key_bias.computed(params, dtype)

    arguments = jax.tree.map(jnp.asarray, (params, inputs))
    try:
        with jax.default_matmul_precision(PRECISION):
            computed = jax.eval_shape(whole, *arguments, jnp.dtype('float32'), bool(gradients))
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'{case.folder}: its arrays do not fit the sizes in its meta.json: {reason}') from error
    given = (name for name in inputs if name in case.arrays and name not in computed)
    left_out |= dict.fromkeys(given, 'input')
    expected = case.arrays | (key_bias.recorded(case.state) if params else {}) | (derived or {})
    expected, gradients = ({n: x for n, x in found.items() if n not in left_out} for found in (expected, gradients))
    unknown = [name for name in expected | gradients if name not in computed] + list(_unread(case, gradients))
    expected, gradients = ({n: x for n, x in found.items() if n in computed} for found in (expected, gradients))
    return Work(params, inputs, whole, expected, gradients, tuple(unknown), left_out, frozenset(unstable), case.noise)


def _unread(case: Case, gradients: Arrays) -> Iterable[str]:
    """Return the files of gradients that nobody read."""
    known = {name.partition(':')[0] for name in gradients}
    yield from (path.name for path in sorted(case.folder.glob('grads*.safetensors')) if path.name not in known)
