"""Write scikit-learn's handwritten digits as sequences of features, for `qformer data pack features`.

    python -m experiments.datasets.digits.make runs/digits/source

A digit of 8 x 8 grey values becomes up to eight steps: its columns from the left, blank ones left out. A step is the
column's 8 values and 8 more that say which column it is: attention sees a set, so the order has to be in the features.
"""

import json
from pathlib import Path

import numpy as np
import tyro
from sklearn.datasets import load_digits

from qformer_jax.errors import command
from qformer_jax.typing import Float

NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
TRAIN = 1400  # the first ones; the 397 after them are the test part


def steps(picture: Float['8 8']) -> Float['P 16']:
    """Return the columns with ink (0 to 1), each followed by its one-hot position."""
    columns = np.hstack([picture.T, np.eye(8)]).astype(np.float32)
    return columns[picture.any(axis=0)]


def line(file: str, digit: int) -> str:
    """Return the line of `captions.jsonl` for one digit."""
    answers = {'which digit is this?': NAMES[digit], 'is it even?': 'no' if digit % 2 else 'yes'}
    questions = [{'question': question, 'answers': [answer]} for question, answer in answers.items()]
    return json.dumps({'file': file, 'caption': f'a handwritten {NAMES[digit]}', 'questions': questions})


def make(out: Path, /) -> None:
    """Write the folders `train` and `test`.

    Args:
        out: Folder to write.
    """
    digits = load_digits()
    for split, rows in {'train': range(TRAIN), 'test': range(TRAIN, len(digits.target))}.items():
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            np.save(folder / f'{row}.npy', steps(digits.images[row] / 16))
        lines = [line(f'{row}.npy', int(digits.target[row])) for row in rows]
        (folder / 'captions.jsonl').write_text('\n'.join(lines) + '\n')
        print(f'wrote {folder}: {len(lines)} arrays')
    print(f'next: qformer data pack features {out}_packed --path {out}')


if __name__ == '__main__':
    command(lambda: tyro.cli(make))
