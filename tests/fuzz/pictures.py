"""Files that should be pictures: 30 formats, damaged, and what is no file at all."""

import io
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.robustness import mutations
from qformer_jax.data import jsonl, pictures
from qformer_jax.data.transforms import eval_image
from qformer_jax.export import runner
from qformer_jax.inference import inputs

OTHERS = {
    'heic': b'\0\0\0\x18ftypheic' + bytes(90),
    'svg': b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    'psd': b'8BPS\0\1' + bytes(60),
    'txt': b'no picture',
    'html': b'<!DOCTYPE html><html></html>',
    'gz': b'\x1f\x8b\x08' + bytes(60),
    'mp4': b'\0\0\0\x18ftypmp42' + bytes(90),
    'npy': b'\x93NUMPY\1\0' + bytes(60),
}


def make(home: Path) -> None:
    """Write a picture in every format that Pillow writes, and files of formats that nobody reads."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    Image.init()
    (home / 'whole').mkdir(exist_ok=True)
    for form in sorted(Image.SAVE):
        for mode in ('RGB', 'L', '1', 'P', 'RGBA', 'CMYK', 'I;16', 'F'):
            file = io.BytesIO()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
                    (grey if mode == 'I;16' else Image.fromarray(pixels).convert(mode)).save(file, form)
            except Exception:  # of a format that has no such mode, or needs what is not there
                continue
            (home / 'whole' / f'{mode.replace(";", "")}.{form.lower()}').write_bytes(file.getvalue())
    for name, data in OTHERS.items():
        (home / 'whole' / f'other.{name}').write_bytes(data)


def read(file: Path) -> None:
    """Read a file by all that reads pictures; they must agree, and read only what is stated."""
    data = jsonl.read_picture(file)
    with Image.open(file) as image:
        form = image.format
    assert form in (*pictures.FORMATS, 'MPO'), f'{form} was read'
    pixels = inputs.read(file, 16)
    np.testing.assert_array_equal(pixels, eval_image(data, 16))
    served = np.asarray(runner.upright(file).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels, served)


def _special(folder: Path, draw: random.Random) -> Path:
    """Return what is no regular file, or cannot be one."""
    made = {
        'pipe': lambda file: os.mkfifo(file),
        'zero': lambda file: file.symlink_to('/dev/zero'),
        'random': lambda file: file.symlink_to('/dev/urandom'),
        'loop': lambda file: file.symlink_to(file.name),
        'nowhere': lambda file: file.symlink_to('gone'),
        'folder.png': lambda file: file.mkdir(),
        'large': lambda file: os.truncate(file, 2**40) if file.write_bytes(b'\x89PNG\r\n\x1a\n') else None,
        'a' * 300: lambda file: None,
        'a\0b': lambda file: None,
        'a.png/b': lambda file: None,
        '.': lambda file: None,
    }
    name = draw.choice(sorted(made))
    made[name](folder / name)
    return folder / name


def bomb(file: Path, draw: random.Random) -> mutations.Verdict:
    """State a size that nobody has memory for."""
    data = bytearray(file.read_bytes())
    at = data.find(b'IHDR')
    if at < 0:
        return mutations.flip(file, draw)
    data[at + 4 : at + 12] = draw.choice((2**31 - 1, 2**16, 2**20)).to_bytes(4, 'big') * 2
    file.write_bytes(data)
    return 'refused'


def cases(home: Path, draw: random.Random) -> Iterator[tuple[str, mutations.Verdict, Callable[[], None]]]:
    """Yield without end: a name, its verdict, and the function that reads the file."""
    damaged = home / 'damaged'
    while True:
        shutil.rmtree(damaged, ignore_errors=True)
        damaged.mkdir()
        if draw.random() < 0.1:
            file = _special(damaged, draw)
            yield file.name[:20], 'refused', partial(read, file)
            continue
        whole = draw.choice(sorted((home / 'whole').iterdir()))
        file = damaged / whole.name
        shutil.copy(whole, file)
        stated = {form.lower() for form in pictures.FORMATS}
        if draw.random() < 0.2:
            name, verdict = 'whole', 'either' if file.suffix[1:] in (*stated, 'mpo', 'pdf') else 'refused'
        else:
            damage = draw.choice((mutations.flip, mutations.noise, mutations.zeros, mutations.cut, mutations.longer,
                                  mutations.emptied, mutations.neighbour, bomb))  # fmt: skip
            name, verdict = damage.__name__, damage(file, draw)
            verdict = verdict if damage in (mutations.emptied, bomb) else 'either'
        yield f'{whole.name}: {name}', verdict, partial(read, file)
