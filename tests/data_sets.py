"""Small data sets that the tests of `data` pack and read."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from qformer_jax.data.records import Record

COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255)}


def png(name: str, size: int = 24) -> bytes:
    """Return a PNG whose left half has the colour and whose right half is black."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[:, : size // 2] = COLOURS[name]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def record(number: int, captions: int = 2, questions: int = 1) -> Record:
    """Return the picture `number` with so many captions and questions."""
    colour = list(COLOURS)[number % 3]
    return Record(
        image_id=f'{number}.png',
        image=png(colour),
        captions=(f'A {colour} half.', f'half is {colour}', 'a third one')[:captions],
        questions=('What color is it?', 'Is it red?')[:questions],
        answers=((colour, f'it is {colour}'), ('yes' if colour == 'red' else 'no',))[:questions],
    )


def feature_record(number: int) -> Record:
    """Return a feature array of 2 + number % 3 rows, 4 columns, all of them `number` + 1."""
    array = np.full((2 + number % 3, 4), number + 1, np.float32)
    return Record(image_id=f'{number}.npy', features=array, captions=(f'number {number}',))


def write_lines(folder: Path, *lines: object) -> Path:
    """Write `captions.jsonl` into the folder; a text is written as it is, anything else as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / 'captions.jsonl').write_text('\n'.join(texts) + '\n')
    return folder
