"""Text to ids and back: the Q-Former's WordPiece and the language model's tokenizer, trained or read."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..errors import UserError
from ..typing import Bool, Int
from .special_tokens import special_tokens_of

_PUNCTUATION = re.compile(r'[.!"()*#:;~]')
_SPACES = re.compile(r'\s{2,}')
_BERT_SPECIALS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
_OPT_SPECIALS = ['<s>', '<pad>', '</s>', '<unk>']
_REMEMBERED = 2**16  # texts a tokenizer keeps: questions and answers come again and again


def clean_caption(text: str, max_words: int = 50) -> str:
    """Return a caption as BLIP-2 reads it: lower case, punctuation to spaces, runs of blanks to one, 50 words."""
    text = _SPACES.sub(' ', _PUNCTUATION.sub(' ', text.lower()))
    return ' '.join(text.rstrip('\n').strip(' ').split(' ')[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """Return a question as BLIP-2 reads it: lower case, punctuation deleted, blanks kept, 50 words."""
    return ' '.join(_PUNCTUATION.sub('', text.lower()).rstrip(' ').split(' ')[:max_words])


def question_prompt(prompt: str, question: str) -> str:
    """Return a prompt with a question in it, cleaned as LAVIS's processor does, in training and in use."""
    return prompt.format(question=clean_question(question.strip()))


def phrase_prompt(prompt: str, phrase: str) -> str:
    """Return a prompt that asks for the boxes of a phrase, which is cleaned as a caption is."""
    return prompt.format(phrase=clean_caption(phrase))


def train_wordpiece(texts: Iterable[str], size: int) -> Tokenizer:
    """Return a lower-casing WordPiece tokenizer of at most `size` entries; `[PAD]` is 0, `[DEC]` is not in it."""
    texts = list(texts)
    blank = _bert(models.WordPiece(unk_token='[UNK]'))
    letters = sorted({letter for text in texts for letter in blank.normalizer.normalize_str(text) if letter > ' '})
    # The trainer numbers the inner letters ("##a") in the order of a hash table, another one each time, and ties
    # between merges follow the numbers. Naming them as specials fixes the order; the result keeps their ids only.
    fixed = [*_BERT_SPECIALS, *letters, *(f'##{letter}' for letter in letters)]
    blank.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=fixed, show_progress=False)
    )
    return _bert(models.WordPiece(blank.get_vocab(), unk_token='[UNK]'))


def train_byte_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most `size` entries, its four specials numbered as in OPT."""
    tokenizer = _gpt2(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=_OPT_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class TextTokenizer:
    """The Q-Former's tokenizer: `[CLS] text [SEP]`, padded; `[DEC]` has the id that follows the vocabulary."""

    def __init__(self, tokenizer: Tokenizer):
        tokenizer.encode_special_tokens = True  # a "[SEP]" that a user types is text
        self._tokenizer = tokenizer
        self.pad_id, self.cls_id, self.sep_id = (_special(tokenizer, name) for name in ('[PAD]', '[CLS]', '[SEP]'))
        self.unknown_id = tokenizer.token_to_id('[UNK]')
        self.vocab_size = tokenizer.get_vocab_size()
        self.dec_id = self.vocab_size
        self._ids = lru_cache(_REMEMBERED)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

    @classmethod
    def load(cls, path: Path | str) -> 'TextTokenizer':
        """Read a `.json` of `tokenizers` or BERT's `vocab.txt`; raises UserError when it is neither."""
        path = Path(path)
        if path.suffix == '.txt':
            vocabulary = _parse(path, lambda p: models.WordPiece.from_file(p, unk_token='[UNK]'))
            return cls(_bert(vocabulary))
        return cls(_parse(path, Tokenizer.from_file))

    def save(self, path: Path) -> None:
        """Write the tokenizer as one `.json` that `load` reads."""
        self._tokenizer.save(str(path))

    def encode(self, text: str, length: int) -> tuple[Int['T'], Bool['T']]:
        """Return ids and mask of `length` tokens; a longer text is cut, its `[SEP]` kept."""
        return pad([self.cls_id, *self._ids(text)[: length - 2], self.sep_id], length, self.pad_id)

    def ids(self, text: str) -> list[int]:
        """Return the text's ids, no special token added."""
        return list(self._ids(text))

    def decode(self, ids: Int['T'] | Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids if i < self.vocab_size])


