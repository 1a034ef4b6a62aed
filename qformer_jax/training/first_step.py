"""What a user can judge the first step by: negatives in its batch, and losses beside those of a guess."""

import numpy as np

from .. import config
from .losses import Batch
from .stages import STAGES


def expected(run: config.Run, sources: dict[str, str]) -> dict[str, tuple[float, str]]:
    """Return metric -> (nats of a guess, what that is); empty where what is trained does not begin from scratch.

    `sources` says where each component came from.
    """
    entry = STAGES[run.stage]
    return entry.guess(run) if all(sources.get(part) == 'scratch' for part in entry.needs) else {}


def say_expected(guesses: dict[str, tuple[float, str]]) -> str:
    """Return the line before the first step."""
    said = ', '.join(f'{name} {value:.2f} ({why})' for name, (value, why) in guesses.items())
    return f'  a network that guesses has: {said} nats'


def say_seen(guesses: dict[str, tuple[float, str]], metrics: dict[str, float]) -> str:
    """Return the line after the first step."""
    said = ', '.join(f'{name} {metrics[name]:.2f} ({value:.2f})' for name, (value, _) in guesses.items())
    return f'  step 1, and what a guess would be: {said}'


def say_negatives(run: config.Run, batch: Batch) -> str:
    """Return the line about the negatives of a stage that needs them; `batch` is one process's, of numpy arrays.

    By the rule `shared`, equal captions belong together: of three rows with captions a, a, b, the first two have one
    negative each and the third two, 1.3 on average.
    """
    rows = len(batch['text'])
    _, which, counts = np.unique(batch['text'], axis=0, return_inverse=True, return_counts=True)
    alike = counts[which.reshape(-1)] if run.objective.positives == 'shared' else np.ones(rows, int)
    found, total = rows - alike, run.training.batch_size
    line = (
        f'  ITC compares each image with the {total} texts of a step, {found.mean():.1f} of {rows} negatives in the '
        'first batch; ITM draws one of them for each image, and one image for each text'
    )
    if not found.all():
        lacking = 'no row has a' if not found.any() else f'{(found == 0).sum()} of {rows} rows have no'
        line += f'. Warning: {lacking} negative, since captions are equal: nothing can be told apart'
    return line
