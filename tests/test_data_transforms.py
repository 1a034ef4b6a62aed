"""Pictures to arrays: LAVIS's recorded crops, and torchvision's crop rule."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qformer_jax.data import transforms
from qformer_jax.data.pictures import decode
from qformer_jax.data.transforms import eval_image, random_box, train_images
from qformer_jax.models.vit import normalise

with np.load(Path(__file__).parent / 'goldens' / 'lavis' / 'processors' / 'arrays.npz') as _file:
    GOLDEN = dict(_file)


def png(pixels: np.ndarray) -> bytes:
    """Return the pixels as an encoded PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def train_image(data, *options) -> np.ndarray:
    """Return one picture as training draws it."""
    return train_images([decode(data)], *options)[0]


NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.mark.parametrize('case', range(4))
def test_training_transform_equals_lavis(case, monkeypatch):
    top, left, height, width = map(int, GOLDEN['train28.crop'][case])
    monkeypatch.setattr(transforms, 'random_box', lambda *_: (left, top, left + width, top + height))
    image = decode(png(GOLDEN['gradient_rgb_100x60.raw']))
    rng = np.random.default_rng(next(s for s in range(99) if flips(s) == GOLDEN['train28.flip'][case]))
    got = train_image(image, 28, (0.5, 1.0), True, rng)
    normal = np.asarray(normalise(got[None].copy()))[0]
    np.testing.assert_allclose(normal.transpose(2, 0, 1), GOLDEN['train28.out'][case], atol=1e-5)


def flips(seed: int) -> bool:
    """Whether this seed's first draw mirrors."""
    return np.random.default_rng(seed).random() < 0.5


@pytest.mark.parametrize('size', [(64, 64), (200, 50), (30, 90)])
def test_crops_lie_inside_and_have_the_asked_area_and_ratio(size):
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = random_box(*size, (0.5, 1.0), rng)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        w, h = right - left, bottom - top
        assert 0.7 < w / h < 1.4
        if size == (64, 64):
            assert 0.48 < w * h / 64**2 <= 1


def test_a_long_strip_falls_back_to_its_centre():
    assert random_box(600, 30, (0.9, 1.0), np.random.default_rng(0)) == (280, 0, 320, 30)
    assert random_box(30, 600, (0.9, 1.0), np.random.default_rng(0)) == (0, 280, 30, 320)


def test_full_scale_means_no_crop():
    got = train_image(png(NOISE), 32, (1.0, 1.0), False, np.random.default_rng(0))
    np.testing.assert_array_equal(got, eval_image(png(NOISE), 32))


def test_half_of_the_pictures_are_mirrored():
    rng, plain = np.random.default_rng(0), eval_image(png(NOISE), 32)
    kept = [np.array_equal(train_image(png(NOISE), 32, (1.0, 1.0), True, rng), plain) for _ in range(200)]
    assert 70 < sum(kept) < 130
    assert np.array_equal(eval_image(png(NOISE), 32)[:, ::-1], plain[:, ::-1])


def test_every_mode_becomes_rgb():
    grey = Image.fromarray(NOISE[..., 0])
    for image in (grey, grey.convert('LA'), Image.fromarray(NOISE).convert('CMYK'), Image.fromarray(NOISE).quantize(9)):
        assert eval_image(image, 16).shape == (16, 16, 3)


def test_transparency_of_a_palette_keeps_the_colours():
    palette = Image.fromarray(NOISE).quantize(9)
    file = io.BytesIO()
    palette.save(file, 'PNG', transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(eval_image(file.getvalue(), 60), eval_image(palette.convert('RGB'), 60))
