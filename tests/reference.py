"""The recorded cases of `goldens/lavis`, our configurations of their sizes, and what "equal" means."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from qformer_jax import config
from qformer_jax.convert import lavis
from qformer_jax.convert.lazy_tensors import Tensor
from qformer_jax.convert.table import convert, to_torch
from qformer_jax.models import blip2
from qformer_jax.rules import flatten
from qformer_jax.typing import Params

GOLDENS = Path(__file__).parent / 'goldens'

EVA = config.VitConfig(image_size=56, width=48, depth=2, heads=4, mlp_width=209)
CLIP = config.VitConfig(
    image_size=56,
    width=48,
    depth=2,
    heads=4,
    mlp_width=192,
    norm_eps=1e-5,
    activation='quick_gelu',
    attention_bias='all',
    patch_bias=False,
    pre_norm=True,
    position_resize='align_corners',
)
QFORMER = config.QformerConfig(
    feature_width=48,
    num_queries=8,
    width=32,
    depth=4,
    heads=4,
    mlp_width=72,
    vocab_size=186,
    max_positions=40,
    embed_width=16,
)
QUERIES = dataclasses.replace(QFORMER, text_side='none')  # as stage 2 of LAVIS keeps it
OPT = config.OptConfig(vocab_size=356, width=40, depth=2, heads=4, mlp_width=96, max_positions=96)
T5 = config.T5Config(
    vocab_size=101, width=40, depth=2, decoder_depth=2, heads=4, head_width=12, mlp_width=96, buckets=8, max_distance=20
)

LLAMA = config.LlamaConfig(
    vocab_size=90, width=40, depth=2, heads=4, kv_heads=2, head_width=12, mlp_width=96, max_positions=96
)


def meta(case: str) -> dict:
    return json.loads((GOLDENS / 'lavis' / case / 'meta.json').read_text())


def arrays(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / 'lavis' / case / 'arrays.npz') as file:
        return {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in file.items()}


def tensors(case: str, name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDENS / 'lavis' / case / f'{name}.safetensors')


def params(case: str, c: config.Blip2Config) -> Params:
    """Return the recorded weights of a case as our tree."""
    return convert(lavis.blip2(c), tensors(case, 'state_dict'), blip2.shapes(c))


def outlines(c: config.Blip2Config) -> dict[str, Tensor]:
    """Return LAVIS's state dict of a model of any size, shapes only."""

    def unread() -> np.ndarray:
        raise AssertionError('read, where shapes should do')

    shapes = flatten(blip2.shapes(c))
    return to_torch(lavis.blip2(c), {path: Tensor(x.shape, x.dtype, unread) for path, x in shapes.items()})


def nhwc(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(0, 2, 3, 1)


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """Fail when the largest difference exceeds `tolerance` of the array's scale."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    difference, scale = np.abs(actual - expected).max(), max(1, np.abs(expected).max())
    assert difference <= tolerance * scale, f'differs by {difference:.3g}, scale {scale:.3g}'


def assert_gradients_close(actual: Params, expected: Params, tolerance: float = 1e-5) -> None:
    """Fail when a tensor differs by more than `tolerance` of its largest entry.

    Biases of keys are left out: softmax does not see them, so both sides hold nothing but rounding noise.
    """
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    wrong = {}
    for path in actual:
        difference = np.abs(np.asarray(actual[path]) - expected[path]).max()
        scale = np.abs(expected[path]).max()
        if not path.endswith('key/bias') and not difference <= tolerance * scale:
            wrong[path] = f'{difference:.3g} of {scale:.3g}'
    assert not wrong
