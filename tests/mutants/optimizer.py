"""Mutants of training: what decays, when the learning rate moves, and how AdamW steps."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from qformer_jax.training import optimizer

from .mutant import Mutant, replaced

CASES = ('optim',)


def mutants() -> Iterator[Mutant]:
    """Return them all."""
    for arrays, wrongs in ((r'groups\.json', DECAY), (r'lr\.json', SCHEDULE), ('.*', ADAMW)):
        for name, (owner, function, wrong) in wrongs.items():
            yield Mutant('optimizer', name, CASES, replaced(owner, function, wrong), arrays=arrays)


def _rules(*rules: tuple[str, bool]) -> tuple:
    """Return the change of the rules of who decays."""
    return optimizer, 'DECAY_RULES', lambda _: rules


def _step(later: int) -> Callable:
    """Return a wrong schedule that is some steps late."""
    return lambda right: lambda o, steps: lambda step: right(o, steps)(step - later)


def _adam(**changed: float) -> tuple:
    """Return the change of Adam's numbers."""

    def wrong(right):
        return lambda b1, b2, eps: right(**{'b1': b1, 'b2': b2, 'eps': eps} | changed)

    return optimizer.optax, 'scale_by_adam', wrong


def _decay_first(right):
    """Chain the decay before Adam, as an L2 penalty would be."""
    return lambda clip, adam, decay, *rest: right(clip, decay, adam, *rest)


DECAY = {
    'everything decays': _rules(('.*', True)),
    'nothing decays': _rules(('.*', False)),
    'biases decay': _rules((r'(.*[/_])?(scale|temperature)', False), ('.*', True)),
    'gains of norms decay': _rules((r'(.*[/_])?(bias|temperature)', False), ('.*', True)),
    'temperature decays': _rules((r'(.*[/_])?(bias|scale)', False), ('.*', True)),
    'query tokens do not decay': _rules((r'.*query_token', False), *optimizer.DECAY_RULES),
    'tables do not decay': _rules((r'.*_embedding', False), *optimizer.DECAY_RULES),
    "CLIP's class token decays": (optimizer, 'decay_rules', lambda _: lambda paths: optimizer.DECAY_RULES),
}
SCHEDULE = {
    'learning rate a step early': (optimizer, 'schedule', _step(-1)),
    'learning rate a step late': (optimizer, 'schedule', _step(1)),
    'warm-up a step longer': (
        optimizer,
        'lavis_schedule',
        lambda right: lambda o, steps: right(replace(o, warmup_steps=o.warmup_steps + 1), steps),
    ),
    'warm-up from zero': (
        optimizer,
        'lavis_schedule',
        lambda right: lambda o, steps: right(replace(o, warmup_start=0.0), steps),
    ),
    'cosine moves every step': (
        optimizer,
        'schedule',
        lambda right: lambda o, steps: right(replace(o, schedule='cosine'), steps),
    ),
    'cosine reaches its end': (
        optimizer,
        'lavis_schedule',
        lambda right: lambda o, steps: right(o, steps - o.steps_per_epoch),
    ),
}
ADAMW = {
    'decay before Adam (coupled)': (optimizer.optax, 'chain', _decay_first),
    'epsilon 1e-6': _adam(eps=1e-6),
    'epsilon inside the root': _adam(eps=0.0, eps_root=1e-8),
    'beta1 0.95': _adam(b1=0.95),
    'beta2 0.98': _adam(b2=0.98),
}
"""What -> the module, the function or constant in it, and the wrong one made of the right one."""
