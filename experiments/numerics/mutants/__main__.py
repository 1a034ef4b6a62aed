"""Put every mutant into the product, one at a time, and say which ones verification does not notice.

    python -m experiments.numerics.mutants              # all of them
    python -m experiments.numerics.mutants mask 'T5'    # those whose `kind: name` matches one of the regexes

Prints a table of kinds and every survivor with the reason why none can notice it, and writes mutants.jsonl (when all
were run). Fails when a mutant survives without a reason.
"""

import json
import sys
from pathlib import Path

import jax

from . import every
from .mutant import Outcome, run
from .survivors import reason

RESULTS = Path(__file__).parents[1] / 'mutants.jsonl'


def line(outcome: Outcome) -> dict:
    """Return what is kept of an outcome."""
    return {
        'kind': outcome.mutant.kind,
        'name': outcome.mutant.name,
        'killed': outcome.killed,
        'case': outcome.case,
        'failing': len(outcome.noticed),
        'first': outcome.noticed[0] if outcome.noticed else '',
        'seconds': round(outcome.seconds, 2),
        'reason': '' if outcome.killed else reason(outcome.mutant),
    }


def main(wanted: list[str]) -> int:
    """Run them, print as they go, and return the exit code."""
    jax.config.update('jax_disable_most_optimizations', True)  # much is compiled, little computed
    rows = []
    for mutant in every(wanted):
        row = line(run(mutant))
        rows.append(row)
        said = f'killed by {row["case"]}: {row["first"]}' if row['killed'] else f'SURVIVED: {row["reason"]}'
        print(f'{row["seconds"]:7.1f} s  {row["kind"]}: {row["name"]}  {said}', flush=True)
    print(summary(rows))
    if not wanted:
        RESULTS.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
    return int(any(not row['killed'] and not row['reason'] for row in rows))


def summary(rows: list[dict]) -> str:
    """Return the table of kinds, and the survivors with their reasons."""
    lines = ['', '| kind | mutants | killed | survived | seconds |', '|---|---|---|---|---|']
    for kind in dict.fromkeys(row['kind'] for row in rows):
        own = [row for row in rows if row['kind'] == kind]
        killed, seconds = sum(row['killed'] for row in own), sum(row['seconds'] for row in own)
        lines.append(f'| {kind} | {len(own)} | {killed} | {len(own) - killed} | {seconds:.0f} |')
    survived = [row for row in rows if not row['killed']]
    lines += ['', '| survived | why |', '|---|---|'] if survived else []
    lines += [f'| {row["kind"]}: {row["name"]} | {row["reason"] or "UNKNOWN"} |' for row in survived]
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
