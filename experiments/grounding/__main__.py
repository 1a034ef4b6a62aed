"""Grounding from nothing: how well tiny towers learn to say where things are, with what of them frozen.

    python -m experiments.grounding --out runs/grounding

Draws pages of shapes (or takes a packed data set whose records hold phrases with boxes: --data), trains a language
model on the captions, freezes it, and trains everything between the pixels and it, with rows for 1,030 new words. One
JSON line a variant and seed goes to OUT/results.jsonl. A second call resumes or reuses what is there.

    joint    the tower, which learned the captions' words before, learns on with the Q-Former
    frozen   it stays as it is
    lora     as frozen, and the language model learns in steps of low rank
    blind    as joint, but the Q-Former does not read the phrase: its queries must say where everything is
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import tyro

from experiments.grounding import shapes
from qformer_jax import cli, config
from qformer_jax.evaluation.task import evaluate
from qformer_jax.training import loop, start
from qformer_jax.training.logs import records

Variant = Literal['joint', 'frozen', 'lora', 'blind']


@dataclass(frozen=True)
class Options:
    """Train and judge grounding."""

    out: Path = Path('runs/grounding')
    """Folder of everything that is written."""
    data: Path | None = None
    """Packed data set with phrases and boxes; default: shapes, drawn here."""
    split: str = 'test'
    """Split to judge on (of icons' canvases: `validation`, `vendor`)."""
    variants: tuple[Variant, ...] = ('joint', 'frozen')
    """What to train."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights and data order."""
    steps: int = 4000
    """Steps of grounding; the towers' own stages take a fifth of them each."""
    batch_size: int = 128
    """Rows a step."""
    peak_rate: float = 2e-3
    """Learning rate after the warm-up."""
    image_size: int = 64
    """Pixels along a side."""
    patch_size: int = 8
    """Pixels along a side of a patch."""
    width: int = 64
    """Width of all three networks."""
    depth: int = 4
    """Layers of the tower; Q-Former and language model have half of them, rounded up."""
    max_text: int = 12
    """Tokens of a phrase for the Q-Former."""


def network(o: Options) -> config.Blip2:
    """Return the whole network; stages take its parts."""
    size = {'width': o.width, 'heads': max(2, o.width // 32), 'mlp_width': 4 * o.width}
    half = -(-o.depth // 2)
    vit = config.Vit(image_size=o.image_size, patch_size=o.patch_size, depth=o.depth, attention_bias='all', **size)
    qformer = config.Qformer(
        feature_width=0, num_queries=4, depth=half, cross_attention_freq=1, vocab_size=0, max_positions=o.max_text,
        embed_width=o.width, dropout=0.0, text_side='reads', **size,
    )  # fmt: skip
    return config.Blip2(vit, qformer, lm=config.Opt(vocab_size=0, depth=half, max_positions=96, **size))


def stage(o: Options, name: Variant | Literal['vision', 'language'], data: Path, seed: int) -> config.Run:
    """Return the run of a tower's stage, or of a variant."""
    m, tower = network(o), name in ('vision', 'language')
    steps = o.steps // 5 if tower else o.steps
    rules = [('lora/.*', 1.0)] if name == 'lora' else []
    rules += [('(vit|lm)/.*' if name in ('frozen', 'lora') else 'lm/.*', None)] * (not tower)
    run = config.Run(
        stage=name if tower else 'instruct',
        model=replace(m, grounding=config.Grounding(), lora=config.Lora(alpha=16.0) if name == 'lora' else None),
        data=config.Data(
            path=str(data),
            max_text=o.max_text,
            max_lm_text=64 if name == 'language' else 32,
            crop_scale=(1.0, 1.0),
            flip=False,
            phrase_fraction=1.0,
        ),
        objective=config.Objective(instruction_aware=not tower and name != 'blind'),
        optimizer=config.Optimizer(
            peak_rate=o.peak_rate,
            final_rate=o.peak_rate / 20,
            warmup_steps=steps // 20,
            clip_norm=1.0,
            weight_decay=0.01,
            rate_rules=(*rules, ('.*', 1.0)),
        ),
        training=config.Training(steps=steps, batch_size=o.batch_size, seed=seed, checkpoint_every=1000),
    )
    if tower:
        parts = {'vit': m.vit if name == 'vision' else None, 'lm': m.lm if name == 'language' else None}
        return replace(run, model=config.Blip2(qformer=None, **parts), data=replace(run.data, phrase_fraction=0.0))
    return run


def study(o: Options, variant: Variant, seed: int, data: Path) -> dict:
    """Train a variant with what it begins from, and return its row."""
    folder = o.out / f'seed{seed}'
    for name in ('language', 'vision'):
        loop.train(stage(o, name, data, seed), folder / name)
    begins = config.Start(lm=str(folder / 'language'), vit=str(folder / 'vision'))
    loop.train(replace(stage(o, variant, data, seed), start=begins), folder / variant)
    done, lm = start.finished(folder / variant), start.finished(folder / 'language').last['lm']
    return {
        'variant': variant,
        'seed': seed,
        'split': o.split,
        'fingerprint': done.fingerprint,
        'hardware': f'{jax.device_count()} {jax.devices()[0].device_kind}',
        'steps': o.steps,
        'language model unchanged': done.last['lm'] == lm,
        'loss': [row['loss'] for row in records(folder / variant) if 'loss' in row][-1],
        **evaluate(folder / variant, 'grounding', o.split),
    }


def main(o: Options) -> None:
    """Run the study and write its results after every variant."""
    data = o.data or o.out / 'shapes_packed'
    if not o.data and not data.exists():
        shapes.make(shapes.Options(o.out / 'shapes', size=o.image_size))
        cli.run(['data', 'pack', 'folder', str(data), '--path', str(o.out / 'shapes')])
    rows = []
    for seed in o.seeds:
        for variant in o.variants:
            rows.append(study(o, variant, seed, data))
            (o.out / 'results.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
            print(json.dumps(rows[-1]))


if __name__ == '__main__':
    main(tyro.cli(Options))
