"""What a run does, as functions of plain arrays: the form in which it leaves this package.

    encode    (image) -> prefix                                   what the language model reads of a picture
    prefill   (prefix, prompt, prompt_mask, room) -> logits, state          of the first new token
    step      (last, state) -> logits, state                                of the token after `last`

The first argument of each are its weights, a dict by parameter path (`models/quantized.py` says how small ones lie).
`state` is a dict of arrays as well, so that nothing of Flax or of this package is in a signature. Of `room` only the
length counts: so many tokens can be written. Shapes are symbolic, one function for every size:

    b  rows          p  rows of a feature array     s  places of a sequence: queries, prompt, and room after them
    t  text tokens   g  room for new tokens         m  places of T5's decoder, whose sequence is the encoder's
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.export import SymbolicScope, symbolic_shape
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import DTypeLike

from .. import config
from ..errors import UserError
from ..models.blip2 import Blip2, shapes
from ..models.quantized import together
from ..rules import flatten, unflatten
from ..typing import Array, Params
from . import decode
from .search import Start

Spec = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Function:
    """A function of (weights by path, *inputs)."""

    name: str
    call: Callable
    weights: dict[str, Spec]
    inputs: dict[str, Any]
    """Name -> shape and type, or a dict of those, in the order of the arguments."""
    outputs: tuple[str, ...]


def functions(run: config.Run, weights: dict[str, Array | Spec]) -> tuple[Function, ...]:
    """Return what a run does, given its weights (or their shapes) by path; raises UserError if it does not write."""
    if not (run.model.qformer and run.model.lm):
        raise UserError(f"a '{run.stage}' run does not write: give a 'stage2' or 'instruct' run")
    reads = run.objective.instruction_aware
    connector = dataclasses.replace(run.model.qformer, text_side='reads' if reads else 'none')
    network = Blip2(dataclasses.replace(run.model, qformer=connector, word_head=0), jnp.dtype(run.training.dtype))
    held = {path: Spec(x.shape, x.dtype) for path, x in weights.items()}
    return encode(network, held, reads), *language_model(network, held)


def encode(network: Blip2, weights: dict[str, Spec], reads: bool) -> Function:
    """Return `encode`, from pictures (or feature arrays) to soft prefixes; `reads`: the Q-Former reads a text too."""
    c = network.config
    array = _arrays(f't <= {c.qformer.max_positions}') if reads else _arrays()
    if c.vit:
        seen = {'image': array(f'b, {c.vit.image_size}, {c.vit.image_size}, 3', jnp.uint8)}
    else:
        seen = {'features': array(f'b, p, {c.qformer.feature_width}', jnp.float32), 'feature_mask': array('b, p', bool)}
    asked = {'text': array('b, t', jnp.int32), 'text_mask': array('b, t', bool)} if reads else {}

    def body(model: Blip2, *arrays: Array) -> Array:
        features = model.see(**dict(zip(seen, arrays, strict=False)))
        return model.soft_prefix(*features, *arrays[len(seen) :])

    def call(weights: dict[str, Array], *arrays: Array) -> Array:
        return nn.apply(body, network)({'params': _nested(weights)}, *arrays)

    used = _of(weights, network.config, 'vit', 'qformer', 'lm_projection')
    return Function('encode', call, used, seen | asked, ('prefix',))


def language_model(network: Blip2, weights: dict[str, Spec]) -> tuple[Function, Function]:
    """Return `prefill` and `step`."""
    c, queries = network.config.lm, network.config.qformer.num_queries
    places = [] if c.family == 't5' else [f'{queries} + t + g - 1 <= {c.max_positions}']
    array = _arrays(*places)
    inputs = {
        'prefix': array(f'b, {queries}, {c.input_width}', network.dtype),
        'prompt': array('b, t', jnp.int32),
        'prompt_mask': array('b, t', bool),
        'room': array('g', bool),
    }

    def begin(weights: Params, *prompt: Array) -> Start:
        return decode.start_lm(network, _nested(weights), *prompt[:-1], prompt[-1].shape[0])[1]

    used = _of(weights, network.config, 'lm')
    begun = jax.eval_shape(begin, used, *inputs.values())
    names, structure = list(_by_name(begun.cache)), jax.tree.structure(begun.cache)

    def prefill(*arrays) -> tuple[Array, Params]:
        read = begin(*arrays)
        return read.logits, _by_name(read.cache)

    def step(weights: Params, last: Array, state: Params) -> tuple[Array, Params]:
        cache = jax.tree.unflatten(structure, [state[name] for name in names])
        logits, cache = decode.lm_step(network, _nested(weights))(cache, last)
        return logits, _by_name(cache)

    going_on = _renamed({'last': Spec(begun.logits.shape[:1], jnp.int32), 'state': _by_name(begun.cache)})
    outputs = 'logits', 'state'
    return Function('prefill', prefill, used, inputs, outputs), Function('step', step, used, going_on, outputs)


def _arrays(*constraints: str) -> Callable[[str, DTypeLike], Spec]:
    """Return what makes a shape of names and numbers, 'b, 4, t'; names in one function's shapes mean the same."""
    scope = SymbolicScope(constraints)
    return lambda shape, dtype: Spec(symbolic_shape(shape, scope=scope), dtype)


def _of(weights: dict[str, Spec], c: config.Blip2, *components: str) -> dict[str, Spec]:
    """Return those weights of the components that this network has; small ones lie as PATH/values and PATH/scale."""
    has = {path for path in flatten(shapes(c)) if path.split('/')[0] in components}
    return {path: x for path, x in weights.items() if path in has or path.rpartition('/')[0] in has}


def _nested(weights: dict[str, Array]) -> Params:
    return unflatten(together(weights))


def _by_name(tree: Any) -> dict[str, Any]:
    """Return the leaves of any tree by their paths in it: `layers/0/key`."""
    return {keystr(path, simple=True, separator='/'): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def _renamed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return shapes that `prefill` gives as `step` takes them: what were `t + g + 3` places are some number `s`."""
    sizes = {str(size) for x in jax.tree.leaves(inputs) for size in x.shape if not isinstance(size, int)}
    longest_first = sorted(sizes - {'b'}, key=len, reverse=True)
    new = dict(zip(['b', *longest_first], symbolic_shape('b, s, m'), strict=False))
    return jax.tree.map(lambda x: Spec([new.get(str(size), size) for size in x.shape], x.dtype), inputs)
