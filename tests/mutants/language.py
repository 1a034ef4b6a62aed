"""Mutants of the towers' position tables and of the language models: offsets, scales, distances, shifts."""

from collections.abc import Iterator

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from qformer_jax.models import blip2, t5, vit

from .mutant import Mutant, method, replaced

TOWERS = ('low_variance_eva_vit', 'low_variance_clip_vit')
OPT = ('low_variance_opt_stage2', 'opt_stage2')
T5 = ('low_variance_t5_stage2', 't5_stage2')


def mutants() -> Iterator[Mutant]:
    """Return them all."""
    for tower, wrong in (('eva', 'align_corners'), ('clip', 'half_pixel')):
        resize = replaced(
            vit, 'bicubic_matrix', lambda right, wrong=wrong: lambda old, new, rule: right(old, new, wrong)
        )
        yield Mutant('tower', f'{tower}: positions resized by {wrong}', (f'low_variance_{tower}_vit',), resize)
    linear = replaced(vit, 'bicubic_matrix', lambda _: _linear)
    yield Mutant('tower', 'positions resized linearly', TOWERS, linear)
    yield Mutant(
        'language', 'OPT: predicts its own token', OPT, method(blip2.Blip2Module, 'target_hidden_states', _late)
    )
    for name, (function, wrong) in OF_T5.items():
        yield Mutant('language', f'T5: {name}', T5, replaced(t5, function, wrong))
    yield Mutant('language', 'T5: reads what it writes', T5, replaced(t5, 'shift_right', lambda _: _unshifted))
    yield Mutant('language', 'T5: decoder reads padding', T5, method(t5.T5, 'encode', _everything_exists))
    yield Mutant('language', 'T5: encoder reads padding', T5, method(t5.T5Encoder, '__call__', _reads_padding))


def _linear(old: int, new: int, rule: str) -> np.ndarray:
    where = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(where[:, None] - np.arange(old)[None]))


def _late(right, prefix, text, text_mask, target):
    return jnp.roll(right(prefix, text, text_mask, target), -1, axis=1)


def _unshifted(text, target):
    return jnp.where(target, text, t5.START_ID)


def _everything_exists(right, *arguments):
    memory = right(*arguments)
    return memory.replace(mask=jnp.ones_like(memory.mask))


def _reads_padding(right, x, token_mask):
    return right(x, jnp.ones_like(token_mask))


def _one_sided(right):
    def bias(table, query_position, key_position, max_distance, *, both_sides):
        return right(table, query_position, key_position, max_distance, both_sides=False)

    return bias


def _two_sided(right):
    def bias(table, query_position, key_position, max_distance, *, both_sides):
        return right(table, query_position, key_position, max_distance, both_sides=True)

    return bias


def _mirrored(right):
    def bias(table, query_position, key_position, max_distance, *, both_sides):
        return right(table, -query_position, -key_position, max_distance, both_sides=both_sides)

    return bias


def _no_logarithm(_):
    return lambda buckets, max_distance: np.minimum(np.arange(max_distance + 1), buckets - 1).astype(np.int32)


def _scaled(right):
    def attend(query, kv, mask, bias=None, *, scale):
        return right(query, kv, mask, bias, scale=query.shape[-1] ** -0.5)

    return attend


def _with_mean(_):
    return lambda eps, dtype: nn.LayerNorm(epsilon=eps, dtype=dtype, use_bias=False, use_fast_variance=False)


OF_T5 = {
    'scores scaled': ('attend', _scaled),
    'encoder looks back only': ('relative_bias', _one_sided),
    'decoder has buckets for what follows': ('relative_bias', _two_sided),
    'distances mirrored': ('relative_bias', _mirrored),
    'distances without logarithm': ('distance_buckets', _no_logarithm),
    'norms subtract the mean': ('rms_norm', _with_mean),
    'starts with </s>': ('START_ID', lambda _: 1),
}
