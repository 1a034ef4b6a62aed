"""Results that several calls of an experiment write: a line of JSON a variant, seed and number of steps."""

import json
from pathlib import Path


def keep(row: dict[str, object], path: Path) -> None:
    """Put a row among the results, in the place of one of the same variant, seed and steps."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = {_place(each): each for each in map(json.loads, lines)} | {_place(row): row}
    path.write_text(''.join(json.dumps(known[place]) + '\n' for place in sorted(known)))


def _place(row: dict[str, object]) -> tuple[int, str, int]:
    return row['steps'], row['variant'], row['seed']
