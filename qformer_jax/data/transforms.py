"""From a picture to a square uint8 array (LAVIS's `BlipImageTrainProcessor` and its evaluation twin)."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..typing import UInt8
from .pictures import decode

READ = 'whole, bicubic, upright'
"""How `eval_image` reads a picture: a part of the identity of features, to be changed with it."""
READ_EARLIER = ('whole, bicubic',)
"""How earlier versions read it, with the same result but for pictures that are turned by EXIF or of 16 bits."""
_RATIOS = (math.log(3 / 4), math.log(4 / 3))
_TRIES = 10


def eval_image(data: bytes | Image.Image, size: int, name: str = 'the picture') -> UInt8['size size 3']:
    """Return the whole picture squashed to `size` x `size` pixels (bicubic).

    Raises UserError (with `name`) where `pictures.decode` does.
    """
    return np.asarray(_resize(decode(data, name), size))


def train_images(
    images: Sequence[Image.Image], size: int, crop_scale: tuple[float, float], flip: bool, rng: np.random.Generator
) -> UInt8['F size size 3']:
    """Return random resized crops, mirrored half of the time when `flip`; frames of a video all alike, by one draw.

    `crop_scale` bounds the crop's share of the first picture's area; (1, 1) keeps the whole one (BLIP-2, section 3.4).
    """
    box = random_box(*images[0].size, crop_scale, rng) if crop_scale != (1, 1) else None
    mirror = flip and rng.random() < 0.5
    return np.stack([cut(image, box, size, mirror) for image in images])


def cut(image: Image.Image, box: tuple[int, int, int, int] | None, size: int, mirror: bool) -> UInt8['size size 3']:
    """Return the part of a picture in `box` (left, top, right, bottom; None: all), squashed, mirrored if asked."""
    pixels = np.asarray(_resize(image.crop(box) if box else image, size))
    return pixels[:, ::-1] if mirror else pixels


def random_box(
    width: int, height: int, crop_scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) in pixels by the rule of torchvision's `RandomResizedCrop`.

    Area share uniform in `crop_scale`, aspect ratio log-uniform in 3/4 to 4/3; after ten misfits the central crop.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*crop_scale)
        ratio = math.exp(rng.uniform(*_RATIOS))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return _central_box(width, height)


def _central_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Return the largest central box whose aspect ratio lies in 3/4 to 4/3."""
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resize(image: Image.Image, size: int) -> Image.Image:
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
