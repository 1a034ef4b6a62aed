"""What a function costs, counted from shapes: the multiplications and additions of its products.

Products of matrices and convolutions are counted (2 x M x N x K); what works element by element is not: in a
transformer of width 768 that is about a hundredth of the whole. Loops count as often as they run, unlike in XLA's own
count, which takes a loop's body once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn


def flops(function: Callable, *arguments: Any) -> int:
    """Return the FLOPs of the products in `function(*arguments)`; the arguments may be shapes (`jax.eval_shape`'s)."""
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def compiled_flops(function: Callable, *arguments: Any) -> float:
    """Return XLA's own count, elementwise work included, of the program that it makes for this device."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()['flops']


def _of_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: JaxprEqn) -> int:
    """Return a product's FLOPs, or those inside: a scan's body times its length, a branch as its dearest side."""
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        shared = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * math.prod(equation.outvars[0].aval.shape) * shared
    if name == 'conv_general_dilated':
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params['dimension_numbers'].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // outputs
    if name == 'cond':
        return max(_of_jaxpr(branch.jaxpr) for branch in params['branches'])
    inside = (x for value in params.values() for x in (value if isinstance(value, tuple) else (value,)))
    found = sum(_of_jaxpr(getattr(x, 'jaxpr', x)) for x in inside if hasattr(getattr(x, 'jaxpr', x), 'eqns'))
    return found * params.get('length', 1) if name == 'scan' else found
