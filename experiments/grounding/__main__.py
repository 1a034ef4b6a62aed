"""Where is the panda? How well small networks learn, from nothing, to say the box of an icon that a phrase names.

    python -m experiments.grounding --archives runs/icons/archives

draws pages of one to four icons (`experiments/datasets/icons/canvas.py`), trains a language model on their captions,
freezes it, and trains everything between the pixels and it, with rows for 1,030 new words. One line of JSON a variant,
seed and number of steps, in results.jsonl beside what is there: the share of boxes that fit (IoU above 0.5), with
shuffled pictures and with one box for all beside it. What is finished is not run again.

    joint    tower, Q-Former, projection and rows of the new words, which learn together
    noise    the same, but the tower's table of positions begins as faint noise
    blind    the same as joint, but the Q-Former does not read the phrase: its queries must say where everything is
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import tyro

from experiments import sweep
from experiments.datasets.icons import canvas, choose, folder
from experiments.datasets.icons.choose import Choice, Icon
from qformer_jax import cli, config
from qformer_jax.errors import command
from qformer_jax.evaluation.task import evaluate
from qformer_jax.runs import run_dir
from qformer_jax.training import loop
from qformer_jax.training.logs import records

RESULTS = Path(__file__).parent / 'results.jsonl'
CONCEPTS = (
    'bomb', 'bullseye', 'christmas tree', 'crescent moon', 'doughnut', 'droplet', 'frog', 'grapes', 'hamburger',
    'jack o lantern', 'panda', 'pig', 'rainbow', 'red apple', 'taxi', 'vertical traffic light',
)  # fmt: skip
"""What is on the pages: concepts that eight vendors draw, and that 16 pixels tell apart."""
ICONS = (0.25, 0.4)
"""Smallest and largest edge of an icon, as shares of a page."""
SPLITS = ('test', 'validation', 'vendor')
"""New pages of pictures that training shows, of other pictures by the same vendors, and of a vendor it never shows."""
Variant = Literal['joint', 'noise', 'blind']


@dataclass(frozen=True)
class Options:
    """Train and judge grounding."""

    out: Path = Path('runs/grounding')
    """Folder of data and runs."""
    archives: Path = Path('runs/icons/archives')
    """Folder of the icon sets' archives."""
    variants: tuple[Variant, ...] = ('joint', 'noise', 'blind')
    """What to train."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights and data order."""
    pages: int = 11000
    """Pages to train on; each split to judge on has a twentieth of them."""
    steps: int = 5000
    """Steps of grounding."""
    batch_size: int = 64
    """Rows a step."""
    peak_rate: float = 1.5e-3
    """Learning rate after the warm-up."""
    image_size: int = 64
    """Pixels along a side of a page, and eight of a patch."""
    width: int = 64
    """Width of all three networks."""
    depth: int = 3
    """Layers of tower and Q-Former; the language model has half of them, rounded up."""


def pages(o: Options) -> Path:
    """Draw the pages and pack them, unless that is done, and return the data set."""
    packed, source = o.out / 'pages_packed', o.out / 'pages'
    if not packed.exists():
        if not (source / SPLITS[-1] / 'captions.jsonl').exists():
            choice = Choice(o.archives, only=CONCEPTS, concepts=0, validation=len(CONCEPTS))
            planned = plan(choose.icons(choice), o.pages)
            folder.write(source, planned, lambda each: canvas.line(each, o.image_size, ICONS))
        cli.run(['data', 'pack', 'folder', str(packed), '--path', str(source)])
    return packed


def plan(icons: dict[str, list[Icon]], count: int) -> dict[str, list[canvas.Canvas]]:
    """Return what to draw in every split; `test` shows the pictures of `train` elsewhere, in other company."""
    splits = {'train': icons['train'], 'test': icons['train']} | {name: icons[name] for name in SPLITS[1:]}
    planned = canvas.plan(splits, 0, count)
    return {split: each if split == 'train' else each[: -(-count // 20)] for split, each in planned.items()}


def recipe(o: Options, name: Variant | Literal['language'], data: Path, seed: int) -> config.Run:
    """Return the run of the language model, or of a variant."""
    size = {'width': o.width, 'heads': max(2, o.width // 32), 'mlp_width': 4 * o.width}
    lm = config.OptConfig(vocab_size=0, depth=-(-o.depth // 2), max_positions=64, **size)
    steps = o.steps
    model = config.Blip2Config(
        vit=config.VitConfig(
            image_size=o.image_size, patch_size=8, depth=o.depth, attention_bias='all',
            positions='noise' if name == 'noise' else 'waves', **size,
        ),
        qformer=config.QformerConfig(
            feature_width=0, num_queries=4, depth=o.depth, cross_attention_freq=1, vocab_size=0, max_positions=12,
            dropout=0.0, text_side='reads', **size,
        ),
        lm=lm,
        grounding=config.GroundingConfig(),
    )  # fmt: skip
    if name == 'language':
        steps, model = 400, config.Blip2Config(vit=None, qformer=None, lm=lm)
    return config.Run(
        stage='language' if name == 'language' else 'instruct',
        model=model,
        data=config.Data(
            str(data), validation_split='test', max_text=12, max_lm_text=24, crop_scale=(1.0, 1.0), flip=False,
            phrase_fraction=float(name != 'language'),
        ),
        objective=config.Objective(instruction_aware=name in ('joint', 'noise')),
        optimizer=config.Optimizer(
            peak_rate=o.peak_rate, final_rate=o.peak_rate / 20, warmup_steps=steps // 20, clip_norm=1.0,
            weight_decay=0.01, rate_rules=((('lm/.*', None),) if name != 'language' else ()) + (('.*', 1.0),),
        ),
        training=config.Training(steps=steps, batch_size=o.batch_size, seed=seed, checkpoint_every=-(-steps // 5)),
    )  # fmt: skip


def judged(o: Options, variant: Variant, seed: int, data: Path) -> dict[str, object]:
    """Train a variant with its language model, if that is not done, and return what it reaches."""
    language, path = o.out / f'language-{seed}', o.out / f'{variant}-{seed}'
    loop.train(recipe(o, 'language', data, seed), language)
    done = loop.train(replace(recipe(o, variant, data, seed), start=config.Start(lm=str(language))), path)
    log = records(path)
    return {
        'variant': variant,
        'seed': seed,
        'steps': o.steps,
        'fingerprint': done.fingerprint,
        'hardware': f'{jax.device_count()} {jax.devices()[0].device_kind}',
        'language model unchanged': done.last['lm'] == run_dir.finished(language).last['lm'],
        'loss': {kind: [row['loss'] for row in log if row['kind'] == kind][-1] for kind in ('train', 'validation')},
        **{split: evaluate(path, 'grounding', split) for split in SPLITS},
    }


def main(o: Options) -> None:
    """Keep the results after every variant."""
    data = pages(o)
    sweep.in_turn(lambda variant, seed: judged(o, variant, seed, data), o.variants, o.seeds, RESULTS)
    print(f'wrote {RESULTS}; next: qformer evaluate {o.out}/{o.variants[0]}-{o.seeds[0]} --task grounding --split test')


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
