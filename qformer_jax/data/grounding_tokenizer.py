"""A language model's tokenizer with the words for boxes behind its vocabulary, each of which is one id."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from .. import boxes
from ..config import Blip2Config
from ..typing import Int
from .tokenizers import LmTokenizer


class GroundedTokenizer(LmTokenizer):
    """Words of their own ids; `vocab_size` stays that of the words that the tokenizer was trained with."""

    def __init__(self, plain: LmTokenizer, words: Sequence[str], first: int):
        super().__init__(plain.tokenizer)
        self._words, self._first = tuple(words), first
        self._numbers = {word: first + i for i, word in enumerate(words)}

    def ids(self, text: str) -> list[int]:
        """Return the text's ids; a word that is added is one wherever it stands, and a blank before it is dropped."""
        plain, pieces = super().ids, boxes.SPLIT.split(text)
        return [i for piece in pieces for i in ([self._numbers[piece]] if piece in self._numbers else plain(piece))]

    def decode(self, ids: Int['T'] | Sequence[int]) -> str:
        """Return the text of the ids, added words among them, without special tokens."""
        plain, parts = super().decode, itertools.groupby(map(int, ids), lambda i: i >= self._first)
        return ''.join(self._spelled(part) if added else plain(list(part)) for added, part in parts)

    def save(self, path: Path) -> None:
        """Write one `.json` in which the added words are words as any other, each of the id that it has here."""
        whole = Tokenizer.from_str(self.tokenizer.to_str())
        # Ids follow each other: rows of the language model's table without a word get names that no text has.
        spare = [f'<spare_row_{row}>' for row in range(whole.get_vocab_size(), self._first)]
        whole.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in (*spare, *self._words)])
        whole.save(str(path))

    def _spelled(self, ids: Iterable[int]) -> str:
        return ''.join(self._words[i - self._first] for i in ids)


def with_location_tokens(tokenizer: LmTokenizer, m: Blip2Config) -> LmTokenizer:
    """Return the tokenizer with the words that a model adds to its language model's, if it adds any."""
    if not m.grounding:
        return tokenizer
    words = boxes.words(m.grounding.grid)
    return GroundedTokenizer(tokenizer, words, m.lm.vocab_size - (len(words) if m.grounding.in_table else 0))
