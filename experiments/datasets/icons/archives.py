"""Iconify's icon sets: fetched with `npm pack`, read out of the archives that it leaves.

Every archive holds `icons.json` (the inside of an SVG a name) and `info.json` (the licence).
"""

import json
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qformer_jax.errors import UserError, nearest

COLOUR = {
    'noto': '1.2.9',
    'noto-v1': '1.2.5',
    'twemoji': '1.2.5',
    'openmoji': '1.2.29',
    'emojione': '1.2.3',
    'fluent-emoji-flat': '1.2.6',
    'fxemoji': '1.2.2',
    'streamline-emojis': '1.2.4',
    'flat-color-icons': '1.2.3',
}
"""Sets in colours, and the versions whose counts the README gives."""
LINE = {
    'mdi': '1.2.3',
    'ph': '1.2.2',
    'tabler': '1.2.41',
    'material-symbols': '1.2.98',
    'game-icons': '1.2.4',
    'fluent': '1.2.60',
    'solar': '1.2.13',
    'carbon': '1.2.29',
}
"""Sets in black on white."""
VERSIONS = COLOUR | LINE


@dataclass(frozen=True)
class IconSet:
    """What one vendor drew."""

    name: str
    """Its name on Iconify."""
    licence: str
    """SPDX identifier."""
    icons: dict[str, str]
    """Name -> SVG, square."""
    aliases: dict[str, str]
    """Other names -> name, of the same picture."""


def fetch(names: Sequence[str], folder: Path) -> None:
    """Have npm put the archives that `folder` lacks into it; raises UserError when there is no npm, or no network."""
    missing = [f'@iconify-json/{name}@{VERSIONS[name]}' for name in names if not archive(name, folder).is_file()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = ['npm', 'pack', '--silent', '--pack-destination', str(folder), *missing]
    try:
        subprocess.run(words, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f'no npm here; where there is one, run: {" ".join(words)}') from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ['no reason given'])[0]
        raise UserError(f"npm could not fetch '{missing[0]}' or one after it: {reason}") from None


def archive(name: str, folder: Path) -> Path:
    """Return where `npm pack` puts a set; raises UserError when the name is unknown."""
    if name not in VERSIONS:
        raise UserError(f"no icon set '{name}'{nearest(name, VERSIONS)}; known are {', '.join(VERSIONS)}")
    return folder / f'iconify-json-{name}-{VERSIONS[name]}.tgz'


def read(name: str, folder: Path) -> IconSet:
    """Return a set, without the icons that its vendor withdrew; raises UserError when the archive is damaged."""
    file = archive(name, folder)
    try:
        with tarfile.open(file) as tar:
            found, info = (json.load(tar.extractfile(f'package/{part}.json')) for part in ('icons', 'info'))
    except (OSError, tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise UserError(f'{file}: not an archive of an icon set ({error}); remove it and fetch it again') from error
    icons = {key: _svg(icon, found) for key, icon in sorted(found['icons'].items()) if not icon.get('hidden')}
    listed = found.get('aliases', {})  # one with more than a parent is turned or mirrored: another picture
    aliases = {key: alias['parent'] for key, alias in sorted(listed.items()) if alias.keys() == {'parent'}}
    return IconSet(name, info['license']['spdx'], icons, aliases)


def _svg(icon: dict, whole: dict) -> str:
    """Return an icon as an SVG in the smallest square around it; sizes that it lacks are the set's, or 16."""
    left, top, width, height = (
        icon.get(k, whole.get(k, d)) for k, d in (('left', 0), ('top', 0), ('width', 16), ('height', 16))
    )
    side = max(width, height)
    box = f'{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )
