"""Ablations: the study's Q-Former with one choice changed, in the study's cells.

    python -m experiments.ablations --out runs/connectors

Runs beside those of `python -m experiments.connectors`, whose "Q-Former" and "Q-Former, no stage 1" are the rows to
compare with: they are in this table too, and trained here if they were not there. Writes results.jsonl, table.md and
pareto.png in experiments/ablations/.
"""

from pathlib import Path

import tyro

from experiments.ablations.variants import VARIANTS
from experiments.connectors.study import Options, run
from experiments.connectors.variants import VARIANTS as CONNECTORS
from qformer_jax.errors import command

COMPARED = ('Q-Former', 'Q-Former, no stage 1')

if __name__ == '__main__':
    compared = (v for v in CONNECTORS if v.name in COMPARED)
    command(lambda: run(tyro.cli(Options), (*compared, *VARIANTS), Path(__file__).parent))
