"""Texts that teach the study's small language model to read: a context of any length, a question, the answer.

A frozen language model reads a connector's tokens as it read contexts. So it meets contexts of 1 to 64 tokens, in which
what is asked stands once or many times: whoever gives it 3 tokens or 65, it has been there before.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CAPTION = 'a picture of'
"""The question whose answer is the caption."""
ROWS = COLUMNS = 4
_WORDS = 45  # of a context, at most
_ITEMS = 4  # named in a context, at most


def place(box: tuple[float, float, float, float]) -> str:
    """Return the cell of a 4 x 4 grid in which the middle of a box lies, in words: `row 2 column 3`."""
    column, row = ((box[i] + box[i + 2]) / 2 for i in (0, 1))
    return f'row {min(int(row * ROWS), ROWS - 1) + 1} column {min(int(column * COLUMNS), COLUMNS - 1) + 1}'


def where(phrase: str) -> str:
    """Return the question for the place of a phrase."""
    return f'where is the {phrase}?'


def records(concepts: list[str], count: int, rng: np.random.Generator) -> Iterator[dict]:
    """Yield contexts with questions: half name one concept, half several with their places."""
    for number in range(count):
        if number % 2:
            concept = concepts[rng.integers(len(concepts))]
            yield _line([concept], [(CAPTION, concept)], rng)
            continue
        chosen = rng.choice(concepts, size=rng.integers(1, _ITEMS + 1), replace=False)
        places = [f'row {rng.integers(ROWS) + 1} column {rng.integers(COLUMNS) + 1}' for _ in chosen]
        pairs = list(zip(chosen, places, strict=True))
        yield _line([f'{c} {p}' for c, p in pairs], [(where(c), p) for c, p in pairs], rng)


def restated(captions: list[str], questions: list[dict], rng: np.random.Generator) -> dict:
    """Return a caption as the context of its picture's questions."""
    return _line([captions[0]], [(q['question'], q['answers'][0]) for q in questions], rng)


def _line(parts: list[str], questions: list[tuple[str, str]], rng: np.random.Generator) -> dict:
    """Return a context in which each part stands about equally often, in any order."""
    words = sum(len(part.split()) for part in parts)
    times = int(rng.integers(1, max(1, _WORDS // words) + 1))
    said = [parts[i] for _ in range(times) for i in rng.permutation(len(parts))]
    entries = [{'question': question, 'answers': [answer]} for question, answer in questions]
    return {'file': 'nothing.npy', 'caption': ' '.join(said), 'questions': entries}


def write(folder: Path, splits: dict[str, list[dict]]) -> Path:
    """Write a source of `qformer data pack features`; the arrays hold nothing."""
    for split, lines in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        np.save(folder / split / 'nothing.npy', np.zeros((1, 1), np.float32))
        (folder / split / 'captions.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder
