"""Where measured differences are kept: one JSON line a comparison, the newest of its name."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

RESULTS = Path(__file__).parent / 'results.jsonl'


def difference(computed, expected) -> float:
    """Return the largest absolute difference as a share of the largest entry (of 1, if all are smaller)."""
    computed, expected = np.asarray(computed, np.float32), np.asarray(expected, np.float32)
    if computed.shape != expected.shape:
        raise ValueError(f'shapes differ: {computed.shape} and {expected.shape}')
    return float(np.abs(computed - expected).max() / max(1, np.abs(expected).max()))


def record(what: str, command: str, figures: dict[str, float], packages: tuple[str, ...]) -> None:
    """Put a comparison into `results.jsonl`, in place of an older one of the same name, and print it."""
    row = {
        'what': what,
        'command': command,
        'hardware': f'{platform.machine()}, {jax.device_count()} {jax.default_backend()} device(s)',
        'versions': {name: version(name) for name in ('jax', *packages)},
        'figures': figures,
    }
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    kept = [line for line in lines if json.loads(line)['what'] != what]
    RESULTS.write_text(''.join(f'{line}\n' for line in [*kept, json.dumps(row)]))
    print(f'\n| {what} | figure |\n|---|---|')
    for name, value in figures.items():
        print(f'| {name} | {value:.4g} |')
