"""The package's rooms: each imports only those above it, and docs/architecture.md draws them in that order."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'qformer_jax'
DRAWING = (ROOT / 'docs' / 'architecture.md').read_text().partition('## The rooms')[2].partition('\n## ')[0]
ROOMS = re.findall(r'^\| `([\w, `]+)` \|', DRAWING, flags=re.MULTILINE)


def order() -> dict[str, int]:
    """Return each room (a folder, or a module at the top) and its row in the drawing."""
    return {name: row for row, names in enumerate(ROOMS) for name in re.findall(r'\w+', names)}


def imported(path: Path) -> Iterator[str]:
    """Give the rooms that a file of the package imports, at its top or inside a function."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level + 1]
            parts = [*base, *(node.module.split('.') if node.module else [])]
            yield from parts[:1] or [alias.name for alias in node.names]


def climbing(path: Path, rows: dict[str, int]) -> list[str]:
    """Return the rooms below its own that a file imports."""
    room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    return sorted({name for name in imported(path) if rows[name] > rows[room]})


def test_the_drawing_has_every_room_once():
    rooms = [path for path in PACKAGE.iterdir() if path.suffix == '.py' or (path / '__init__.py').exists()]
    assert sorted(order()) == sorted(path.stem for path in rooms if not path.stem.startswith('__'))


@pytest.mark.parametrize('room', order())
def test_a_room_imports_only_rooms_above_it(room):
    at = PACKAGE / room
    files = sorted(at.rglob('*.py')) if at.is_dir() else [at.with_suffix('.py')]
    assert {str(path.relative_to(PACKAGE)): found for path in files if (found := climbing(path, order()))} == {}


def test_an_import_from_below_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f'{__name__}.PACKAGE', tmp_path)
    (tmp_path / 'models').mkdir()
    file = tmp_path / 'models' / 'vit.py'
    file.write_text('from ..rules import flatten\n\n\ndef f():\n    from ..training import losses\n    return losses\n')
    assert climbing(file, {'rules': 0, 'models': 1, 'training': 2}) == ['training']
