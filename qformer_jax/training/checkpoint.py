"""Checkpoints that count only once they are sealed: orbax writes them, a seal says what every byte must be.

    folder/1000/       what orbax wrote: the training state and the position of the data iterator
    folder/1000.json   its seal, written last: `info`, the SHA-256 of every file, and of the seal itself

Orbax alone restores a flipped byte without a word, and a step that was being written when the process died has to be
told from a complete one. With seals both are one rule: no seal, no checkpoint; another hash, damaged.
In a run of several processes the folder is shared, and process 0 alone seals and deletes.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from grain.checkpoint import CheckpointRestore, CheckpointSave
from jax.experimental import multihost_utils

from ..errors import UserError, full_disk_as_user_error
from ..hashing import sha256

logging.getLogger('absl').setLevel(logging.CRITICAL)  # orbax logs each error that it also raises


class Checkpoints:
    """The checkpoints of one run: the newest two and the best by validation loss are kept.

    Between `save` and `wait`, only the sealing thread touches the folder.
    """

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, 'seal')
        self._sealing: Future | None = None

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator, info: dict) -> None:
        """Start to save a pytree of arrays; returns as soon as they are copied, and replaces an earlier `step`.

        `info` is JSON; `info['validation_loss']`, nats, may be None. Raises UserError when the disk is full.
        """
        self.wait()
        if jax.process_index() == 0:
            self._seal_path(step).unlink(missing_ok=True)
        with full_disk_as_user_error(self._folder):
            parts = ocp.args.Composite(state=ocp.args.StandardSave(state), data=CheckpointSave(iterator))
            self._orbax.save(self._folder / str(step), args=parts, force=True)
        self._sealing = self._thread.submit(self._finish, step, info)

    def poll(self) -> None:
        """Raise what went wrong in the background (UserError when the disk is full); call it every step."""
        if self._sealing is not None and self._sealing.done():
            self.wait()

    def wait(self) -> None:
        """Return when the last `save` is sealed; raises as `poll` does."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()

    def close(self) -> None:
        """Finish the last `save`, then free the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def restore(self, abstract_state: Any, iterator: grain.DatasetIterator) -> tuple[Any, int, dict] | None:
        """Return (state, step, info) of the newest intact checkpoint, and move `iterator` to its place.

        `abstract_state` holds ShapeDtypeStructs with shardings. None when nothing was ever sealed. Damaged
        checkpoints are named on stderr and deleted; UserError when there are only damaged ones, or a state of other
        arrays.
        """
        self.wait()
        steps = self._sealed()
        step = self._first_intact(sorted(steps, reverse=True))
        multihost_utils.sync_global_devices('checkpoint chosen')  # nobody reads what process 0 now deletes
        self._keep(s for s in steps if step is not None and s <= step)
        if step is None:
            return None
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=CheckpointRestore(iterator))
        return self._read(step, parts), step, self._read_seal(step)['info']

    def best(self, abstract_state: Any, held: int) -> tuple[Any, int] | None:
        """Return (state, step) of the intact checkpoint with the lowest validation loss.

        None when none has a loss, and when it is step `held`: the caller has that state, and a second copy of it may
        not fit. Damaged checkpoints are named on stderr; UserError when there are only damaged ones.
        """
        self.wait()
        step = self._first_intact(self._by_loss())
        if step in (None, held):
            return None
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._read(step, parts), step

    def _read(self, step: int, parts: ocp.args.Composite) -> Any:
        """Return the state of a step; raises UserError where it is none of this program's."""
        try:
            return self._orbax.restore(self._folder / str(step), args=parts)['state']
        except ValueError as error:
            reason = ' '.join(str(error).splitlines()[:2])
            raise UserError(
                f'{self._folder / str(step)}: the state of another version of this program, it seems ({reason}); '
                'finish the run with that one, or begin it in a new folder'
            ) from error

    def _finish(self, step: int, info: dict) -> None:
        """Wait until orbax has written `step`, seal it, and delete what is no longer kept (in the thread)."""
        try:
            with full_disk_as_user_error(self._folder):
                self._orbax.wait_until_finished()
                if jax.process_index() == 0:
                    self._write_seal(step, info)
        finally:
            best = [s for s in self._by_loss() if math.isfinite(self._loss(s))]
            self._keep([*sorted(self._sealed())[-2:], *best[:1]])

    def _write_seal(self, step: int, info: dict) -> None:
        root = self._folder / str(step)
        files = {str(path.relative_to(root)): sha256(path) for path in sorted(root.rglob('*')) if path.is_file()}
        seal = {'info': info, 'files': files}
        scratch = self._folder / f'{step}.json.tmp'
        scratch.write_text(json.dumps(seal | {'sha256': _digest(seal)}, indent=1))
        os.replace(scratch, self._seal_path(step))

    def _read_seal(self, step: int) -> dict:
        """Return the seal of a step; raises ValueError or KeyError when it is damaged."""
        seal = json.loads(self._seal_path(step).read_bytes())
        if seal.pop('sha256') != _digest(seal):
            raise ValueError('the seal does not match its own checksum')
        return seal

    def _seal_path(self, step: int) -> Path:
        return self._folder / f'{step}.json'

    def _sealed(self) -> list[int]:
        return [int(path.stem) for path in self._folder.glob('*.json') if path.stem.isdigit()]

    def _by_loss(self) -> list[int]:
        """Return the sealed steps that have a validation loss, the lowest first; NaN is no loss."""
        losses = {step: self._loss(step) for step in self._sealed()}
        return sorted((step for step in losses if losses[step] < math.inf), key=losses.get)

    def _loss(self, step: int) -> float:
        """Return the validation loss of a step; inf when it has none, -inf when its seal cannot be read."""
        try:
            loss = self._read_seal(step)['info'].get('validation_loss')
        except (ValueError, KeyError):
            return -math.inf  # it may have been the best: so it comes first, and is named as damaged
        return math.inf if loss is None else loss

    def _damage(self, step: int) -> str:
        """Return what is wrong with a sealed step, naming the file, or an empty string."""
        try:
            files = self._read_seal(step)['files']
        except (ValueError, KeyError):
            return f'{self._seal_path(step)} is damaged'
        for name, digest in files.items():
            path = self._folder / str(step) / name
            if not path.is_file():
                return f'{path} is missing'
            if sha256(path) != digest:
                return f'{path} does not match its checksum'
        return ''

    def _first_intact(self, steps: list[int]) -> int | None:
        """Return the first intact one of `steps`, naming the damaged ones before it on stderr; None if there is none.

        Raises UserError when all of them are damaged.
        """
        damaged = []
        for step in steps:
            damage = self._damage(step)
            if not damage:
                for line in damaged:
                    print(f'{line}: using checkpoint {step} instead', file=sys.stderr)
                return step
            damaged.append(f'checkpoint {step} is damaged: {damage}')
        if damaged:
            raise UserError(f'{"; ".join(damaged)}; put the files back, or delete {self._folder} to start afresh')
        return None

    def _keep(self, steps: Iterable[int]) -> None:
        """Delete every step but `steps`, seals first: a kill in between leaves unsealed steps, never damaged ones."""
        if jax.process_index() != 0 or not self._folder.is_dir():
            return
        kept = {str(step) for step in steps}
        names = {path: path.name.split('.')[0] for path in self._folder.iterdir()}
        for path in sorted(names, key=Path.is_dir):
            if names[path].isdigit() and names[path] not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _digest(seal: dict) -> str:
    return hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
