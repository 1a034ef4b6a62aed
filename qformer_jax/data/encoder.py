"""Which tower made the features of a data set, and whether a run may read them in place of its own tower's."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .. import json_file
from ..config import VitConfig, part_of, to_tree
from ..errors import UserError
from .transforms import READ, READ_EARLIER

FILE = 'encoder.json'


class _EncoderFile(msgspec.Struct, forbid_unknown_fields=True):
    """What encoder.json holds."""

    run: str
    weights: str
    vit: dict
    dtype: str
    read: str


@dataclass(frozen=True)
class Encoder:
    """A frozen tower, as `qformer data encode` found it."""

    run: str
    """Folder of the run that holds it, as it was given."""
    weights: str
    """Digest of its weights in the store beside that run."""
    vit: VitConfig
    """Its sizes."""
    dtype: str
    """In which it computed."""
    read: str = READ
    """How pictures were read."""

    @classmethod
    def load(cls, folder: Path) -> 'Encoder | None':
        """Return the encoder of a packed data set; None where it was not written by `qformer data encode`."""
        file = folder / FILE
        if not file.is_file():
            return None
        found = json_file.read(file, _EncoderFile, 'encode the data set again')
        tree = msgspec.structs.asdict(found)
        return cls(**tree | {'vit': part_of(found.vit, VitConfig, f'{file}: vit')})

    def save(self, folder: Path) -> None:
        """Write it into a packed data set."""
        json_file.write(folder / FILE, to_tree(self))

    def check(self, data: Path | str, weights: str | None, vit: VitConfig | None) -> None:
        """Raise UserError unless a run's tower, with these weights and sizes (None: it has none), is this one."""
        if vit and not weights:
            raise UserError(f"'{data}' holds features of the tower in '{self.run}': give --start.vit {self.run}")
        if weights and weights != self.weights:
            raise UserError(
                f"'{data}' was encoded by the tower in '{self.run}' ({self.weights[:12]}), not by this run's "
                f'({weights[:12]}): give --start.vit {self.run}, or encode it again with this one (qformer data encode)'
            )
        names = [
            f.name for f in dataclasses.fields(VitConfig) if f.name != 'positions'
        ]  # which tells of its first step only
        differs = [name for name in names if vit and getattr(vit, name) != getattr(self.vit, name)]
        if differs:
            rows = (f'model.vit.{n} {getattr(self.vit, n)} there, {getattr(vit, n)} here' for n in differs)
            raise UserError(f"'{data}' was encoded by a tower of other sizes: {'; '.join(rows)}")
        if self.read not in (READ, *READ_EARLIER):
            raise UserError(f"'{data}' was encoded from pictures read as '{self.read}', not '{READ}': encode it again")
