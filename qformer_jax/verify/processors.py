"""Pictures to pixels and texts to clean texts (case `processors`), all of it on the host but the normalisation."""

import json
import re

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from PIL import Image

from ..data import transforms
from ..data.tokenizers import clean_caption, clean_question
from ..errors import UserError
from ..models.vit import normalise
from ..typing import Array, Params
from .case import Case
from .plan import plan
from .work import Arrays, Work

TEXTS = 'text.json'
CLEAN = {'caption': clean_caption, 'question': clean_question}
PALETTE = 'a palette without its colours: compared from its RGB picture on'


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError where a name or a description is not understood."""
    host, left_out = {}, {}
    for name in [name.removesuffix('.raw') for name in case.arrays if name.endswith('.raw')]:
        image = _picture(case, name)
        host[f'{name}.rgb'] = np.asarray(image)
        if _mode(case, name) == 'P':
            left_out |= {f'{name}.raw': PALETTE, f'{name}.rgb': PALETTE}
        for size in _sizes(case, rf'{re.escape(name)}\.(?:resized|eval)(\d+)'):
            host[f'{name}.resized{size}'] = transforms.eval_image(image, size)
    for size in _sizes(case, r'train(\d+)\.out'):
        host[f'train{size}.pixels'] = _trained(case, size)
        left_out |= dict.fromkeys((f'train{size}.crop', f'train{size}.flip'), 'input')
    texts = _texts(case)

    def function(params: Params, x: Arrays, dtype: DTypeLike) -> Arrays:
        out = {name: jnp.asarray(pixels) for name, pixels in host.items()} | {name: y for name, (y, _) in texts.items()}
        for name, pixels in host.items():
            out[name.replace('.resized', '.eval')] = _planes(pixels[None])[0] if '.resized' in name else out[name]
            if name.endswith('.pixels'):
                out[name.replace('.pixels', '.out')] = _planes(pixels)
        return out

    inputs = {name: x for name, x in case.arrays.items() if name.endswith('.raw')}
    return plan(
        case, {}, inputs, function, left_out=left_out, derived={name: want for name, (_, want) in texts.items()}
    )


def _planes(pixels: np.ndarray) -> Array:
    """Return normalised pictures, NCHW as recorded."""
    return normalise(jnp.asarray(pixels)).transpose(0, 3, 1, 2)


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
    return transforms.decode(Image.fromarray(raw))


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


def _texts(case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return for each way of cleaning the numbers of the texts, ours with -1 where the result differs, and theirs."""
    if not (case.folder / TEXTS).is_file():
        raise UserError(f'{case.folder / TEXTS}: no such file')
    try:
        rows = json.loads((case.folder / TEXTS).read_text())
    except ValueError as error:
        raise UserError(f'{case.folder / TEXTS}: not JSON ({error})') from error
    return {f'{TEXTS}: {way}': _cleaned(rows, way) for way in rows[0] if way != 'in'}


def _cleaned(rows: list[dict], way: str) -> tuple[np.ndarray, np.ndarray]:
    kind, _, option = way.partition('_')
    limit = [int(option.removeprefix('max'))] if option.startswith('max') else []
    good = []
    for row in rows:
        prompt = row[way].removesuffix(row[kind]) if option == 'prompt' else ''
        good.append(prompt + CLEAN[kind](row['in'], *limit) == row[way])
    numbers = np.arange(len(rows), dtype=np.int32)
    return np.where(good, numbers, -1).astype(np.int32), numbers
