"""Mutants of generation: the length rule, the repetition penalty, the smallest length, and the caches."""

import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from qformer_jax.inference import decode, generate
from qformer_jax.models import opt, t5
from qformer_jax.models.qformer import Qformer

from .mutant import Mutant, method, replaced

CASES = ('stage1_generate', 't5_stage2')
REPETITION = ('t5_stage2', 'opt_stage2')
PROMPTS = ('opt_stage2',)  # T5's search has no prompt but its start token


def mutants() -> Iterator[Mutant]:
    """Return them all."""
    for name, (cases, function, wrong) in WRONG.items():
        yield Mutant('writing', name, cases, replaced(generate, function, wrong))
    for family, owner, cases in (('OPT', opt, PROMPTS), ('T5', t5, ('t5_stage2',)), ('Q-Former', decode, CASES[:1])):
        for name, wrong in CACHE.items():
            yield Mutant('cache', f'{family}: {name}', cases, replaced(owner, 'write', wrong))
    yield Mutant('cache', 'Q-Former: every token is the first', CASES[:1], method(Qformer, '__call__', _always_first))
    yield Mutant('cache', 'beams read the caches of others', CASES, replaced(generate, '_beam_step', _own_cache))


def _settings(change: Callable) -> Callable:
    """Return a wrong function whose last argument, the settings, differs."""
    return lambda right: lambda *arguments: right(*arguments[:-1], change(arguments[-1]))


def _penalty_on_the_wrong_side(s: generate.GenerationConfig) -> generate.GenerationConfig:
    return dataclasses.replace(s, repetition_penalty=1 / s.repetition_penalty)


def _prompt_not_penalised(right):
    def processed(scores, start, tokens, count, s):
        return right(scores, start.replace(prompt_mask=jnp.zeros_like(start.prompt_mask)), tokens, count, s)

    return processed


def _always_first(right, *arguments, text_start=0, **given):
    return right(*arguments, text_start=0, **given)


def _own_cache(right):
    def choose(*arguments):
        beams = right(*arguments)
        return beams.replace(parents=jnp.broadcast_to(jnp.arange(beams.parents.shape[1]), beams.parents.shape))

    return choose


CACHE = {
    'what was written is forgotten': lambda right: lambda old, new, start: right(jnp.zeros_like(old), new, start),
    'written a slot early': lambda right: lambda old, new, start: right(old, new, jnp.maximum(start - 1, 0)),
}
WRONG = {
    'length counts as in newer transformers': (
        CASES,
        '_score',
        _settings(lambda s: dataclasses.replace(s, length_rule='generated')),
    ),
    'no length penalty': (CASES, '_score', _settings(lambda s: dataclasses.replace(s, length_penalty=0.0))),
    'no smallest length': (CASES, 'process_logits', _settings(lambda s: dataclasses.replace(s, min_new_tokens=0))),
    'smallest length is one more': (
        CASES,
        'process_logits',
        _settings(lambda s: dataclasses.replace(s, min_new_tokens=min(s.min_new_tokens + 1, s.max_new_tokens))),
    ),
    'no repetition penalty': (
        REPETITION,
        'process_logits',
        _settings(lambda s: dataclasses.replace(s, repetition_penalty=1.0)),
    ),
    'repetition penalty turned round': (REPETITION, 'process_logits', _settings(_penalty_on_the_wrong_side)),
    'prompt not penalised': (PROMPTS, 'process_logits', _prompt_not_penalised),
}