class LmTokenizer:
    """The language model's tokenizer; `special_tokens` says which ids stand around a text (see `special_tokens.py`)."""

    def __init__(self, tokenizer: Tokenizer):
        tokenizer.encode_special_tokens = True  # a "</s>" that a user types is text
        tokenizer.no_truncation(), tokenizer.no_padding()  # which a file may ask for
        self.tokenizer = tokenizer
        self.special_tokens = special_tokens_of(tokenizer)
        self.pad_id, self.end_id = self.special_tokens.pad, self.special_tokens.end
        self.vocab_size = tokenizer.get_vocab_size()
        self._ids = lru_cache(_REMEMBERED)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

    @classmethod
    def load(cls, path: Path | str) -> 'LmTokenizer':
        """Read a `.json` of `tokenizers`, or a folder of a `tokenizer.json` or of `vocab.json` and `merges.txt`.

        Raises UserError when it is neither.
        """
        path = Path(path)
        if (path / 'tokenizer.json').is_file():
            path /= 'tokenizer.json'
        if not path.is_dir():
            return cls(_parse(path, Tokenizer.from_file))
        return cls.from_files(path / 'vocab.json', path / 'merges.txt')

    @classmethod
    def from_files(cls, vocab: Path, merges: Path) -> 'LmTokenizer':
        """Read GPT-2's two files; raises UserError when they are not."""
        merges = str(_existing(merges))
        tokenizer = _gpt2(_parse(vocab, lambda p: models.BPE.from_file(p, merges)))
        tokenizer.add_special_tokens([s for s in _OPT_SPECIALS if tokenizer.token_to_id(s) is not None])
        return cls(tokenizer)

    def save(self, path: Path) -> None:
        """Write the tokenizer as one `.json` that `load` reads."""
        self.tokenizer.save(str(path))

    def ids(self, text: str) -> list[int]:
        """Return the text's ids, no special token added."""
        return list(self._ids(text))

    def decode(self, ids: Int['T'] | Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids if i < self.vocab_size])


def prompt_ids(tokenizer: LmTokenizer, prompt: str) -> list[int]:
    """Return what the language model reads before it writes: the prompt without trailing blanks, and its marks."""
    return [*tokenizer.special_tokens.begin, *tokenizer.ids(prompt.rstrip()), *tokenizer.special_tokens.close]


def lm_row(tokenizer: LmTokenizer, prompt: str, target: str) -> tuple[list[int], int]:
    """Return the ids of `prompt target` with their marks, and the position of the target's first id.

    Byte BPE ties a blank to the word after it, so the blank between the two belongs to the target: the prompt then has
    the same ids here and in `prompt_ids`. Without a prompt there is no blank. T5 reads the row up to the target with
    its encoder and writes the rest with its decoder.
    """
    start = prompt_ids(tokenizer, prompt)
    blank = tokenizer.special_tokens.blank if prompt.strip() else ''
    return [*start, *tokenizer.ids(blank + target), tokenizer.special_tokens.end], len(start)


def pad(ids: Sequence[int], length: int, pad_id: int) -> tuple[Int['T'], Bool['T']]:
    """Return ids (int32, cut or padded at the right to `length`) and the mask of the real ones."""
    count = min(len(ids), length)
    row = np.full(length, pad_id, np.int32)
    row[:count] = ids[:count]
    return row, np.arange(length) < count


def _bert(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([s for s in _BERT_SPECIALS if tokenizer.token_to_id(s) is not None])
    return tokenizer


def _gpt2(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _special(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_to_id(name)
    if found is None:
        raise UserError(f"this vocabulary lacks the token '{name}'; a WordPiece (BERT) is no byte BPE (OPT)")
    return found


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f'{path}: no such tokenizer file')
    return path


def _parse(path: Path, read):
    try:
        return read(str(_existing(path)))
    except UserError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f'{path}: not a tokenizer file ({error})') from error
