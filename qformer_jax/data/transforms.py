"""From the bytes of a picture to a square uint8 array (LAVIS's `BlipImageTrainProcessor` and its evaluation twin)."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError
from ..typing import UInt8

READ = 'whole, bicubic, upright'
"""How `eval_image` reads a picture: a part of the identity of features, to be changed with it."""
READ_EARLIER = ('whole, bicubic',)
"""How earlier versions read it, with the same result but for pictures that are turned by EXIF or of 16 bits."""
_RATIOS = (math.log(3 / 4), math.log(4 / 3))
_TRIES = 10
_SIXTEEN_BITS = ('PNG', 'PPM')  # formats whose 16-bit grey some versions of Pillow give as mode 'I', 0 to 65535


def decode(data: bytes | Image.Image, name: str = 'the picture') -> Image.Image:
    """Return the picture as RGB, upright (EXIF), decoded to its last row; 16-bit grey is scaled to 8.

    Raises UserError (with `name`) when it is damaged, or grey of 32 bits or floats, whose range nothing states.
    """
    try:
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's own text is kept out where it only repeats the name of a BytesIO.
        reason = 'not a picture that Pillow can read' if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f'{name}: {reason}; replace the file or leave it out') from error
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in _SIXTEEN_BITS):
        image = _eight_bits(image)
    if image.mode in ('I', 'F'):
        kind = '32-bit grey' if image.mode == 'I' else 'grey of floats'
        raise UserError(f'{name}: {kind}, and nothing says which value is white: save it with 8 or 16 bits')
    image = _upright(image)
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')  # Pillow warns about the direct way to RGB; the colours are the same
    return image if image.mode == 'RGB' else image.convert('RGB')


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return 16-bit grey with 8 bits, 65535 as 255 (Pillow would clip at 255); EXIF is kept."""
    grey = (np.asarray(image, np.uint32) * 255 + 32767) // 65535
    small = Image.fromarray(grey.astype(np.uint8))
    small.info = image.info
    return small


def _upright(image: Image.Image) -> Image.Image:
    """Return the picture turned as its EXIF says; one whose EXIF cannot be read stays as it is stored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of a block of bytes that anybody may have written; viewers show such pictures as they are
        return image


def eval_image(data: bytes | Image.Image, size: int) -> UInt8['size size 3']:
    """Return the whole picture squashed to `size` x `size` pixels (bicubic); raises UserError when it is damaged."""
    return np.asarray(_resize(decode(data), size))


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
