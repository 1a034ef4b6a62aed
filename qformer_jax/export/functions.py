"""What a run does, as functions of plain arrays: the form in which it leaves this package.

A run that writes (stage 2 and later):

    encode    (image) -> prefix, prefix_mask                      what the language model reads of a picture or a video
    prefill   (prefix, prefix_mask, prompt, prompt_mask, room) -> logits, state       of the first new token
    step      (last, state) -> logits, state                                of the token after `last`

A run that finds (stage 1):

    image     (image) -> queries                                  unit vectors of a picture's queries
    text      (text, text_mask) -> vector                         the unit vector of a text

The first argument of each are its weights, a dict by parameter path (`models/quantized.py` says how small ones lie).
`state` is a dict of arrays as well, so that nothing of Flax or of this package is in a signature. Of `room` only the
length counts: so many tokens can be written. Shapes are symbolic, one function for every size.
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
from ..inference import decode
from ..inference.generate import PrefillState
from ..models import masks
from ..models.blip2 import Blip2Module, Prefix, shapes
from ..models.quantized import from_flat
from ..rules import flatten, unflatten
from ..typing import Array, Params

Spec = jax.ShapeDtypeStruct
SIZES = {
    'b': 'rows',
    'p': 'rows of a feature array',
    'f': 'frames of a video',
    'q': 'vectors of a prefix',
    't': 'tokens of a text',
    'g': 'new tokens to make room for',
    's': 'places of a sequence: queries, prompt, and the room after them',
    'm': "places of T5's decoder, beside the sequence of its encoder; or what gated layers read of a picture",
}
"""What the names in shapes mean."""


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
    """Return what a run does, given its weights (or their shapes) by path; raises UserError for a tower alone."""
    c, reads = run.model, run.objective.instruction_aware
    finds = c.qformer and c.qformer.text_side in ('full', 'retrieval')
    if not (c.qformer or c.connector) or not (c.lm or finds):
        raise UserError(f"a '{run.stage}' run neither writes nor finds pictures: give a run from 'stage1' on")
    side = 'retrieval' if not c.lm else 'reads' if reads else 'none'
    qformer = dataclasses.replace(c.qformer, text_side=side) if c.qformer else None
    c = dataclasses.replace(c, qformer=qformer, word_head=0)
    network, held = (
        Blip2Module(c, jnp.dtype(run.training.dtype)),
        {k: Spec(x.shape, x.dtype) for k, x in weights.items()},
    )
    if not c.lm:
        return image(network, held), text(network, held)
    return encode(network, held, reads), *language_model(network, held)


def encode(network: Blip2Module, weights: dict[str, Spec], reads: bool) -> Function:
    """Return `encode`; an instruction-aware Q-Former `reads` a text too."""
    array = _arrays(f't <= {network.config.qformer.max_positions}') if reads else _arrays()
    image_inputs = _picture(network.config, array)
    text_inputs = _text(array) if reads else {}

    def body(model: Blip2Module, *arrays: Array) -> tuple[Array, Array]:
        features = model.vision_features(**dict(zip(image_inputs, arrays, strict=False)))
        prefix = model.soft_prefix(*features, *arrays[len(image_inputs) :])
        return prefix.vectors, prefix.mask

    used = _of(weights, network.config, 'vit', *config.BETWEEN)
    return Function('encode', _bound(network, body), used, image_inputs | text_inputs, ('prefix', 'prefix_mask'))


def image(network: Blip2Module, weights: dict[str, Spec]) -> Function:
    """Return `image`: how well a picture fits a text is the product of the text with the query that fits best."""
    inputs = _picture(network.config, _arrays())

    def body(model: Blip2Module, *arrays: Array) -> Array:
        features = model.vision_features(**dict(zip(inputs, arrays, strict=True)))
        return model.qformer.embed_image(model.query_features(*features).queries)

    used = _of(weights, network.config, 'vit', 'time', 'qformer')
    return Function('image', _bound(network, body), used, inputs, ('queries',))


def text(network: Blip2Module, weights: dict[str, Spec]) -> Function:
    """Return `text`."""

    def body(model: Blip2Module, text: Array, mask: Array) -> Array:
        return model.qformer.embed_text(model.qformer(masks.unimodal(0, mask), text=text).text)

    inputs = _text(_arrays(f't <= {network.config.qformer.max_positions}'))
    return Function('text', _bound(network, body), _of(weights, network.config, 'qformer'), inputs, ('vector',))


def language_model(network: Blip2Module, weights: dict[str, Spec]) -> tuple[Function, Function]:
    """Return `prefill` and `step`."""
    c = network.config.lm
    beside = '' if network.config.gates else 'q + '  # in front of the text
    places = [] if c.position_limit is None else [f'{beside}t + g - 1 <= {c.position_limit}']
    array = _arrays(*places)
    inputs = {
        'prefix': array(f'b, q, {c.input_width}', network.dtype),
        'prefix_mask': array('b, q', bool),
        'prompt': array('b, t', jnp.int32),
        'prompt_mask': array('b, t', bool),
        'room': array('g', bool),
    }

    def begin(weights: Params, vectors: Array, prefix_mask: Array, *prompt: Array) -> PrefillState:
        given = Prefix(vectors, prefix_mask), *prompt[:-1]
        return decode.prefill_lm(network, _nested(weights), *given, prompt[-1].shape[0])[1]

    used = _of(weights, network.config, 'lm', 'gates')
    begun = jax.eval_shape(begin, used, *inputs.values())
    names, structure = list(_by_name(begun.cache)), jax.tree.structure(begun.cache)

    def prefill(*arrays) -> tuple[Array, Params]:
        read = begin(*arrays)
        return read.logits, _by_name(read.cache)

    def step(weights: Params, last: Array, state: Params) -> tuple[Array, Params]:
        cache = jax.tree.unflatten(structure, [state[name] for name in names])
        logits, cache = decode.make_decode_step(network, _nested(weights))(cache, last)
        return logits, _by_name(cache)

    going_on = _renamed({'last': Spec(begun.logits.shape[:1], jnp.int32), 'state': _by_name(begun.cache)})
    outputs = 'logits', 'state'
    return Function('prefill', prefill, used, inputs, outputs), Function('step', step, used, going_on, outputs)


def _arrays(*constraints: str) -> Callable[[str, DTypeLike], Spec]:
    """Return what makes a shape of names and numbers, 'b, 4, t'; names in one function's shapes mean the same."""
    scope = SymbolicScope(constraints)
    return lambda shape, dtype: Spec(symbolic_shape(shape, scope=scope), dtype)


