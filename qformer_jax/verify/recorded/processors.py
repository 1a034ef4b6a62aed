"""Pictures to pixels and texts to clean texts (case `processors`), all of it on the host but the normalisation."""

import json
import re

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from PIL import Image

from ...data import pictures, tokenizers, transforms
from ...errors import UserError
from ...models import vit
from ...typing import Array, Params
from .case import Case
from .collect import plan
from .comparison import Arrays, Work

TEXTS = 'text.json'
TRAINED = r'train(\d+)\.out'
PALETTE = 'a palette without its colours: compared from its RGB picture on'


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError where a name or a description is not understood."""
    left_out = {
        f'{name}.{kind}': PALETTE for name in _names(case) if _mode(case, name) == 'P' for kind in ('raw', 'rgb')
    }
    drawn = (f'train{size}.{kind}' for size in _sizes(case, TRAINED) for kind in ('crop', 'flip'))
    rows = _rows(case)
    ways = [way for way in rows[0] if way != 'in']

    def function(params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        host = _pictures(case)
        out = {name: jnp.asarray(pixels) for name, pixels in host.items()}
        out |= {f'{TEXTS}: {way}': jnp.asarray(_cleaned(rows, way)) for way in ways}
        for name, pixels in host.items():
            if '.resized' in name:
                out[name.replace('.resized', '.eval')] = _planes(pixels[None])[0]
            if name.endswith('.pixels'):
                out[name.replace('.pixels', '.out')] = _planes(pixels)
        return out

    inputs = {name: x for name, x in case.arrays.items() if name.endswith('.raw')}
    numbers = {f'{TEXTS}: {way}': np.arange(len(rows), dtype=np.int32) for way in ways}
    return plan(case, {}, inputs, function, left_out=left_out | dict.fromkeys(drawn, 'input'), derived=numbers)


def _names(case: Case) -> list[str]:
    return [name.removesuffix('.raw') for name in case.arrays if name.endswith('.raw')]


def _pictures(case: Case) -> dict[str, np.ndarray]:
    """Return what the host makes of every recorded picture, uint8."""
    out = {}
    for name in _names(case):
        image = _picture(case, name)
        out[f'{name}.rgb'] = np.asarray(image)
        for size in _sizes(case, rf'{re.escape(name)}\.(?:resized|eval)(\d+)'):
            out[f'{name}.resized{size}'] = transforms.eval_image(image, size)
    return out | {f'train{size}.pixels': _trained(case, size) for size in _sizes(case, TRAINED)}


def _planes(pixels: np.ndarray) -> Array:
    """Return normalised pictures, NCHW as recorded."""
    return vit.normalise(jnp.asarray(pixels)).transpose(0, 3, 1, 2)


def _sizes(case: Case, pattern: str) -> list[int]:
    found = (re.fullmatch(pattern, name) for name in case.arrays)
    return sorted({int(match[1]) for match in found if match})


def _mode(case: Case, name: str) -> str:
    """Return Pillow's mode of a recorded picture, as its description says it."""
    described = str(case.entry('arrays', f'{name}.raw', 'what'))
    found = re.search(r'PIL (\S+) image', described)
    if not found:
        raise UserError(f"{case.folder}: meta.json does not say the mode of '{name}.raw' ('PIL RGB image ...')")
    return found[1]


def _picture(case: Case, name: str) -> Image.Image:
    raw = case.array(f'{name}.rgb' if _mode(case, name) == 'P' else f'{name}.raw')
    return pictures.decode(Image.fromarray(raw))


def _trained(case: Case, size: int) -> np.ndarray:
    """Return the recorded crops and flips of the training transform, drawn again from the picture that it names."""
    described = str(case.entry('arrays', f'train{size}.crop', 'what'))
    named = re.search(r' on (\w+)', described)
    pictures = [name for name in case.arrays if named and name.startswith(named[1]) and name.endswith('.raw')]
    if len(pictures) != 1:
        raise UserError(f"{case.folder}: meta.json does not say which picture 'train{size}.crop' cuts")
    image = _picture(case, pictures[0].removesuffix('.raw'))
    drawn = zip(case.array(f'train{size}.crop'), case.array(f'train{size}.flip'), strict=True)
    boxes = [((left, top, left + width, top + height), flip) for (top, left, height, width), flip in drawn]
    return np.stack([transforms.cut(image, tuple(map(int, box)), size, bool(flip)) for box, flip in boxes])


def _rows(case: Case) -> list[dict]:
    """Return the recorded texts, each with what every way of cleaning makes of it."""
    if not (case.folder / TEXTS).is_file():
        raise UserError(f'{case.folder / TEXTS}: no such file')
    try:
        return json.loads((case.folder / TEXTS).read_text())
    except ValueError as error:
        raise UserError(f'{case.folder / TEXTS}: not JSON ({error})') from error


def _cleaned(rows: list[dict], way: str) -> np.ndarray:
    """Return the numbers of the texts, -1 where we clean one otherwise."""
    clean = {'caption': tokenizers.clean_caption, 'question': tokenizers.clean_question}
    kind, _, option = way.partition('_')
    limit = [int(option.removeprefix('max'))] if option.startswith('max') else []
    good = []
    for row in rows:
        prompt = row[way].removesuffix(row[kind]) if option == 'prompt' else ''
        good.append(prompt + clean[kind](row['in'], *limit) == row[way])
    return np.where(good, np.arange(len(rows)), -1).astype(np.int32)
