"""Our numbers against Salesforce's when both compute in float64, where rounding hides nothing above 1e-14.

    python tests/goldens/lavis/make_lavis_goldens.py --float64 --out float64     # in the environment of its README
    python -m experiments.numerics.float64 float64

Prints a table: per case, the largest difference as a share of the array's largest entry.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from qformer_jax import verify
from qformer_jax.verify.report import difference, scale


def compare(folder: Path) -> str:
    """Return the table's line of one case."""
    todo = verify.work(verify.read(folder))
    expected = todo.expected | todo.gradients
    computed = todo.compute(todo.params, 'float64', expected)

    def worst(arrays: dict[str, np.ndarray]) -> tuple[int, float | str]:
        found = [difference(computed[name], x) / (scale(x) or 1) for name, x in arrays.items() if x.dtype.kind == 'f']
        return len(found), f'{max(found):.1e}' if found else ''

    # the keys' projections are made here, in float32, and not recorded
    arrays = {name: x for name, x in todo.expected.items() if not name.startswith('keys of')}
    cells = (f'`{folder.name}`', *worst(arrays), *worst(todo.gradients))
    return f'| {" | ".join(map(str, cells))} |'


def main(folder: Path) -> None:
    """Print the table of every case in a folder."""
    jax.config.update('jax_disable_most_optimizations', True)  # much is compiled, little computed
    print('| case | arrays | largest difference | gradients | largest difference |\n|---|---|---|---|---|')
    for meta in sorted(folder.glob('*/meta.json')):
        if meta.parent.name != 'processors':  # has no weights
            print(compare(meta.parent), flush=True)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