def _picture(c: config.Blip2Config, array: Callable[[str, DTypeLike], Spec]) -> dict[str, Spec]:
    if c.vit:
        pixels = f'{c.vit.image_size}, {c.vit.image_size}, 3'
        if c.time:
            return {'image': array(f'b, f, {pixels}', jnp.uint8), 'frame_mask': array('b, f', bool)}
        return {'image': array(f'b, {pixels}', jnp.uint8)}
    return {'features': array(f'b, p, {c.feature_width}', jnp.float32), 'feature_mask': array('b, p', bool)}


def _text(array: Callable[[str, DTypeLike], Spec]) -> dict[str, Spec]:
    return {'text': array('b, t', jnp.int32), 'text_mask': array('b, t', bool)}


def _bound(network: Blip2Module, body: Callable) -> Callable:
    """Return `body(bound network, *arrays)` as a function of (weights by path, *arrays)."""

    def call(weights: Params, *arrays: Array) -> Any:
        return nn.apply(body, network)({'params': _nested(weights)}, *arrays)

    return call


def _of(weights: dict[str, Spec], c: config.Blip2Config, *components: str) -> dict[str, Spec]:
    """Return those weights of the components that this network has; small ones lie as PATH/values and PATH/scale."""
    has = {path for path in flatten(shapes(c)) if path.split('/')[0] in components}
    return {path: x for path, x in weights.items() if path in has or path.rpartition('/')[0] in has}


def _nested(weights: dict[str, Array]) -> Params:
    return unflatten(from_flat(weights))


def _by_name(tree: Any) -> dict[str, Any]:
    """Return the leaves of any tree by their paths in it: `layers/0/key`."""
    return {keystr(path, simple=True, separator='/'): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def _renamed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return shapes that `prefill` gives as `step` takes them: what were `t + g + 3` places are some number `s`."""
    sizes = {str(size) for x in jax.tree.leaves(inputs) for size in x.shape if not isinstance(size, int)}
    longest_first = sorted(sizes - {'b'}, key=len, reverse=True)
    new = dict(zip(['b', *longest_first], symbolic_shape('b, s, m'), strict=False))
    return jax.tree.map(lambda x: Spec([new.get(str(size), size) for size in x.shape], x.dtype), inputs)
