"""`python tests/measure_noise.py [CASE...]`: write what float32 does to our arrays beside each recorded case."""

import sys
from pathlib import Path

import conftest  # noqa: F401  the compiler's settings are those of the tests

from qformer_jax import json_file, verify
from qformer_jax.verify.recorded.case import NOISE

GOLDENS = Path(__file__).parent / 'goldens' / 'lavis'

for folder in sorted(GOLDENS.iterdir()):
    if (folder / 'meta.json').exists() and (not sys.argv[1:] or folder.name in sys.argv[1:]):
        noise = verify.work(verify.read(folder)).measure_noise()
        json_file.write(folder / NOISE, {name: float(f'{value:.3g}') for name, value in noise.items()})
        print(f'wrote {folder / NOISE}: {len(noise)} arrays')
