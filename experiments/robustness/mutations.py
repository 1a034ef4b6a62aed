"""Ways to damage a file, each with its verdict: what a reader of the file has to do.

`refused`: one line that names the file. `same`: it is read, and says what it said before. `either`: one of the two, as
of a flipped bit, which may fall into bytes that nobody reads.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

Verdict = Literal['refused', 'same', 'either']
Mutation = Callable[[Path, random.Random], Verdict]


def flip(file: Path, draw: random.Random) -> Verdict:
    """Flip one bit."""
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return 'either'


def noise(file: Path, draw: random.Random) -> Verdict:
    """Overwrite up to 64 bytes."""
    data = bytearray(file.read_bytes())
    at, size = draw.randrange(len(data)), draw.randrange(1, 65)
    data[at : at + size] = draw.randbytes(min(size, len(data) - at))
    file.write_bytes(data)
    return 'either'


def zeros(file: Path, draw: random.Random) -> Verdict:
    """Blank a block, as a file system that lost one does."""
    data = bytearray(file.read_bytes())
    at = draw.randrange(len(data))
    data[at : at + 512] = bytes(min(512, len(data) - at))
    file.write_bytes(data)
    return 'either'


def cut(file: Path, draw: random.Random) -> Verdict:
    """Keep the beginning alone."""
    file.write_bytes(file.read_bytes()[: draw.randrange(1, file.stat().st_size)])
    return 'either'  # of JSON and text, the last byte may be a line's end


def longer(file: Path, draw: random.Random) -> Verdict:
    """Append bytes."""
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randrange(1, 100)))
    return 'either'


def emptied(file: Path, draw: random.Random) -> Verdict:
    """Leave nothing."""
    file.write_bytes(b'')
    return 'refused'


def removed(file: Path, draw: random.Random) -> Verdict:
    """Remove it."""
    file.unlink()
    return 'refused'


def folder(file: Path, draw: random.Random) -> Verdict:
    """Put a folder in its place."""
    file.unlink()
    file.mkdir()
    return 'refused'


def itself(file: Path, draw: random.Random) -> Verdict:
    """Put a link to itself in its place."""
    file.unlink()
    file.symlink_to(file.name)
    return 'refused'


def neighbour(file: Path, draw: random.Random) -> Verdict:
    """Put another file of its folder in its place."""
    others = sorted(p for p in file.parent.iterdir() if p.is_file() and p.read_bytes() != file.read_bytes())
    if others:
        file.write_bytes(draw.choice(others).read_bytes())
    return 'refused' if others else 'same'


def latin(file: Path, draw: random.Random) -> Verdict:
    """Add a byte that UTF-8 has not, inside a text."""
    data = file.read_bytes()
    at = data.index(b'"') + 1
    file.write_bytes(data[:at] + b'\xe9' + data[at:])
    return 'refused'


def mark(file: Path, draw: random.Random) -> Verdict:
    """Put a byte-order mark in front, as some editors do."""
    file.write_bytes(b'\xef\xbb\xbf' + file.read_bytes())
    return 'either'


BYTES: tuple[Mutation, ...] = (flip, flip, flip, noise, zeros, cut, longer, emptied, removed, folder, itself, neighbour)
TEXT: tuple[Mutation, ...] = (latin, mark)


def _places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from _places(value, (*path, key))


def _put(tree: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    tree[path[0]] = _put(tree[path[0]], path[1:], value)
    return tree


def _get(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


ODD = (
    None,
    True,
    -1,
    0,
    3,
    2**70,
    1e300,
    float('nan'),
    float('inf'),
    '',
    'x',
    '\ud800',
    [],
    {},
    [[1]],
    {'a': 1},
    'é' * 99,
)


def another_value(file: Path, draw: random.Random) -> Verdict:
    """Put an odd value in the place of one."""
    tree = json.loads(file.read_text())
    path = draw.choice(list(_places(tree)))
    odd = draw.choice(ODD)
    file.write_text(json.dumps(_put(tree, path, odd)))
    if json.dumps(_get(tree, path)) == json.dumps(odd):
        return 'same'
    return 'either' if moves_only(path) else 'refused'


def another_number(file: Path, draw: random.Random) -> Verdict:
    """Change a number or a switch a little: what remains is likely."""
    tree = json.loads(file.read_text())
    numbers = [path for path in _places(tree) if isinstance(_get(tree, path), bool | int | float)]
    if not numbers:
        return another_value(file, draw)
    path = draw.choice(numbers)
    value = _get(tree, path)
    file.write_text(json.dumps(_put(tree, path, not value if isinstance(value, bool) else value * 2 + 1)))
    return 'refused'


def another_letter(file: Path, draw: random.Random) -> Verdict:
    """Change a letter of a text."""
    tree = json.loads(file.read_text())
    texts = [path for path in _places(tree) if isinstance(_get(tree, path), str) and _get(tree, path)]
    path = draw.choice(texts)
    text = _get(tree, path)
    at = draw.randrange(len(text))
    file.write_text(json.dumps(_put(tree, path, text[:at] + ('0' if text[at] != '0' else '1') + text[at + 1 :])))
    return 'either' if moves_only(path) else 'refused'


def one_key_less(file: Path, draw: random.Random) -> Verdict:
    """Remove a key."""
    tree = json.loads(file.read_text())
    path = draw.choice([path for path in _places(tree) if path and isinstance(_get(tree, path[:-1]), dict)])
    rest = {key: value for key, value in _get(tree, path[:-1]).items() if key != path[-1]}
    file.write_text(json.dumps(_put(tree, path[:-1], rest)))
    return 'either' if moves_only(path) else 'refused'


def one_key_more(file: Path, draw: random.Random) -> Verdict:
    """Add a key that nobody knows."""
    tree = json.loads(file.read_text())
    path = draw.choice([path for path in _places(tree) if isinstance(_get(tree, path), dict)])
    file.write_text(json.dumps(_put(tree, path, _get(tree, path) | {'colour': 'red'})))
    return 'refused'


def deep(file: Path, draw: random.Random) -> Verdict:
    """Nest lists until a parser gives up."""
    file.write_text('[' * 100_000 + ']' * 100_000)
    return 'refused'


def spaced(file: Path, draw: random.Random) -> Verdict:
    """Write the same JSON another way."""
    file.write_text(json.dumps(json.loads(file.read_text()), indent=3))
    return 'either'


JSON: tuple[Mutation, ...] = (another_value, another_value, another_value, another_number, another_number)
JSON += (another_letter, one_key_less, one_key_more, deep, spaced)


def moves_only(path: tuple) -> bool:
    """Return whether a value says only where something lies, which may be changed."""
    return (path[:2] == ('config', 'start') and len(path) > 2) or path[:3] == ('config', 'data', 'path')
