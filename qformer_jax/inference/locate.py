"""Where a phrase is in a picture: asked as KOSMOS-2 is, and drawn."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from .. import boxes
from ..atomic import replacing
from ..data import pictures
from ..data.tokenizers import phrase_prompt
from ..errors import UserError
from .blip2 import Blip2
from .generate import GenerationConfig
from .inputs import Pictures, QueryOutputs

ANSWER = GenerationConfig(max_new_tokens=12)  # <object>, three boxes and what stands between them, </object>, end
COLOURS = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#911eb4', '#42d4f4', '#f032e6', '#9a6324')
SHORTEST = 256  # pixels of a drawing's shorter side, at least


def locate(
    model: Blip2, pictures: Pictures | QueryOutputs, phrases: Sequence[str], settings: GenerationConfig = ANSWER
) -> list[boxes.Grounded]:
    """Return where phrases are, one a picture; raises UserError for a run without words for boxes."""
    if not (c := model.run.model.grounding):
        raise UserError('this run has no words for boxes: give one that was trained with model.grounding')
    prompts = [phrase_prompt(model.run.data.phrase_prompt[0], phrase) for phrase in phrases]
    return [boxes.read(said.text, c.grid) for said in model.generate(pictures, prompts, settings)]


def draw(picture: Path, said: dict[str, tuple[boxes.Box, ...]], out: Path) -> None:
    """Write the picture with the boxes of each phrase in a colour of its own, and the phrase at each."""
    image = pictures.decode(pictures.read(picture), str(picture))
    larger = max(1, -(-SHORTEST // min(image.size)))
    image = image.resize((image.width * larger, image.height * larger), Image.Resampling.BICUBIC)
    pen, across = ImageDraw.Draw(image), (image.width - 1, image.height - 1)
    for number, (phrase, places) in enumerate(said.items()):
        colour = COLOURS[number % len(COLOURS)]
        for box in places:
            left, top, right, bottom = (round(edge * across[i % 2]) for i, edge in enumerate(box))
            pen.rectangle((left, top, right, bottom), outline=colour, width=3)
            text = pen.textbbox((left + 5, top + 4), phrase)
            pen.rectangle((text[0] - 2, text[1] - 1, text[2] + 2, text[3] + 1), fill=colour)
            pen.text((left + 5, top + 4), phrase, fill='white')
    with replacing(out) as scratch:
        image.save(scratch)
