"""An SVG to pixels."""

import io

from PIL import Image

from qformer_jax.errors import UserError

_LEAST = 4  # pixels: of 2 x 2, some icons show nothing


def draw(svg: str, size: int) -> Image.Image:
    """Return the icon, `size` x `size` pixels in RGBA, transparent where nothing is drawn.

    Raises UserError below 4 pixels, and when the package resvg-py is not installed.
    """
    if size < _LEAST:
        raise UserError(f'an icon of {size} x {size} pixels shows nothing, it takes {_LEAST}: give a larger --size')
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError('icons need a package more: pip install resvg-py') from None
    png = svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)  # fonts differ by machine
    return Image.open(io.BytesIO(png)).convert('RGBA')


def on_white(icon: Image.Image) -> Image.Image:
    """Return the icon in RGB on white."""
    page = Image.new('RGBA', icon.size, 'white')
    return Image.alpha_composite(page, icon).convert('RGB')


def png(picture: Image.Image) -> bytes:
    """Return the picture as a PNG, as small as Pillow makes it."""
    file = io.BytesIO()
    picture.save(file, 'PNG', optimize=True)
    return file.getvalue()


def inked(icon: Image.Image) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom in pixels of what is drawn (right and bottom one past the last).

    Raises ValueError when nothing is.
    """
    box = icon.getchannel('A').getbbox()
    if box is None:
        raise ValueError('nothing is drawn')
    return box
