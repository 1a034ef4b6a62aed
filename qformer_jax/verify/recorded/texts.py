"""Token ids from the texts of a case, by our tokenizers, where the case's vocabulary files are there."""

from pathlib import Path

import numpy as np

from ...data.tokenizers import TextTokenizer
from .case import Case
from .comparison import Arrays


def bert(case: Case) -> TextTokenizer | None:
    """Return the Q-Former's tokenizer, or None where its vocabulary was not copied with the case."""
    path = vocabulary(case, 'bert_tokenizer', 'vocab')
    return TextTokenizer.load(path) if path.is_file() else None


def vocabulary(case: Case, *names: str) -> Path:
    """Return where a setting says that a tokenizer's file lies."""
    return case.folder / case.setting(*names)


def framed(tokenizer: TextTokenizer, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask [texts, length] of `[CLS] text [SEP]`."""
    rows = [tokenizer.encode(text, length) for text in texts]
    return np.stack([ids for ids, _ in rows]), np.stack([mask for _, mask in rows]).astype(np.int32)


def recomputed(tokenizer: TextTokenizer | None, case: Case, prefix: str, texts: list[str]) -> Arrays:
    """Return `PREFIXinput_ids` and `PREFIXattention_mask` as recorded, from the texts; nothing without a tokenizer."""
    if tokenizer is None or len(texts) < len(case.array(f'{prefix}input_ids')):
        return {}
    rows, length = case.array(f'{prefix}input_ids').shape
    ids, mask = framed(tokenizer, texts[:rows], length)
    return {f'{prefix}input_ids': ids, f'{prefix}attention_mask': mask}
