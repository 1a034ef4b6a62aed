"""LAVIS's recorded generations, written again: one function a kind of case.

A recording holds normalised pixels, the arguments of transformers' `generate()` (arrays as their shapes) and the ids
that it returned, `sequences`: the prompt, the new tokens, an end token and padding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ...inference import decode, forward
from ...inference.generate import GenerationConfig, GenerationOutput, generate, step_scores
from ...models.blip2 import Blip2Module
from ...typing import Bool, Float, Int, Params

T5_END = 1  # `</s>`, which LAVIS leaves to T5's configuration


@struct.dataclass
class Replay:
    """What we write, beside what was recorded."""

    written: GenerationOutput
    recorded: Int['B W G']
    """The recorded tokens as `written.tokens` would hold them: filled with end tokens from the end of a text on."""
    step_scores: Float['B g N'] | None
    """Greedy search only: the processed logits before each recorded token, given the recorded ones before it."""


def with_opt(
    model: Blip2Module, params: Params, pixels: Float['B 3 S S'], arguments: dict[str, Any], sequences: Int['R M']
) -> Replay:
    """Replay `Blip2OPT.generate`, with a hole before each prompt, as unlike prompts have: it may not count."""
    settings = settings_of(arguments, arguments['eos_token_id'])
    prompt = sequences[:: settings.num_return, : _prompt_length(arguments)]
    prefix = forward.soft_prefix(model, params, *_see(model, params, pixels))
    inputs = prefix, *(np.pad(x, ((0, 0), (1, 0))) for x in (prompt, np.ones(prompt.shape, bool)))
    return _replay(decode.prefill_lm, model, params, inputs, settings, sequences[:, prompt.shape[1] :])


def with_t5(
    model: Blip2Module,
    params: Params,
    pixels: Float['B 3 S S'],
    prompt: Int['B T'],
    prompt_mask: Bool['B T'],
    arguments: dict[str, Any],
    sequences: Int['R M'],
) -> Replay:
    """Replay `Blip2T5.generate` or `predict_answers` on the prompt that its encoder reads."""
    settings = settings_of(arguments, T5_END)
    prefix = forward.soft_prefix(model, params, *_see(model, params, pixels))
    inputs = prefix, prompt, prompt_mask
    return _replay(decode.prefill_lm, model, params, inputs, settings, sequences[:, _prompt_length(arguments) :])


def with_qformer(
    model: Blip2Module, params: Params, pixels: Float['B 3 S S'], arguments: dict[str, Any], sequences: Int['R M']
) -> Replay:
    """Replay `Blip2Qformer.generate`."""
    settings = settings_of(arguments, arguments['eos_token_id'])
    inputs = _see(model, params, pixels)
    return _replay(decode.prefill_qformer, model, params, inputs, settings, sequences[:, _prompt_length(arguments) :])


def settings_of(arguments: dict[str, Any], end_id: int) -> GenerationConfig:
    """Return the settings of recorded arguments; their `min_length` and `max_length` count the prompt."""
    prompt = _prompt_length(arguments)
    limit = arguments['max_new_tokens'] if 'max_new_tokens' in arguments else arguments['max_length'] - prompt
    return GenerationConfig(
        max_new_tokens=limit,
        min_new_tokens=max(0, arguments['min_length'] - prompt),
        num_beams=arguments['num_beams'],
        num_return=arguments.get('num_return_sequences', 1),
        length_penalty=float(arguments.get('length_penalty', 1)),
        repetition_penalty=float(arguments.get('repetition_penalty', 1)),
        length_rule='lavis',
        end_ids=(end_id,),
    )


def _prompt_length(arguments: dict[str, Any]) -> int:
    return arguments['input_ids'][1] if 'input_ids' in arguments else 1  # an encoder-decoder's is its start token


@forward.bound
def _see(model: Blip2Module, pixels: Float['B 3 S S']) -> tuple[Float['B P V'], Bool['B P']]:
    features = model.vit(pixels.transpose(0, 2, 3, 1)).features
    return features, jnp.ones(features.shape[:2], bool)


def _replay(
    begin: Callable, model: Blip2Module, params: Params, inputs: tuple, settings: GenerationConfig, new: Int['R g']
) -> Replay:
    written, scores = _write(begin, model, params, inputs, settings, new)
    recorded = _fill(new, settings).reshape(written.tokens.shape)
    return Replay(written, recorded, scores)


@partial(jax.jit, static_argnums=(0, 1, 4))
def _write(
    begin: Callable, model: Blip2Module, params: Params, inputs: tuple, settings: GenerationConfig, new: Int['R g']
):
    step, start = begin(model, params, *inputs, settings.max_new_tokens)
    scores = step_scores(step, start, new, settings) if settings.num_beams == 1 else None
    return generate(step, start, settings), scores


def _fill(new: Int['R g'], settings: GenerationConfig) -> Int['R G']:
    """Return recorded tokens with end tokens instead of padding, and as many as we may write."""
    ended = np.cumsum(np.isin(new, settings.end_ids), axis=1) > 0
    missing = settings.max_new_tokens - new.shape[1]
    return np.pad(np.where(ended, settings.fill, new), ((0, 0), (0, missing)), constant_values=settings.fill)
