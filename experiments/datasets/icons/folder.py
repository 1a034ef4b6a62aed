"""Writes pictures and their `captions.jsonl`, split by split, as `qformer data pack folder` reads them."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from qformer_jax.errors import UserError, full_disk_as_user_error

Item = TypeVar('Item')
Line = tuple[dict[str, Any], dict[str, bytes]]
"""One line of `captions.jsonl`, and the files that it names."""


def write(out: Path, splits: Mapping[str, Sequence[Item]], line: Callable[[Item], Line]) -> str:
    """Write every split into a folder of its own, and print what was written, its fingerprint and what to run next.

    Nothing appears at `out` before everything is drawn. Returns the fingerprint, 12 hex digits of the SHA-256 of all
    lines and files. Raises UserError when `out` is there already, when a split is empty, and when the disk is full.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"'{out}' is not empty: name a new folder, or remove it first")
    for split, items in splits.items():
        if not items:
            raise UserError(f"split '{split}' would be empty: hold out more, or take more icon sets")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.TemporaryDirectory(prefix=f'{out.name}.unfinished-', dir=out.parent)
    total, digest = 0, hashlib.sha256()
    with full_disk_as_user_error(out.parent), unfinished as scratch:
        drawn = Path(scratch) / out.name
        for split, items in splits.items():
            texts = []
            for item in track(items, f'drawing {split}', console=Console(stderr=True)):
                said, files = line(item)
                texts.append(json.dumps(said))
                digest.update(f'{split} {texts[-1]}'.encode())
                for name, data in files.items():
                    (drawn / split / name).parent.mkdir(parents=True, exist_ok=True)
                    (drawn / split / name).write_bytes(data)
                    digest.update(data)
                    total += len(data)
            (drawn / split / 'captions.jsonl').write_text('\n'.join(texts) + '\n')
        drawn.replace(out)
    counts = ', '.join(f'{split} {len(items)}' for split, items in splits.items())
    fingerprint = digest.hexdigest()[:12]
    print(f'wrote {out}: {counts}; {total / 2**20:.1f} MiB, fingerprint {fingerprint}')
    print(f'next: qformer data pack folder {out}_packed --path {out}')
    return fingerprint
