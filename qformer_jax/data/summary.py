"""What was packed, as a table: records and texts of each split, lengths of captions, words that nobody can read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from .tokenizers import TextTokenizer, clean_caption


def table(counts: Mapping[str, Sequence], captions: Mapping[str, Sequence[str]], tokenizer: TextTokenizer) -> Table:
    """Return a row a split.

    `counts` are the rows of index.npz, `captions` those of each split. Tokens are those that stage 1 reads, with [CLS]
    and [SEP]; a word is known when the Q-Former's vocabulary spells it.
    """
    shown = Table()
    shown.add_column('split')
    for name in ('records', 'captions', 'questions', 'phrases', 'longest caption', 'median caption', 'known words'):
        shown.add_column(name, justify='right')
    for split, rows in counts.items():
        numbers = np.array(rows)
        said = [clean_caption(caption) for caption in captions.get(split, ())]
        totals = (len(rows), *numbers[:, [0, 1, 4]].sum(axis=0))
        shown.add_row(split, *(f'{total:,}' for total in totals), *_lengths(said, tokenizer), _known(said, tokenizer))
    return shown


def notes(counts: Mapping[str, Sequence], left_out: Sequence[Path]) -> list[str]:
    """Return what is worth saying beside the table: records without a text, and files that were left out."""
    said = []
    for split, rows in counts.items():
        numbers = np.array(rows)
        if silent := int((numbers[:, [0, 1, 4]].sum(axis=1) == 0).sum()):
            said.append(f"{silent} of {len(rows)} records of '{split}' have no text: no stage reads them")
    if left_out:
        said.append(f'left out: {len(left_out)} files that no line names, such as {left_out[0]}')
    return said


def _lengths(captions: Sequence[str], tokenizer: TextTokenizer) -> tuple[str, str]:
    """Return the longest and the median caption in words and tokens."""
    if not captions:
        return '-', '-'
    sizes = np.array([(len(caption.split()), len(tokenizer.ids(caption)) + 2) for caption in captions])
    (most_words, most), (words, tokens) = sizes.max(axis=0), np.median(sizes, axis=0)
    return f'{most_words} words, {most} tokens', f'{words:g} words, {tokens:g} tokens'


def _known(captions: Sequence[str], tokenizer: TextTokenizer) -> str:
    """Return the share of words that the vocabulary spells."""
    words = Counter(word for caption in captions for word in caption.split())
    if not words:
        return '-'
    known = sum(count for word, count in words.items() if tokenizer.unknown_id not in tokenizer.ids(word))
    return f'{known / words.total():.1%}'
