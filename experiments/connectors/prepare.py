"""What all connectors of the study share: three data sets of frozen features, and a small frozen language model.

    python -m experiments.connectors.prepare --out runs/connectors --icons runs/icons/pictures \
        --canvases runs/icons/canvases --tower runs/icons/tower

Makes, under OUT, once:

    packed/{language,icons,canvases,easy_vqa}    pictures and texts, all with the tokenizers of the first
    features/{icons,canvases,easy_vqa}           what the tower makes of them
    runs/language                                the language model
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from experiments.connectors import language
from qformer_jax import cli, config
from qformer_jax.data import pack as packing
from qformer_jax.data import sources
from qformer_jax.data.pack import BYTE_BPE, WORDPIECE
from qformer_jax.data.records import Record
from qformer_jax.errors import UserError, command
from qformer_jax.training import loop

DATA = ('icons', 'canvases', 'easy_vqa')
LM = config.LlamaConfig(
    vocab_size=0, width=128, depth=4, heads=4, kv_heads=4, head_width=32, mlp_width=384, max_positions=192, tied=True
)


@dataclass(frozen=True)
class Options:
    """Pack the pictures, encode them once, and teach the language model to read."""

    out: Path
    """Folder to write."""
    icons: Path
    """What `python -m experiments.datasets.icons.make` wrote."""
    canvases: Path
    """What `python -m experiments.datasets.icons.canvas --size 112` wrote."""
    tower: Path | None = None
    """The run that holds the frozen tower; None: pack only, and go on later."""
    steps: int = 4000
    """Training steps of the language model."""


def pack(options: Options) -> None:
    """Pack the texts of the language model, whose tokenizers serve all, and the pictures."""
    packed = options.out / 'packed'
    if not (packed / 'language').exists():
        splits = {split: _texts(options.icons, split) for split in ('train', 'validation')}
        source = language.write(options.out / 'texts', splits)
        _run('data', 'pack', 'features', packed / 'language', '--path', source)
    first = packed / 'language'
    tokenizers = first / WORDPIECE, first / BYTE_BPE
    ask_where(options.canvases)
    read = {
        'icons': lambda: sources.folder(options.icons),
        'canvases': lambda: sources.folder(options.canvases),
        'easy_vqa': easy_vqa,
    }
    for name in DATA:
        if not (packed / name).exists():
            packing.pack(read[name](), packed / name, *tokenizers)


def easy_vqa() -> dict[str, Iterable[Record]]:
    """Return easy-VQA with a twentieth of its training pictures as `validation`, which the other two have."""
    found = sources.easy_vqa()
    train = list(found['train'])
    count = len(train) // 20
    return {'train': train[count:], 'validation': train[:count], 'test': found['test']}


def _texts(icons: Path, split: str) -> list[dict]:
    """Return contexts about the concepts of the training pictures, and about easy-VQA's pictures."""
    rng = np.random.default_rng(len(split))
    lines = (icons / 'train' / 'captions.jsonl').read_text().splitlines()
    concepts = sorted({json.loads(line)['caption'] for line in lines})
    count = 12000 if split == 'train' else 400
    shapes = [r for r in sources.easy_vqa()['train'] if r.captions]
    shapes = shapes[400:] if split == 'train' else shapes[:400]
    questions = ([{'question': q, 'answers': a} for q, a in zip(r.questions, r.answers, strict=True)] for r in shapes)
    restated = [language.restated(r.captions, a, rng) for r, a in zip(shapes, questions, strict=True)]
    return [*language.records(concepts, count, rng), *restated]


def ask_where(canvases: Path) -> None:
    """Add to each canvas the question for the place of each of its icons."""
    for path in sorted(canvases.glob('*/captions.jsonl')):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            places = ((p['phrase'], language.place(p['box'])) for p in line['phrases'])
            line['questions'] = [{'question': language.where(p), 'answers': [place]} for p, place in places]
        path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def teach(options: Options) -> None:
    """Train the language model on the texts, or find it done."""
    run = config.Run(
        stage='language',
        model=config.Blip2Config(vit=None, qformer=None, lm=LM),
        data=config.Data(
            path=str(options.out / 'packed' / 'language'),
            validation_split='validation',
            max_lm_text=112,
            question_prompt=('{question}',),
        ),
        optimizer=config.Optimizer(
            peak_rate=2e-3, final_rate=1e-4, warmup_steps=min(200, options.steps // 4), clip_norm=1.0
        ),
        training=config.Training(steps=options.steps, batch_size=128, checkpoint_every=max(1, options.steps // 4)),
    )
    loop.train(run, options.out / 'runs' / 'language')


def encode(options: Options) -> None:
    """Encode the three data sets of pictures, or find that done."""
    for name in DATA:
        pictures, features = (options.out / kind / name for kind in ('packed', 'features'))
        if not features.exists():
            _run('data', 'encode', pictures, features, '--vit', options.tower)


def _run(*words: object) -> None:
    cli.run([str(word) for word in words])


def main(options: Options) -> None:
    """Prepare everything, as far as the tower allows; raises UserError where there are no pictures."""
    for folder, by in ((options.icons, 'make'), (options.canvases, 'canvas --size 112')):
        if not (folder / 'train' / 'captions.jsonl').exists():
            then = f'python -m experiments.datasets.icons.{by} --out {folder}'
            raise UserError(f'{folder}: no train/captions.jsonl; make it with: {then}')
    pack(options)
    if options.tower:
        encode(options)
        teach(options)
    then = 'python -m experiments.connectors' if options.tower else 'the same with --tower'
    print(f'wrote {options.out}; next: {then} --out {options.out}')


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
