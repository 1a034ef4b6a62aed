"""The study: every connector with the same data, steps, batch, search of the learning rate, and seeds.

    python -m experiments.connectors --out runs/connectors

Cells (a connector with one seed) run in processes side by side; each is trained and judged once, so that the command
may be stopped and called again. Then every connector's step is timed alone. Writes, in experiments/connectors/,
results.jsonl (a line a cell), table.md and pareto.png.
"""

from pathlib import Path

import tyro

from experiments.connectors.study import Options, run
from experiments.connectors.variants import VARIANTS
from qformer_jax.errors import command

if __name__ == '__main__':
    command(lambda: run(tyro.cli(Options), VARIANTS, Path(__file__).parent))
