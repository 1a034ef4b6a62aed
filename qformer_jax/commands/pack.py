"""`qformer data pack`: a source of pictures or feature arrays as a data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config.ranges import Share
from ..data.jsonl import HELD_OUT
from .options import OutFolder, Wait


@dataclass(frozen=True)
class Pack:
    """Pack pictures (or feature arrays) with their texts into one data set that every stage reads.

    A folder of your own holds a captions.jsonl, one JSON object a line, and the files that it names:

    {"file": "0001.jpg", "caption": "a cat"}

    `file`: the picture (AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF or WEBP) or array, below the folder.
    `caption`: one text; or `captions`: a list of them.
    `questions`: a list of {"question": "what is it?", "answers": ["cat"]}.
    `phrases`: a list of {"phrase": "a cat", "box": [0.1, 0.25, 0.5, 1.0]}: left, top, right, bottom, as shares.
    `frames`: in place of `file`, the pictures of a video, in order.

    Sub folders `train`, `test` and so on, each with its captions.jsonl, are splits. Without them, some of the pictures
    are held out as `test`. The two tokenizers, the Q-Former's and the language model's, are trained on the train split
    unless they are given. The command ends with a table of what it packed and with commands that train on it.
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
    held_out: Share = HELD_OUT
    """Of a folder without splits, the share of pictures that become `test`: those with the lowest SHA-256, so that
    equal pictures stay together; 0: none."""
    allow_outside: bool = False
    """Let the files that are named lie outside the folder, by absolute names or `..`."""
    text_tokenizer: Path | None = None
    """The Q-Former's vocabulary: BERT's vocab.txt, or a tokenizer.json; default: a WordPiece trained on the split."""
    lm_tokenizer: Path | None = None
    """The language model's: a tokenizer.json, or a folder with one or with OPT's vocab.json and merges.txt; default: a
    byte BPE trained on the split. (A pretrained language model brings its own, from its run: `qformer convert`.)"""
    wait: Wait = False


def pack(options: Pack) -> None:
    """Pack a data set, and say how to train on it."""
    from ..data import jsonl, pictures, sources
    from ..data import pack as packing
    from ..lock import one_writer
    from ..training.fit import first_commands

    read = {
        'easy-vqa': sources.easy_vqa,
        'folder': lambda: sources.folder(options.path, options.held_out, options.allow_outside),
        'coco': lambda: sources.coco(options.path, options.allow_outside),
        'features': lambda: sources.features(options.path, options.held_out, options.allow_outside),
    }
    suffixes = {'folder': pictures.suffixes(), 'features': {'.npy'}}
    with one_writer(options.out, options.wait):
        records = read[options.source]()
        own = options.source in suffixes
        left_out = jsonl.unnamed(options.path, suffixes[options.source]) if own else ()
        packing.pack(records, options.out, options.text_tokenizer, options.lm_tokenizer, left_out=left_out)
    print('next: ' + '\n      '.join(first_commands(options.out)))
