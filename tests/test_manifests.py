"""The published checkpoints by name and shape: each tensor has its place in our tree, and none other is written.

`goldens/manifests` lists what the classes of LAVIS 1.0.2 and of Hugging Face hold at the published sizes.
"""

import dataclasses
import functools
import gzip
import re

import numpy as np
import pytest
from reference import GOLDENS

from experiments.published_models import MODELS
from qformer_jax import config
from qformer_jax.convert import huggingface, lavis
from qformer_jax.convert.lazy_tensors import Tensor
from qformer_jax.convert.table import NewlyInitialized, check_complete, row_of, to_jax, to_torch
from qformer_jax.models import blip2
from qformer_jax.rules import flatten

MANIFESTS = GOLDENS / 'manifests'
FAMILIES = {'lavis': lavis, 'hf': huggingface}
PUBLISHED = {name: (FAMILIES[name.split('_')[0]], published.model) for name, published in MODELS.items()}
WITHOUT_LM = [name for name in PUBLISHED if name.startswith('lavis')]  # LAVIS reads it from a file of its own


def manifest(name: str) -> dict[str, Tensor]:
    """Return the tensors of a list as zeros that occupy one byte each."""
    lines = gzip.decompress((MANIFESTS / f'{name}.tsv.gz').read_bytes()).decode().splitlines()
    rows = [line.split('\t') for line in lines]
    return {key: zeros(tuple(map(int, shape.split('x'))) if shape else (), dtype) for key, shape, dtype, *_ in rows}


def zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    return Tensor(shape, np.dtype(dtype), lambda: np.broadcast_to(np.zeros((), dtype), shape))


def shapes_of(state) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in state.items()}


@functools.cache
def part(c: config.Blip2Config):
    return blip2.shapes(c)


def wanted(c: config.Blip2Config):
    """Return `blip2.shapes(c)`, of which the towers that several lists share are traced once."""
    return part(dataclasses.replace(c, vit=None)) | part(config.Blip2Config(c.vit, None, None))


@pytest.mark.parametrize('name', PUBLISHED)
def test_every_published_tensor_has_its_place(name):
    family, c = PUBLISHED[name]
    table, torch_state = family.blip2(c), manifest(name)
    shapes = {part: tree for part, tree in wanted(c).items() if part != 'lm' or name not in WITHOUT_LM}
    jax_state = to_jax(table, torch_state)
    assert not check_complete(jax_state, shapes, table)
    assert shapes_of(jax_state) == {path: leaf.shape for path, leaf in flatten(shapes).items()}
    assert shapes_of(to_torch(table, jax_state)) == shapes_of(torch_state)


@pytest.mark.parametrize('name', PUBLISHED)
def test_no_second_row_fits_a_published_key(name):
    """First match wins, so a second one would hide a mistake."""
    family, c = PUBLISHED[name]
    rows = [row for row in family.blip2(c) if not isinstance(row, NewlyInitialized)]
    for key in {re.sub(r'\.\d+\.', '.0.', key, count=1) for key in manifest(name)}:  # the first number counts layers
        assert [row for row in rows if row_of((row,), key)] == [row_of(tuple(rows), key)[0]], key


def test_every_list_is_proven():
    assert sorted(PUBLISHED) == sorted(path.name.removesuffix('.tsv.gz') for path in MANIFESTS.glob('*.gz'))
