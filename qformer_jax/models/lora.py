"""LoRA (Hu et al. 2021): a step of low rank beside products whose weights stay frozen.

    y = x W + alpha / rank * (x down) up        equation 3; `down` is their A, `up` their B, both transposed

The component `lora` holds `PATH/down` [I, R] and `PATH/up` [R, O] for the dense layer `lm/PATH`. `up` begins at zero:
before the first step the language model is, to the last bit, what it was.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from .. import config
from ..errors import UserError
from ..rules import flatten, match, unflatten
from ..typing import Array, Params


@struct.dataclass
class Adapted:
    """What stands in the place of a kernel [I, O]: the kernel, which may be quantized, and the step beside it."""

    kernel: Any
    down: Any
    up: Any
    scale: float = struct.field(pytree_node=False)
    """alpha / rank."""

    def merged(self) -> Array:
        """Return kernel and step as one array of the kernel's type; the sum is rounded once, from float32."""
        kernel, down, up = (np.asarray(x).astype(np.float32) for x in (self.kernel, self.down, self.up))
        return (kernel + self.scale * (down @ up)).astype(self.kernel.dtype)


def init(c: config.LoraConfig, lm: Params, key: jax.Array) -> Params:
    """Return fresh steps for a language model, of which only shapes are read; raises UserError if none is chosen.

    `down` is Gaussian and keeps the variance of its input, `up` is zero (section 4.1).
    """
    dense = {path.removesuffix('/kernel'): kernel for path, kernel in flatten(lm).items() if path.endswith('/kernel')}
    chosen = match(((c.targets, True), ('.*', False)), dense)
    if not any(chosen.values()):
        some = ', '.join(list(dense)[:6])
        raise UserError(f"model.lora.targets '{c.targets}' fits no dense layer of the language model: {some}, ...")
    steps = {}
    for i, path in enumerate(path for path in dense if chosen[path]):
        inputs, outputs = dense[path].shape
        down = jax.random.normal(jax.random.fold_in(key, i), (inputs, c.rank)) * inputs**-0.5
        steps |= {f'{path}/down': down, f'{path}/up': jnp.zeros((c.rank, outputs))}
    return unflatten(steps)


def adapt(params: Params, c: config.LoraConfig | None) -> Params:
    """Return the parameters with each step at its kernel, and no component `lora`: what `apply` takes."""
    if c is None:
        return params
    flat = flatten(params)
    steps = {path: flat.pop(path) for path in list(flat) if path.startswith('lora/')}
    for path in (path.removesuffix('/down') for path in steps if path.endswith('/down')):
        kernel = f'lm/{path.removeprefix("lora/")}/kernel'
        flat[kernel] = Adapted(flat[kernel], steps[f'{path}/down'], steps[f'{path}/up'], c.alpha / c.rank)
    return unflatten(flat)


def merge(params: Params, c: config.LoraConfig | None) -> Params:
    """Return the parameters with each step added to its kernel, and no component `lora`: a model like any other."""
    flat = flatten(adapt(params, c))
    return unflatten({path: leaf.merged() if isinstance(leaf, Adapted) else leaf for path, leaf in flat.items()})
