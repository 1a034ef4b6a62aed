"""Mutants of the attention masks: each taken for another, mirrored, and blind to padding."""

from collections.abc import Iterator
from itertools import permutations

import jax.numpy as jnp

from qformer_jax.models import masks
from qformer_jax.models.qformer import Qformer, QformerLayer

from .mutant import Mutant, method, replaced

QFORMER = ('unimodal', 'bidirectional', 'multimodal_causal')
CASES = ('small_stage1', 'qformer_modes')
PICTURES = ('low_variance_qformer_modes', 'qformer_modes')
DECODERS = ('low_variance_opt_stage2', 'low_variance_t5_stage2', 'opt_stage2', 't5_stage2')
# what the right mask of a decoder is replaced by: (right mask) -> mask
DECODER = {
    'sees what follows': lambda right: (
        lambda valid, start, length: jnp.broadcast_to(valid[:, None, None, :], (len(valid), 1, length, valid.shape[1]))
    ),
    'does not see itself': lambda right: lambda valid, start, length: right(valid, start - 1, length),
    'sees one ahead': lambda right: lambda valid, start, length: right(valid, start + 1, length),
    'sees padding': lambda right: lambda valid, start, length: right(jnp.ones_like(valid), start, length),
}
POSITIONS = {
    'padding counts': lambda right: lambda valid: right(jnp.ones_like(valid)),
    'begin at 1': lambda right: lambda valid: right(valid) + 1,
    "begin two rows early, in OPT's unused rows": lambda right: lambda valid: right(valid) - 2,
}


def mutants() -> Iterator[Mutant]:
    """Return them all."""
    for name, other in permutations(QFORMER, 2):
        wrong = getattr(masks, other)
        yield Mutant('mask', f'{name} is {other}', CASES, replaced(masks, name, lambda _, wrong=wrong: wrong))
    for name in QFORMER:
        yield Mutant('mask', f'{name} mirrored', CASES, replaced(masks, name, _mirrored))
        yield Mutant('mask', f'{name} sees padding', CASES, replaced(masks, name, _with_padding))
    whole = method(Qformer, 'project_normalised', lambda right, features, mask: right(features, jnp.ones_like(mask)))
    yield Mutant('mask', 'pictures: all patches exist', PICTURES, whole)
    yield Mutant(
        'mask', 'pictures: cross-attention sees all patches', PICTURES, method(QformerLayer, '__call__', _all_patches)
    )
    yield Mutant('mask', 'captions do not see the queries', CASES, method(Qformer, '__call__', _no_prefix))
    for name, wrong in DECODER.items():
        yield Mutant('mask', f'decoder {name}', DECODERS, replaced(masks, 'decoder', wrong))
    for name, wrong in POSITIONS.items():
        yield Mutant('mask', f'positions: {name}', DECODERS, replaced(masks, 'positions', wrong))


def _mirrored(right):
    return lambda *arguments: right(*arguments).swapaxes(-1, -2)


def _all_patches(right, x, num_queries, mask, image, image_mask, *rest):
    return right(x, num_queries, mask, image, None if image is None else jnp.ones_like(image_mask), *rest)


def _no_prefix(right, mask, *, prefix=None, **given):
    """Hide what was there before."""
    if prefix is not None:
        mask = mask & (jnp.arange(mask.shape[-1]) >= prefix[0].key.shape[1])[None, None, None]
    return right(mask, prefix=prefix, **given)


def _with_padding(right):
    return lambda num_queries, text_mask, *rest: right(num_queries, jnp.ones_like(text_mask), *rest)
