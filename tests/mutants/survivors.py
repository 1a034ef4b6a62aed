"""Mutants that no recorded case can notice, each with the reason."""

from .mutant import Mutant

REASONS = {
    'mask: unimodal is bidirectional': 'ITC runs queries alone and text alone; on these two blocks the masks agree',
}
"""`kind: name` -> why."""


def reason(mutant: Mutant) -> str:
    """Return why a mutant may survive; nothing if it may not."""
    return REASONS.get(str(mutant), '')
