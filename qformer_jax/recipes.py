"""`configs/NAME.py` by name: each file's docstring is the model card, its `config()` returns the `Run`."""

import ast
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, nearest

if TYPE_CHECKING:
    from .config import Run

_HERE = Path(__file__).parent
FOLDER = next((f for f in (_HERE / 'configs', _HERE.parent / 'configs') if f.is_dir()), _HERE / 'configs')


def names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob('*.py'))


def first_line(name: str) -> str:
    """Return the first line of a recipe's model card, without running the recipe."""
    return (ast.get_docstring(ast.parse((FOLDER / f'{name}.py').read_text())) or '').partition('\n')[0]


def load(name: str) -> tuple['Run', str]:
    """Return the run and the model card of a recipe, by name or by path of a `.py` file; raises UserError."""
    path = Path(name) if name.endswith('.py') else FOLDER / f'{name}.py'
    if not path.is_file():
        raise UserError(f"no recipe '{name}'{nearest(name, names())}; recipes: {', '.join(names())}, or a .py file")
    sys.path.insert(0, str(path.parent))  # as of any script: a recipe may import what lies beside it
    try:
        module = runpy.run_path(str(path))
    finally:
        sys.path.remove(str(path.parent))
    if 'config' not in module:
        raise UserError(f"'{path}' defines no function config() that returns a Run")
    return module['config'](), (module['__doc__'] or '').strip()
