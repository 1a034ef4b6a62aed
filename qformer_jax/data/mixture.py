"""Several packed data sets as one: what they must share, and how often each of them is drawn from."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .dataset import Dataset
from .pack import BYTE_BPE, WORDPIECE

_OPTIONS = {WORDPIECE: '--text-tokenizer', BYTE_BPE: '--lm-tokenizer'}  # of `qformer data pack`


def join(datasets: Sequence[Dataset]) -> Dataset:
    """Return the first data set with the others in it.

    Raises UserError when one is there twice, or is unlike the first: in its tokenizers, in the kind or width of what it
    holds, or in the tower that made its features.
    """
    first, *others = datasets
    for number, other in enumerate(others, 1):
        if other.path.resolve() in [dataset.path.resolve() for dataset in datasets[:number]]:
            raise UserError(f'data.mixed-with: {other.path} is among the data sets already; name each one once')
        _check_alike(first, other)
    return dataclasses.replace(first, others=tuple(others))


def shares(sizes: Sequence[int]) -> list[float]:
    """Return how often to draw from data sets of these sizes (InstructBLIP, section 2.4): p = sqrt(S) / sum sqrt(S).

    Worked example: 900 and 100 records give 3/4 and 1/4, so the small one is seen three times as often a record.
    """
    roots = np.sqrt(sizes)
    return (roots / roots.sum()).tolist()


def _check_alike(first: Dataset, other: Dataset) -> None:
    for name, option in _OPTIONS.items():
        one, two = (dataset.tokenizer_files[name] for dataset in (first, other))
        if one.read_bytes() != two.read_bytes():
            raise UserError(f'{other.path} and {first.path} have different tokenizers ({name}), and a mixture has one: '
                            f'pack it again with {option} {one}')  # fmt: skip
    if _kind(first) != _kind(other):
        raise UserError(
            f'{first.path} holds {_kind(first)}, {other.path} holds {_kind(other)}: a mixture is of one kind'
        )
    if _tower(first) != _tower(other):
        raise UserError(f'the features of {first.path} and {other.path} come from different towers: encode both with '
                        'one (qformer data encode)')  # fmt: skip


def _kind(dataset: Dataset) -> str:
    if dataset.feature_shape:
        return f'features of width {dataset.feature_shape[1]}'
    return 'videos' if dataset.longest_video else 'pictures'


def _tower(dataset: Dataset) -> tuple | None:
    made_by = dataset.encoder
    return made_by and (made_by.weights, made_by.vit, made_by.read)
