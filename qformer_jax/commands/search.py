"""`qformer search` and `qformer embed`: pictures found by text, and the vectors that find them."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..config.ranges import FromZero
from ..errors import UserError
from .options import RunFolder, Wait

if TYPE_CHECKING:
    from ..inference.blip2 import Blip2


@dataclass(frozen=True)
class Search:
    """Find the pictures of a folder that fit a text, with a stage-1 run.

    As BLIP-2 retrieves: pictures are ranked by the cosine of the text and of the query nearest to it (ITC); the best of
    them are ranked again by the image-text matching head (ITM), whose score is its logit of "matched" plus the cosine.
    What a picture gives is kept in `cache` beside the run, by content, so a second search encodes new and changed
    pictures only; that folder may be deleted at any time.
    """

    run: RunFolder
    """Folder of a stage-1 run."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar='FOLDER')]
    """Folder of pictures; those in its subfolders are found too."""
    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar='TEXT')]
    """What the pictures should show, in quotes."""
    top: int = 10
    """How many pictures to print."""
    rerank: FromZero = 128
    """How many of the best by ITC are ranked again by ITM; 0: none, which keeps under a twentieth as much on disk."""
    wait: Wait = False


def search(options: Search) -> None:
    """Print the table and say where the index is."""
    from rich.console import Console
    from rich.table import Table

    from ..lock import one_writer

    index = options.run.parent / 'cache'
    with one_writer(index, options.wait):
        hits = _hits(options, index)
    view = Table(title=options.text)
    for name, side in (('', 'right'), ('picture', 'left'), ('ITM + cosine', 'right'), ('cosine', 'right')):
        view.add_column(name, justify=side, overflow='fold')
    for place, hit in enumerate(hits, 1):
        score = '' if hit.score is None else f'{hit.score:.4f}'
        view.add_row(str(place), str(hit.file), score, f'{hit.cosine:.4f}')
    Console().print(view)
    print(f'index: {index}; next: qformer caption {shlex.quote(str(options.run))} {shlex.quote(str(hits[0].file))}')


def _hits(options: Search, index: Path) -> list:
    """Return the best pictures."""
    from ..inference.image_search import Gallery, picture_files

    model = _load(options.run, index)
    files = picture_files([options.folder], '' if model.run.model.vit else '.npy')
    return Gallery(model, files, options.rerank > 0).search(options.text, options.rerank)[: options.top]


@dataclass(frozen=True)
class Embed:
    """Write the ITC vectors of pictures and texts, for a vector database or a classifier of one's own.

    A picture gives a unit vector for each query, a text gives one; a picture is as similar to a text as the nearest of
    its vectors, by dot product (BLIP-2, section 3.1). The file holds `pictures` [N, Q, E] and `texts` [M, E], float32;
    the JSON file beside it names the rows.
    """

    run: RunFolder
    """Folder of a stage-1 run."""
    pictures: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar='PICTURE...', help_behavior_hint='(or --texts)')
    ] = ()
    """Picture files, or folders of them."""
    texts: tuple[str, ...] = ()
    """Texts, each in quotes."""
    out: Path = Path('vectors.safetensors')
    """File to write."""


def embed(options: Embed) -> None:
    """Write both files and say what they hold."""
    import numpy as np
    from safetensors.numpy import save_file

    from .. import json_file
    from ..atomic import check_writable, replacing
    from ..inference.image_search import picture_files

    if not options.pictures and not options.texts:
        raise UserError('nothing to embed: qformer embed RUN PICTURE... (or --texts TEXT...)')
    if options.out.suffix != '.safetensors':
        raise UserError(f"'{options.out}': name it .safetensors")
    check_writable(options.out.parent)
    model, tensors, names = _load(options.run), {}, {}
    if options.pictures:
        files = picture_files(options.pictures, '' if model.run.model.vit else '.npy')
        vectors = [model.features(image_features) for image_features in model.iter_features(files)]
        tensors['pictures'], names['pictures'] = np.concatenate(vectors), list(map(str, files))
    if options.texts:
        tensors['texts'], names['texts'] = model.features(texts=options.texts, mode='text'), list(options.texts)
    beside = options.out.with_suffix('.json')
    with replacing(options.out) as scratch:
        save_file({name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}, scratch)
    json_file.write(beside, names)
    shapes = ', '.join(f'{name} {list(tensor.shape)}' for name, tensor in tensors.items())
    print(f'wrote {options.out}: {shapes}; {beside}: their names')
    print(f'next: safetensors.numpy.load_file({str(options.out)!r}), or qformer search RUN FOLDER TEXT')


def _load(run: Path, cache: Path | None = None) -> 'Blip2':
    from ..inference.blip2 import Blip2
    from ..training.stages import STAGES

    model = Blip2.load(run, cache=cache)
    if STAGES[model.run.stage].generates:
        raise UserError(
            f"'{run}' is a '{model.run.stage}' run: its queries have left the space that they shared with texts; give "
            "the 'stage1' run before it"
        )
    return model
