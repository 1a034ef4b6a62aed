"""`qformer data pack`: a source of pictures or feature arrays as a data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .options import OutFolder, Wait


@dataclass(frozen=True)
class Pack:
    """Pack pictures (or feature arrays) with their texts into one data set that every stage reads.

    Its two tokenizers, the Q-Former's and the language model's, are trained on the train split unless they are given.
    The command says how long the captions are, and how many of them the recipes would cut (at their data.max_text).
    """

    source: Annotated[
        tyro.conf.Positional[Literal['easy-vqa', 'folder', 'coco', 'features']], tyro.conf.arg(metavar='SOURCE')
    ]
    """`easy-vqa`: the PyPI package; `folder`: pictures, or videos as lists of frames, with a captions.jsonl;
    `coco`: COCO / VQAv2 JSON files; `features`: .npy arrays [P, V] with a captions.jsonl."""
    out: OutFolder
    """Folder to write."""
    path: Path = Path('.')
    """Folder of the source (not for easy-vqa)."""
    text_tokenizer: Path | None = None
    """The Q-Former's vocabulary: BERT's vocab.txt, or a tokenizer.json; default: a WordPiece trained on the split."""
    lm_tokenizer: Path | None = None
    """The language model's: a tokenizer.json, or a folder with one or with OPT's vocab.json and merges.txt; default: a
    byte BPE trained on the split. (A pretrained language model brings its own, from its run: `qformer convert`.)"""
    wait: Wait = False


def pack(options: Pack) -> None:
    """Pack a data set."""
    from .. import recipes
    from ..data import pack as packing
    from ..data import sources
    from ..lock import one_writer

    read = {
        'easy-vqa': sources.easy_vqa,
        'folder': lambda: sources.folder(options.path),
        'coco': lambda: sources.coco(options.path),
        'features': lambda: sources.features(options.path),
    }
    rows = {recipes.load(name)[0].data.max_text for name in recipes.names()}
    tokenizers = options.text_tokenizer, options.lm_tokenizer
    with one_writer(options.out, options.wait):
        packing.pack(read[options.source](), options.out, *tokenizers, row_lengths=rows)
