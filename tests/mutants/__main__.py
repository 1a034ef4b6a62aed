"""Put every mutant into the product, one at a time, and say which ones verification does not notice.

    python -m tests.mutants                 # all of them
    python -m tests.mutants mask T5         # those whose `kind: name` matches one of the regexes
    python -m tests.mutants --shard 3/16 --out shards/3.jsonl

Prints a table of kinds and every survivor with the reason why none can notice it, and writes a line a mutant (to
results.jsonl beside this file when all were run). Shards are run side by side; their files, concatenated, are the
results. Fails when a mutant survives without a reason.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import jax
import tyro

from qformer_jax.errors import UserError, command

from . import every
from .mutant import Mutant, Outcome, run
from .survivors import reason

RESULTS = Path(__file__).with_name('results.jsonl')


@dataclass(frozen=True)
class Options:
    """Run mutants and say which of them nothing notices."""

    wanted: tyro.conf.Positional[tuple[str, ...]] = ()
    """Regexes of `kind: name`; all mutants where none is given."""
    shard: str = '1/1'
    """K/N: every Nth of them, from the Kth on."""
    out: Path | None = None
    """File of the results; default: results.jsonl for all, nothing is kept of a few."""


def chosen(options: Options) -> Iterator[Mutant]:
    """Return the mutants of this call; raises UserError for a shard that there is not."""
    match = re.fullmatch(r'(\d+)/(\d+)', options.shard)
    k, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= k <= n:
        raise UserError(f"--shard is '{options.shard}', it must be K/N with K from 1 to N, such as 3/16")
    return islice(every(options.wanted), k - 1, None, n)


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


def main(options: Options) -> None:
    """Run them, print as they go, and exit with 1 where one survives without a reason."""
    jax.config.update('jax_disable_most_optimizations', True)  # much is compiled, little computed
    whole = not options.wanted and options.shard == '1/1'
    rows = []
    for mutant in chosen(options):
        row = line(run(mutant))
        rows.append(row)
        said = f'killed by {row["case"]}: {row["first"]}' if row['killed'] else f'SURVIVED: {row["reason"]}'
        print(f'{row["seconds"]:7.1f} s  {row["kind"]}: {row["name"]}  {said}', flush=True)
    print(summary(rows))
    if out := options.out or (RESULTS if whole else None):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
    if any(not row['killed'] and not row['reason'] for row in rows):
        sys.exit(1)


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
    command(lambda: main(tyro.cli(Options)))
