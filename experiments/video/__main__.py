"""Which way does it move? What reads videos of which no frame tells, with a time for each frame and without.

    python -m experiments.video --archives runs/icons/archives

draws the videos (`experiments/datasets/icons/moving.py`), pretrains a tower to say where the icon of a single frame
stands, and a language model on the videos' texts, encodes all frames once, and trains one run a variant and seed
between the two, frozen. One line of JSON a run, in results.jsonl: the share of right answers on icons of a held-out
vendor and of held-out concepts; chance is 25 %. What is finished is not run again.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiments import sweep
from experiments.datasets.icons import choose, moving
from experiments.datasets.icons.choose import Choice
from qformer_jax import cli, config
from qformer_jax.errors import command
from qformer_jax.evaluation import task
from qformer_jax.rules import TEXT_SIDE
from qformer_jax.training import loop

RESULTS = Path(__file__).parent / 'results.jsonl'
VIT = config.VitConfig(image_size=64, patch_size=8, width=64, depth=3, heads=4, mlp_width=256, attention_bias='all')
LM = config.OptConfig(vocab_size=0, width=64, depth=3, heads=4, mlp_width=256, max_positions=320)
QFORMER = config.QformerConfig(
    feature_width=0, num_queries=8, width=64, depth=4, heads=4, mlp_width=256, vocab_size=0, dropout=0.0
)
RESAMPLER = config.ConnectorConfig('resampler', tokens=8, width=64, depth=3, heads=4, mlp_width=256)
TIME = config.TimeConfig(frames=4)
VARIANTS = {
    'resampler, times': {'connector': RESAMPLER, 'time': TIME},
    'resampler': {'connector': RESAMPLER},
    'qformer, times': {'qformer': QFORMER, 'time': TIME},
    'qformer': {'qformer': QFORMER},
    'resampler, times, gates': {
        'connector': RESAMPLER, 'time': TIME, 'gates': config.GatesConfig(every=1, heads=4, mlp_width=256)
    },
}  # fmt: skip
COLUMNS = ('ash', 'birch', 'cedar', 'elm', 'fir', 'hazel', 'larch', 'maple')
ROWS = ('ant', 'bear', 'cat', 'dog', 'eel', 'fox', 'goat', 'hen')
"""Names of eighths of a page, across and down: a tower that can say them knows where it sees something."""
SPLITS = ('vendor', 'concepts')


@dataclass(frozen=True)
class Options:
    """Train and judge every variant."""

    out: Path = Path('runs/video')
    """Folder of data and runs."""
    archives: Path = Path('runs/icons/archives')
    """Folder of the icon sets' archives."""
    variants: tuple[Literal[*VARIANTS], ...] = tuple(VARIANTS)
    """Which of them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of what stands between the towers; they share the towers."""
    tower_steps: int = 1200
    """Steps of the tower."""
    steps: int = 600
    """Steps of a variant."""

    @property
    def videos(self) -> moving.Options:
        """What moves."""
        return moving.Options(out=self.out / 'videos', choice=Choice(archives=self.archives))


def recipe(stage: config.Stage, data: Path, steps: int, rate: float, **model: object) -> config.Run:
    """Return a run over the videos, or over the features of their frames; towers in it are frozen where it connects."""
    parts = {'vit': None, 'qformer': None, 'lm': None} | model
    frozen = (('(vit|lm)/.*', None), (TEXT_SIDE, None)) if stage == 'instruct' else ()
    return config.Run(
        stage=stage,
        model=config.Blip2Config(**parts),
        data=config.Data(
            str(data), max_text=12, max_lm_text=24, crop_scale=(1, 1), flip=False, question_prompt=('{question}',)
        ),
        optimizer=config.Optimizer(
            peak_rate=rate, final_rate=rate / 20, warmup_steps=50, clip_norm=1.0, rate_rules=(*frozen, ('.*', 1.0))
        ),
        training=config.Training(steps=steps, batch_size=64, checkpoint_every=steps),
    )


def write_places(videos: moving.Options, folder: Path) -> Path:
    """Write the frames of the training videos as pictures whose caption says where the icon stands."""
    planned = moving.plan(choose.icons(videos.choice), videos.choice.seed, videos.train, videos.size)['train']
    lines = []
    for video in planned:
        along = moving.places(video.begin, video.direction, videos.frames, videos.step, videos.size)
        for i, (left, top) in enumerate(along):
            caption = f'{COLUMNS[left * 8 // videos.size]} {ROWS[top * 8 // videos.size]}'
            file = (videos.out / 'train' / video.name / f'{i}.png').resolve()
            lines.append(json.dumps({'file': str(file), 'caption': caption}))
    (folder / 'train').mkdir(parents=True)
    (folder / 'train' / 'captions.jsonl').write_text('\n'.join(lines))
    return folder


def towers(options: Options) -> Path:
    """Draw the videos, train both towers, and return the data set of the frames' features."""
    packed, places, features = (options.out / name for name in ('packed', 'places', 'seen'))
    if not packed.exists():
        if not options.videos.out.exists():
            moving.make(options.videos)
        cli.run(['data', 'pack', 'folder', str(packed), '--path', str(options.videos.out)])
    if not places.exists():
        source = write_places(options.videos, options.out / 'places_source')
        cli.run(['data', 'pack', 'folder', str(places), '--path', str(source)])
    loop.train(recipe('vision', places, options.tower_steps, 1e-3, vit=VIT), options.out / 'vision')
    loop.train(recipe('language', packed, 800, 2e-3, lm=LM), options.out / 'language')
    if not features.exists():
        cli.run(['data', 'encode', str(packed), str(features), '--vit', str(options.out / 'vision')])
    return features


def judged(options: Options, data: Path, variant: str, seed: int) -> dict[str, object]:
    """Train a variant, if that is not done, and return what it reaches."""
    folder = _folder(options, variant, seed)
    run = recipe('instruct', data, options.steps, 1e-3, vit=VIT, lm=LM, **VARIANTS[variant])
    starts = config.Start(vit=str(options.out / 'vision'), lm=str(options.out / 'language'))
    done = loop.train(
        dataclasses.replace(run, start=starts, training=dataclasses.replace(run.training, seed=seed)), folder
    )
    right = {split: round(task.evaluate(folder, 'vqa', split)['accuracy'], 4) for split in SPLITS}
    return {'variant': variant, 'seed': seed, 'steps': options.steps, 'fingerprint': done.fingerprint} | right


def _folder(options: Options, variant: str, seed: int) -> Path:
    return options.out / f'{variant.replace(", ", "_")}-{seed}'


def main(options: Options) -> None:
    """Keep the results after every variant."""
    data = towers(options)
    sweep.in_turn(lambda *cell: judged(options, data, *cell), options.variants, options.seeds, RESULTS)
    first = _folder(options, options.variants[0], options.seeds[0])
    print(f'wrote {RESULTS}; next: qformer evaluate {first} --task vqa --split vendor')


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
