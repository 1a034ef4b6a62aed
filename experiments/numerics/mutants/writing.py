"""Mutants of generation: the length rule, the repetition penalty, the smallest length."""

import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from qformer_jax.inference import search

from .mutant import Mutant, replaced

CASES = ('stage1_generate', 't5_stage2')
REPETITION = ('t5_stage2', 'opt_stage2')
PROMPTS = ('opt_stage2',)  # T5's search has no prompt but its start token


def mutants() -> Iterator[Mutant]:
    """Return them all."""
    for name, (cases, function, wrong) in WRONG.items():
        yield Mutant('writing', name, cases, replaced(search, function, wrong))


def _settings(change: Callable) -> Callable:
    """Return a wrong function whose last argument, the settings, differs."""
    return lambda right: lambda *arguments: right(*arguments[:-1], change(arguments[-1]))


def _penalty_on_the_wrong_side(s: search.Settings) -> search.Settings:
    return dataclasses.replace(s, repetition_penalty=1 / s.repetition_penalty)


def _prompt_not_penalised(right):
    def processed(scores, start, tokens, count, s):
        return right(scores, start.replace(prompt_mask=jnp.zeros_like(start.prompt_mask)), tokens, count, s)

    return processed


WRONG = {
    'length counts as in newer transformers': (
        CASES,
        '_score',
        _settings(lambda s: dataclasses.replace(s, length_rule='generated')),
    ),
    'no length penalty': (CASES, '_score', _settings(lambda s: dataclasses.replace(s, length_penalty=0.0))),
    'no smallest length': (CASES, 'processed', _settings(lambda s: dataclasses.replace(s, min_new_tokens=0))),
    'smallest length is one more': (
        CASES,
        'processed',
        _settings(lambda s: dataclasses.replace(s, min_new_tokens=min(s.min_new_tokens + 1, s.max_new_tokens))),
    ),
    'no repetition penalty': (
        REPETITION,
        'processed',
        _settings(lambda s: dataclasses.replace(s, repetition_penalty=1.0)),
    ),
    'repetition penalty turned round': (REPETITION, 'processed', _settings(_penalty_on_the_wrong_side)),
    'prompt not penalised': (PROMPTS, 'processed', _prompt_not_penalised),
}
