"""Draw videos whose answer is in no frame: an icon that moves left, right, up or down.

    python -m experiments.datasets.icons.moving --out runs/icons/moving
    qformer data pack folder runs/icons/moving_packed --path runs/icons/moving

The page has no edge: what leaves it on one side comes back on the other. So wherever an icon begins, it may move
anywhere; begins are drawn uniformly from all places, hence a frame alone, the first and the last included, has the
same distribution for all four directions. Each icon moves in all four, from begins of their own, so it tells nothing
either. Train with `--data.no-flip`: mirrored, left is right.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from experiments.datasets.icons import choose, folder
from experiments.datasets.icons.choose import Choice, Icon
from experiments.datasets.icons.draw import draw, on_white, png
from qformer_jax.errors import UserError, command

DIRECTIONS = {'left': (-1, 0), 'right': (1, 0), 'up': (0, -1), 'down': (0, 1)}
"""Direction -> step to the right and downwards."""
QUESTION = 'which way does it move?'


@dataclass(frozen=True)
class Options:
    """Draw videos in the four splits of the pictures."""

    out: Path
    """Folder to write."""
    choice: tyro.conf.OmitArgPrefixes[Choice] = field(default_factory=Choice)
    size: int = 64
    """Height and width of a frame, pixels."""
    frames: int = 4
    """Frames a video."""
    step: int = 8
    """Pixels from frame to frame: far less than half of the size, or the way back would be the shorter one."""
    train: int = 800
    """Icons of `train`, each in four videos; the other splits have at most a quarter of them."""


@dataclass(frozen=True)
class Video:
    """What to draw."""

    name: str
    """Folder of its frames."""
    icon: Icon
    """What moves."""
    direction: str
    """One of DIRECTIONS."""
    begin: tuple[int, int]
    """Pixels from the left and from the top, in the first frame."""


def places(begin: tuple[int, int], direction: str, frames: int, step: int, size: int) -> list[tuple[int, int]]:
    """Return where the icon is in every frame, on a page without edges."""
    right, down = DIRECTIONS[direction]
    return [((begin[0] + i * step * right) % size, (begin[1] + i * step * down) % size) for i in range(frames)]


def plan(splits: dict[str, list[Icon]], seed: int, train: int, size: int) -> dict[str, list[Video]]:
    """Return what to draw in every split: four videos an icon."""
    videos = {}
    for part, (split, found) in enumerate(splits.items()):
        rng = np.random.default_rng((seed, part))
        count = min(train if split == 'train' else max(train // 4, 1), len(found))
        chosen = [found[i] for i in sorted(rng.choice(len(found), size=count, replace=False).tolist())]
        videos[split] = [
            Video(f'{number:04}-{direction}', icon, direction, tuple(rng.integers(size, size=2).tolist()))
            for number, icon in enumerate(chosen)
            for direction in DIRECTIONS
        ]
    return videos


def paint(video: Video, frames: int, step: int, size: int) -> list[Image.Image]:
    """Return the frames in RGB: the icon, two fifths of their size, on white."""
    page = Image.new('RGBA', (size, size))
    page.alpha_composite(draw(video.icon.svg, size * 2 // 5))
    still = np.asarray(on_white(page))
    shifts = ((top, left) for left, top in places(video.begin, video.direction, frames, step, size))
    return [Image.fromarray(np.roll(still, shift, axis=(0, 1))) for shift in shifts]


def line(video: Video, options: Options) -> folder.Line:
    """Return a video as a line: frames, what moves where, and the question which way."""
    pictures = paint(video, options.frames, options.step, options.size)
    files = {f'{video.name}/{i}.png': png(picture) for i, picture in enumerate(pictures)}
    questions = [{'question': QUESTION, 'answers': [video.direction]}]
    caption = f'{video.icon.concept} moves {video.direction}'
    return {'frames': list(files), 'caption': caption, 'questions': questions}, files


def make(options: Options) -> str:
    """Write the folder and return its fingerprint; raises UserError for videos that have no answer."""
    if options.frames < 2 or not 0 < 2 * options.step < options.size:
        raise UserError(
            f'--frames {options.frames} --step {options.step} --size {options.size}: which way an icon moves takes two '
            'frames, and a step of less than half of the size, or the way back is as short'
        )
    videos = plan(choose.icons(options.choice), options.choice.seed, options.train, options.size)
    return folder.write(options.out, videos, lambda video: line(video, options))


if __name__ == '__main__':
    command(lambda: make(tyro.cli(Options)))
