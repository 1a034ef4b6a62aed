"""`qformer ground`: where phrases are in a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .options import ConnectorFile, PictureFile, RunFolder, several


@dataclass(frozen=True)
class Ground:
    """Say where things are in a picture: boxes for each phrase, in location words, as KOSMOS-2 does.

    The run's language model reads the picture and <grounding><phrase>PHRASE</phrase>, and writes a box
    as <object><patch_index_0044><patch_index_0863></object>: its top left and bottom right cell in a grid over the
    picture, 32 x 32 unless the run's model.grounding says otherwise; so each edge is exact to half a cell. What the
    model writes that is no box is left out and counted.

    Both files are written to --out: ground.png is the picture with its boxes; ground.json holds for each phrase its
    boxes (left, top, right and bottom edge, as shares of width and height) and the count of what was left out.
    """

    run: RunFolder
    """Folder of a run that was trained with model.grounding."""
    picture: PictureFile
    """Picture file."""
    phrases: Annotated[tyro.conf.Positional[tuple[str, ...]], several('PHRASE')]
    """What to look for, each in quotes: 'the red circle'."""
    out: Path = Path('ground')
    """Folder to write."""
    connector: ConnectorFile = None


def ground(options: Ground) -> None:
    """Print the boxes; write ground.png and ground.json."""
    from .. import atomic, json_file
    from ..errors import UserError
    from ..inference.blip2 import Blip2
    from ..inference.locate import draw, locate

    if not options.phrases:
        raise UserError("no phrase given: say what to look for, such as 'the red circle'")
    atomic.check_writable(options.out)
    model = Blip2.load(options.run, connector=options.connector)
    encoded = model.encode_queries([options.picture]).take([0] * len(options.phrases))
    said = dict(zip(options.phrases, locate(model, encoded, options.phrases), strict=True))
    places = {phrase: tuple(box for _, found in text.found for box in found) for phrase, text in said.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    drawing, table = options.out / 'ground.png', options.out / 'ground.json'
    draw(options.picture, places, drawing)
    rows = [{'phrase': p, 'boxes': places[p], 'dropped': text.dropped} for p, text in said.items()]
    json_file.write(table, {'picture': str(options.picture), 'phrases': rows})
    for row in rows:
        found = ', '.join('(' + ', '.join(f'{edge:.3f}' for edge in box) + ')' for box in row['boxes'])
        print(f'{row["phrase"]}: {found or "no box"}' + (f' ({row["dropped"]} dropped)' if row['dropped'] else ''))
    print(f'wrote {drawing} and {table}')
