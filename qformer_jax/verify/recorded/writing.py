"""What a model writes, beside recorded generations: ids, scores of beams, and greedy search's logits step by step.

A recording holds the prompt, the new tokens, an end token, and padding up to the longest row. Greedy logits are
computed after the recorded tokens, so that one different choice shows as one difference.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ...typing import Array, Int
from .case import Case
from .comparison import Arrays
from .generation import Replay

KINDS = ('sequences', 'sequences_scores', 'step_scores', 'top2_gap')
Write = Callable[[str, dict, Array], Replay]
"""(name of the recording, its arguments, its ids) -> our replay."""


def names(case: Case) -> list[str]:
    """Return the names of the recorded generations."""
    return [name for name in case.meta.get('generate_kwargs', {}) if f'{name}.sequences' in case.arrays]


def unstable(case: Case) -> list[str]:
    """Return the arrays that take another turn where rounding decides between two words."""
    return [f'{name}.{kind}' for name in names(case) for kind in ('sequences', 'sequences_scores')]


def padded(case: Case, pad_id: int) -> Case:
    """Return the case with every recorded generation as long as it might have become."""
    longer = {f'{name}.sequences': _padded(case, name, pad_id) for name in names(case)}
    return Case(case.folder, case.meta, case.arrays | longer)


def _padded(case: Case, name: str, pad_id: int) -> Int['R M']:
    ids, arguments = case.array(f'{name}.sequences'), case.meta['generate_kwargs'][name]
    prompt = prompt_length(arguments)
    longest = prompt + arguments['max_new_tokens'] if 'max_new_tokens' in arguments else arguments['max_length']
    return np.pad(ids, ((0, 0), (0, longest - ids.shape[1])), constant_values=pad_id)


def prompt_length(arguments: dict) -> int:
    """Return how many ids a recording starts with; an encoder-decoder's is its start token."""
    return arguments['input_ids'][1] if 'input_ids' in arguments else 1


def written(case: Case, write: Write, end_id: int, pad_id: int) -> Arrays:
    """Return our side of every generation, by its recorded names."""
    out = {}
    for name in names(case):
        arguments, recorded = case.meta['generate_kwargs'][name], case.array(f'{name}.sequences')
        replayed = write(name, arguments, recorded)
        tokens = replayed.written.tokens.reshape(-1, replayed.written.tokens.shape[-1])
        ended = jnp.cumsum(tokens == end_id, axis=1) - (tokens == end_id) > 0
        prompt = jnp.asarray(recorded[:, : prompt_length(arguments)])
        out[f'{name}.sequences'] = jnp.concatenate([prompt, jnp.where(ended, pad_id, tokens)], axis=1)
        out[f'{name}.sequences_scores'] = replayed.written.scores.reshape(-1)
        if replayed.step_scores is not None:
            steps = replayed.step_scores[:, : case.array(f'{name}.step_scores').shape[1]]
            best = jax.lax.top_k(steps, 2)[0]
            out |= {f'{name}.step_scores': steps, f'{name}.top2_gap': best[..., 0] - best[..., 1]}
    return out
