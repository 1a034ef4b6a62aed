"""A small line to damage: pictures, a run of every stage, features, and an exported folder, all made by commands."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

from qformer_jax import cli

COLOURS = {'red': (220, 30, 30), 'green': (30, 200, 30), 'blue': (30, 30, 220), 'yellow': (230, 230, 30)}
STAGES = ('vision', 'language', 'stage1', 'stage2', 'instruct')
STEPS = 4
_BEGINNINGS = {
    'stage1': ('--start.vit', 'vision'),
    'stage2': ('--start.checkpoint', 'stage1', '--start.lm', 'language'),
    'instruct': ('--start.checkpoint', 'stage2'),
}


def pictures(folder: Path, count: int = 40) -> Path:
    """Draw squares and circles in four colours, with captions and questions."""
    for split, number in (('train', count), ('test', 8)):
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(number):
            colour, round_one = list(COLOURS)[i % 4], i // 4 % 2
            picture = Image.new('RGB', (64, 64), (128, 128, 128))
            pen = ImageDraw.Draw(picture)
            (pen.ellipse if round_one else pen.rectangle)((12, 12, 52, 52), fill=COLOURS[colour])
            picture.save(folder / split / f'{i}.png')
            questions = [{'question': 'what color is it?', 'answers': [colour]}]
            caption = f'a {colour} {"circle" if round_one else "square"}'
            lines.append(json.dumps({'file': f'{i}.png', 'caption': caption, 'questions': questions}))
        (folder / split / 'captions.jsonl').write_text('\n'.join(lines))
    return folder


def train_words(home: Path, stage: str, run: Path, steps: int = STEPS, checkpoint_every: int = 2) -> list[str]:
    """Return the words of `qformer` that train a stage over the runs in `home / 'line'`."""
    names = _BEGINNINGS.get(stage, ())
    start = [word if word.startswith('--') else str(home / 'line' / word) for word in names]
    words = ['train', f'easy_vqa_{stage}', '--run', str(run), '--data.path', str(home / 'data'), *start]
    sizes = ['--training.steps', str(steps), '--training.batch-size', '8', '--optimizer.warmup-steps', '1']
    return [*words, *sizes, '--training.checkpoint-every', str(checkpoint_every), '--training.validation-batches', '1']


def line(home: Path) -> Path:
    """Make everything in the folder `home`, which is new; returns it."""
    cli.run(['data', 'pack', 'folder', str(home / 'data'), '--path', str(pictures(home / 'source'))])
    for stage in STAGES:
        cli.run(train_words(home, stage, home / 'line' / stage))
    cli.run(['data', 'encode', str(home / 'data'), str(home / 'features'), '--vit', str(home / 'line' / 'vision')])
    cli.run(['export', str(home / 'line' / 'instruct'), str(home / 'served')])
    return home
