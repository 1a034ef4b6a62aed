"""A few inputs of the fuzz, in this process; `python -m tests.fuzz` makes as many as one has time for."""

import importlib
import random
import sys
import warnings
from pathlib import Path

import pytest

from qformer_jax.errors import UserError

sys.path.append(str(Path(__file__).parents[1]))


@pytest.mark.parametrize('part', ['pictures', 'sources'])
def test_odd_and_damaged_input_is_read_rightly_or_refused_in_one_line(part, tmp_path):
    module = importlib.import_module(f'tests.fuzz.{part}')
    module.make(tmp_path)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Pillow's, about odd pictures
        for number in range(150):
            name, verdict, read = next(module.cases(tmp_path, random.Random(f'0 {part} {number}')))
            try:
                read()
                assert verdict != 'refused', f'{number}, {name}: accepted'
            except UserError as error:
                assert verdict != 'same' and '\n' not in str(error), f'{number}, {name}: {error}'
                refused += 1
    assert 50 < refused < 150
