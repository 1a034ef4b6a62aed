"""A packed data set of pictures as one of a frozen tower's features: encode once, train many times."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from ..data import pack
from ..data.dataset import Dataset, Source
from ..data.encoder import Encoder
from ..data.records import Record
from ..errors import UserError
from ..runs import run_dir
from .blip2 import Blip2


def encode(
    data: Path,
    out: Path,
    run: Path,
    batch_size: int = 64,
    taps: tuple[int, ...] = (),
    connector: type | None = None,
) -> None:
    """Write the records of `data` to `out`, features [P, V] in the tower's compute dtype in the pictures' places.

    Texts, splits, order and tokenizers stay; `taps` takes the place of the tower's, and `connector` is the class of the
    run's own. Raises UserError when `run` is not finished or has no tower, the data set holds features already, or
    `out` holds another data set.
    """
    dataset, done = Dataset.open(data), run_dir.finished(run, connector)
    if dataset.feature_shape:
        raise UserError(f"'{data}' holds feature arrays, not pictures: name the data set of the pictures")
    if not done.run.model.vit:
        raise UserError(f"run '{run}' has no vision tower: name the 'vision' run, or one that begins with it")
    vit = dataclasses.replace(done.run.model.vit, taps=taps or done.run.model.vit.taps)
    tower = Encoder(str(run), done.last['vit'], vit, done.run.training.dtype)
    _check_same(out, dataset, tower)
    model = Blip2.load(run, batch_size=batch_size, connector=connector)
    seeing = dataclasses.replace(model.run, model=dataclasses.replace(model.run.model, vit=vit))
    model = dataclasses.replace(model, run=seeing)
    records = {split: _encoded(model, dataset.source(split)) for split in dataset.splits}
    pack.pack(records, out, data / pack.WORDPIECE, data / pack.BYTE_BPE, tower)


def _check_same(out: Path, dataset: Dataset, tower: Encoder) -> None:
    """Raise UserError where `out` holds another data set, or another tower's features: said before the work."""
    if not (out / pack.CONTENT).is_file():
        return
    there = Dataset.open(out)
    sizes, wanted = ({split: len(rows) for split, rows in each.counts.items()} for each in (there, dataset))
    if sizes != wanted or there.encoder != dataclasses.replace(tower, run=there.encoder.run if there.encoder else ''):
        raise UserError(f'{out}: holds another packed data set; choose a new folder, or remove it first')


def _encoded(model: Blip2, records: Source) -> Iterator[Record]:
    texts, pictures = itertools.tee(records[i] for i in range(len(records)))
    features = (
        row
        for image_features in model.iter_features(record.model_input for record in pictures)
        for row in image_features.rows()
    )
    for record, row in zip(texts, features, strict=True):
        yield dataclasses.replace(record, image=None, frames=(), features=row)
