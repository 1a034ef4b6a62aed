"""Files and bytes of pictures, opened in one place: which files, which formats, how large, and how they are turned."""

import io
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError, nearest_file

FORMATS = ('AVIF', 'BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')
"""What is read, by Pillow's names; never EPS, which is a program that Pillow would have Ghostscript run."""
MAX_BYTES = 2**29
"""Of a file; no picture within `MAX_PIXELS` needs more."""
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
"""Above this number, Pillow takes a picture for an attack."""
_OTHERS = (
    ('EPS', b'%!PS'), ('EPS', b'\xc5\xd0\xd3\xc6'), ('PDF', b'%PDF'), ('PSD', b'8BPS'), ('DDS', b'DDS '),
    ('ICO', b'\0\0\1\0'), ('ICNS', b'icns'), ('BLP', b'BLP'), ('SVG', b'<svg'), ('SVG', b'<?xml'),
)  # fmt: skip
"""First bytes of formats that are met, and not read."""
_HEIC = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')
_SIXTEEN_BITS = ('PNG', 'PPM')  # formats whose 16-bit grey some versions of Pillow give as mode 'I', 0 to 65535


def suffixes() -> set[str]:
    """Return the endings of names that files of these formats have, such as `.jpg`."""
    return {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}


def read(file: Path) -> bytes:
    """Return the bytes of a file that may be a picture; raises UserError when it is missing, too large, or no file."""
    try:
        about = file.stat()
    except (OSError, ValueError):  # a ValueError: of a name with NUL
        raise UserError(f'{file}: no such picture{nearest_file(file)}') from None
    if not stat.S_ISREG(about.st_mode):
        kind = 'a folder' if stat.S_ISDIR(about.st_mode) else 'a pipe or a device'
        raise UserError(f'{file}: no such picture, it is {kind}; name a file')
    if about.st_size > MAX_BYTES:
        raise UserError(f'{file}: {about.st_size / 2**20:,.0f} MiB; a picture may have {MAX_BYTES // 2**20}: shrink it')
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f'{file}: {error.strerror.lower()}') from error


def decode(data: bytes | Image.Image, name: str = 'the picture') -> Image.Image:
    """Return the picture as RGB, upright (EXIF), decoded to its last row; 16-bit grey is scaled to 8.

    Raises UserError (with `name`) when it is damaged, of another format than `FORMATS`, larger than `MAX_PIXELS`, or
    grey of 32 bits or floats, whose range nothing states.
    """
    try:
        image = _open(data, name) if isinstance(data, bytes) else data
        _check_size(image, name)
        image.load()
    except UserError:
        raise
    except Exception as error:  # of third-party decoders, on bytes that anybody may have written
        reason = str(error).strip().partition('\n')[0][:120] or type(error).__name__
        raise UserError(f'{name}: damaged ({reason}); replace the file or leave it out') from error
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in _SIXTEEN_BITS):
        image = _eight_bits(image)
    if image.mode in ('I', 'F'):
        kind = '32-bit grey' if image.mode == 'I' else 'grey of floats'
        raise UserError(f'{name}: {kind}, and nothing says which value is white: save it with 8 or 16 bits')
    image = _upright(image)
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')  # Pillow warns about the direct way to RGB; the colours are the same
    return image if image.mode == 'RGB' else image.convert('RGB')


def _open(data: bytes, name: str) -> Image.Image:
    Image.init()
    try:
        return Image.open(io.BytesIO(data), formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except Image.UnidentifiedImageError:
        kind = _other(data)
        found = f'{kind}, which is not read' if kind else 'not a picture, or none of a format that is read'
        raise UserError(f'{name}: {found}: save it as JPEG or PNG (read are {", ".join(FORMATS)})') from None


def _other(data: bytes) -> str:
    """Return the format of bytes that are not read, where their beginning tells."""
    if data[4:8] == b'ftyp' and data[8:12] in _HEIC:
        return 'HEIC'
    return next((kind for kind, begin in _OTHERS if data.startswith(begin)), '')


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f'{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}; shrink it')


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
