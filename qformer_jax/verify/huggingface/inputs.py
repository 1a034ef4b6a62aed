"""What both sides read: noise for a picture and random ids with padding, made from the configuration and a seed."""

from dataclasses import dataclass

import numpy as np

from ... import config
from ...convert.families import published_family
from ...convert.table import Row
from ...models.t5 import START_ID

_NO_LABEL = -100  # what PyTorch's cross-entropy leaves out
_SPECIAL = 3  # ids below are special ones in every vocabulary here


@dataclass(frozen=True)
class Probe:
    """Two rows of everything; the second text of each kind is shorter, with padding on its right."""

    pixels: np.ndarray
    """[2, S, S, 3], of the zero-mean, unit-variance kind that a tower reads."""
    words: np.ndarray
    """[2, 6] ids that the Q-Former reads."""
    words_exist: np.ndarray
    text: np.ndarray
    """[2, 8] ids that the language model reads after the picture; a decoder is asked to predict them."""
    text_exist: np.ndarray
    answer: np.ndarray
    """[2, 5] ids that T5's decoder is asked to predict."""
    answer_exist: np.ndarray

    def answer_read(self) -> np.ndarray:
        """Return what T5's decoder reads: the answer, one to the right."""
        return np.pad(self.answer[:, :-1], ((0, 0), (1, 0)), constant_values=START_ID)

    def prefixed(self, array: np.ndarray, c: config.Blip2Config, fill: int | bool) -> np.ndarray:
        """Return `array` [2, T] with `fill` at the queries before it, where the model has queries."""
        queries = c.qformer.num_queries if c.qformer else 0
        return np.pad(array, ((0, 0), (queries, 0)), constant_values=fill)

    def for_language_model(self, c: config.Blip2Config) -> dict[str, np.ndarray]:
        """Return the arguments of their language models."""
        exist = self.prefixed(self.text_exist, c, True)
        read = {'input_ids': self.prefixed(self.text, c, image_token(c.lm)), 'attention_mask': exist}
        if c.lm.encoder_decoder:
            labels = np.where(self.answer_exist, self.answer, _NO_LABEL)
            return read | {'decoder_input_ids': self.answer_read(), 'labels': labels}
        labels = np.where(self.text_exist, self.text, _NO_LABEL)
        return read | {'labels': self.prefixed(labels, c, _NO_LABEL)}


def image_token(c: config.LmConfig) -> int:
    """Return the id that stands for the picture in their ids: the last one, which no probe has as a word."""
    return c.vocab_size - 1


def lm_modules(c: config.LmConfig) -> dict[str, str]:
    """Return their name of every module of a language model by ours, as the table of its weights has them."""
    rows = [row for row in published_family(c).table(c) if isinstance(row, Row)]
    return {path.rpartition('/')[0]: row.key.rpartition('.')[0] for row in rows for path in row.paths}


def after_layers(c: config.LmConfig, stack: str) -> tuple[str, ...]:
    """Return the name of what a stack's last layer goes through before the output table, if there is something."""
    has = lm_modules(c)
    return tuple(name for name in (f'{stack}/output_projection', f'{stack}/norm') if name in has)[:1]


def make(c: config.Blip2Config) -> Probe:
    """Return the same probe for the same configuration, always."""
    random = np.random.default_rng(0)
    size = c.vit.image_size if c.vit else 1
    words = c.qformer.vocab_size if c.qformer else _SPECIAL + 1
    tokens = image_token(c.lm) if c.lm else _SPECIAL + 1

    def ids(length: int, end: int) -> np.ndarray:
        return random.integers(min(_SPECIAL, end - 1), end, size=(2, length), dtype=np.int32)

    def exist(length: int) -> np.ndarray:
        return np.arange(length)[None] < np.array([[length], [length - 2]])

    pixels = random.standard_normal((2, size, size, 3), dtype=np.float32)
    return Probe(pixels, ids(6, words), exist(6), ids(8, tokens), exist(8), ids(5, tokens), exist(5))
