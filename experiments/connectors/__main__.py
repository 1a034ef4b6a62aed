"""The study: every connector with the same data, steps, batch, search of the learning rate, and seeds.

    python -m experiments.connectors --out runs/connectors

Writes, in experiments/connectors/, results.jsonl (a line a cell), table.md and pareto.png;
`experiments/sweep/runner.py` says how.
"""

from pathlib import Path

import tyro

from experiments.connectors.variants import VARIANTS
from experiments.sweep.runner import Options, study
from qformer_jax.errors import command

HERE = Path(__file__).parent

if __name__ == '__main__':
    command(lambda: study(tyro.cli(Options), VARIANTS, HERE))
