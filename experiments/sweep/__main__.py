"""Train and judge one variant of a study, in a process of its own; the studies start it for each of theirs.

python -m experiments.sweep --out runs/connectors --name "Q-Former" --seeds 0
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from experiments.ablations.variants import VARIANTS as ABLATIONS
from experiments.connectors.variants import VARIANTS as CONNECTORS
from experiments.sweep.cell import Budget, Cell
from qformer_jax.errors import command

VARIANTS = {variant.name: variant for variant in (*CONNECTORS, *ABLATIONS)}


@dataclass(frozen=True)
class Options:
    """Train and judge one variant of the study with some seeds; what is finished is not run again."""

    out: Path
    """Folder that `python -m experiments.sweep.prepare` filled."""
    name: Literal[*VARIANTS]
    """Of the variant."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data order."""
    budget: Budget = field(default_factory=Budget)


def main(options: Options) -> None:
    """Run the cells of the variant of that name."""
    for seed in options.seeds:
        Cell(options.out, VARIANTS[options.name], seed, options.budget).run()


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
