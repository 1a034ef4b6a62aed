"""What the tests of use share: drawn pictures, tiny networks, recipes, and one finished run of every stage."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import filelock
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw

from qformer_jax import cli, config
from qformer_jax.data.cache import Cache
from qformer_jax.inference import forward
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.rules import TEXT_SIDE
from qformer_jax.training import loop

ROOT = Path(__file__).parents[1]
STAGES = ('vision', 'language', 'stage1', 'stage2', 'instruct')
STEPS = 60
COLOURS = {'red': (220, 30, 30), 'green': (30, 200, 30), 'blue': (30, 30, 220), 'yellow': (230, 230, 30)}
SHAPES = ('square', 'circle')

VIT = config.VitConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_width=32, attention_bias='all')
QFORMER = config.QformerConfig(
    feature_width=0,
    num_queries=4,
    width=16,
    depth=2,
    heads=2,
    mlp_width=32,
    vocab_size=0,
    max_positions=16,
    embed_width=8,
)
OPT = config.OptConfig(vocab_size=0, width=16, depth=2, heads=2, mlp_width=32, max_positions=40)


def draw_picture(colour: str, shape: str) -> Image.Image:
    """Return 64 x 64 pixels of one shape on grey."""
    picture = Image.new('RGB', (64, 64), (128, 128, 128))
    pen = ImageDraw.Draw(picture)
    (pen.rectangle if shape == 'square' else pen.ellipse)((12, 12, 52, 52), fill=COLOURS[colour])
    return picture


def write_pictures(folder: Path) -> Path:
    """Write the source of a data set: each of 8 pictures three times to train on, once to test on."""
    for split, copies in (('train', 3), ('test', 1)):
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(8 * copies):
            colour, shape = list(COLOURS)[number % 4], SHAPES[number // 4 % 2]
            draw_picture(colour, shape).save(folder / split / f'{number}.png')
            questions = {'What color is it?': colour, 'is it red?': 'yes' if colour == 'red' else 'no'}
            lines.append(_line(f'{number}.png', f'A {colour} {shape}', questions))
        (folder / split / 'captions.jsonl').write_text('\n'.join(lines))
    return folder


def write_arrays(folder: Path) -> Path:
    """Write feature arrays of 2 to 4 rows, 6 columns, that tell what `write_pictures` draws."""
    draw = np.random.default_rng(0)
    for split, copies in (('train', 3), ('test', 1)):
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(8 * copies):
            colour, shape = number % 4, number // 4 % 2
            array = draw.normal(size=(2 + number % 3, 6)).astype(np.float32) / 10
            array[:, colour] += 1
            array[:, 4 + shape] += 1
            np.save(folder / split / f'{number}.npy', array)
            lines.append(_line(f'{number}.npy', f'a {list(COLOURS)[colour]} {SHAPES[shape]}', {}))
        (folder / split / 'captions.jsonl').write_text('\n'.join(lines))
    return folder


def _line(file: str, caption: str, questions: dict[str, str]) -> str:
    entries = [{'question': question, 'answers': [answer]} for question, answer in questions.items()]
    return json.dumps({'file': file, 'caption': caption, 'questions': entries})


def recipe(stage: str, data: Path, steps: int = STEPS) -> config.Run:
    """Return a tiny run of a stage that learns fast: no augmentation, no dropout, batches of 8."""
    towers = {'vision': ('vit',), 'language': ('lm',), 'stage1': ('vit', 'qformer')}
    parts = {'vit': VIT, 'qformer': dataclasses.replace(QFORMER, dropout=0.0), 'lm': OPT}
    model = {name: part if name in towers.get(stage, parts) else None for name, part in parts.items()}
    rules = {
        'stage1': (('vit/.*', None), ('.*', 1.0)),
        'stage2': (('(vit|lm)/.*', None), (TEXT_SIDE, None), ('.*', 1.0)),
        'instruct': (('(vit|lm)/.*', None), (TEXT_SIDE, None), ('.*', 1.0)),
    }
    return config.Run(
        stage=stage,
        model=config.Blip2Config(**model),
        data=config.Data(
            path=str(data),
            max_text=10,
            max_lm_text=16,
            crop_scale=(1.0, 1.0),
            flip=False,
            question_prompt=('{question}',),
        ),
        optimizer=config.Optimizer(
            peak_rate=1e-2, warmup_steps=5, rate_rules=rules.get(stage, (('.*', 1.0),)), clip_norm=1.0
        ),
        training=config.Training(steps=steps, batch_size=8, checkpoint_every=1000),
        start=config.Start(scratch=('vit', 'lm')),
    )


def change(run: config.Run, part: str, **fields) -> config.Run:
    """Return the run with fields of one part replaced."""
    return dataclasses.replace(run, **{part: dataclasses.replace(getattr(run, part), **fields)})


def without_tower(run: config.Run) -> config.Run:
    """Return the run for a data set of feature arrays."""
    return change(run, 'model', vit=None)


def roomy(model: Blip2) -> Blip2:
    """Return the model with a longer position table, by repeating what it has."""
    lm = dataclasses.replace(model.run.model.lm, max_positions=200)
    table = model.params['lm']['position_embedding']
    more = {'position_embedding': jnp.tile(table, (6, 1))[:202]}
    params = model.params | {'lm': model.params['lm'] | more}
    run = dataclasses.replace(model.run, model=dataclasses.replace(model.run.model, lm=lm))
    return dataclasses.replace(model, run=run, params=params)


def write_recipe(path: Path, run: config.Run) -> Path:
    """Write a recipe file that `qformer train` reads."""
    code = f'def config():\n    return from_json({config.to_json(run)!r})\n'
    path.write_text(f'"""A tiny run."""\n\nfrom qformer_jax.config import from_json\n\n\n{code}')
    return path


def start_command(*words: object) -> subprocess.Popen:
    """Start `qformer WORDS` as a process of its own; input and both outputs are text."""
    command = [sys.executable, '-m', 'qformer_jax', *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def keeping(model: Blip2, folder: Path) -> Blip2:
    """Return the model with a cache, opened anew."""
    return dataclasses.replace(model, cache=Cache(folder))


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of rows of every pass of the tower."""
    rows = []

    def counting(pass_):
        def counted(model, params, image, *arrays):
            rows.append(len(image))
            return pass_(model, params, image, *arrays)

        return counted

    for name in ('vision_features', 'soft_prefix_of_pictures'):
        monkeypatch.setattr(forward, name, counting(getattr(forward, name)))
    return rows


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that the first worker to come here fills; the others wait for it, and must not change it."""
    base = factory.getbasetemp()
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'shared' / name
    folder.parent.mkdir(exist_ok=True)
    with filelock.FileLock(f'{folder}.lock'):
        if not Path(f'{folder}.made').exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a failed one left
            folder.mkdir()
            make(folder)
            Path(f'{folder}.made').touch()
    return folder


@pytest.fixture(scope='session')
def pictures(tmp_path_factory) -> Path:
    """A packed data set of pictures: train 24, test 8."""

    def make(folder: Path) -> None:
        cli.run(['data', 'pack', 'folder', str(folder / 'data'), '--path', str(write_pictures(folder / 'source'))])

    return made_once(tmp_path_factory, 'pictures', make) / 'data'


@pytest.fixture(scope='session')
def arrays(tmp_path_factory) -> Path:
    """A packed data set of feature arrays: train 24, test 8."""

    def make(folder: Path) -> None:
        cli.run(['data', 'pack', 'features', str(folder / 'data'), '--path', str(write_arrays(folder / 'source'))])

    return made_once(tmp_path_factory, 'arrays', make) / 'data'


@pytest.fixture(scope='session')
def line(pictures, tmp_path_factory) -> Path:
    """A folder with a finished run of every stage, each from those before it."""

    def make(runs: Path) -> None:
        starts = {
            'stage1': config.Start(vit=str(runs / 'vision')),
            'stage2': config.Start(checkpoint=str(runs / 'stage1'), lm=str(runs / 'language')),
            'instruct': config.Start(checkpoint=str(runs / 'stage2')),
        }
        for stage in STAGES:
            run = dataclasses.replace(recipe(stage, pictures), start=starts.get(stage, config.Start()))
            loop.train(run, runs / stage)

    return made_once(tmp_path_factory, 'line', make)
