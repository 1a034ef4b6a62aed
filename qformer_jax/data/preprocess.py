"""One record to one row of a batch, in the format that a stage asks for."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from .. import boxes
from ..config import Data
from ..errors import UserError
from .record_cache import RecordCache
from .records import Record
from .tokenizers import LmTokenizer, TextTokenizer, clean_caption, lm_row, pad, phrase_prompt, question_prompt
from .transforms import eval_image, train_images

Row = dict[str, np.ndarray | np.int32]


class Need(NamedTuple):
    """What a text needs of a row."""

    field: str
    """Which length of `config.Data` is its row's."""
    tokens: int
    """Tokens of the whole text."""
    length: int
    """Tokens of the row."""
    start: int
    """Place of the first token that is learned: where a row ends before it, there is nothing to learn."""


@dataclass(frozen=True)
class RowFormat:
    """What rows hold of a record, and which records can give one."""

    texts: Callable[['RowMaker', Record, np.random.Generator], Row]
    """Makes the texts of a row."""
    needs: Callable[['RowMaker', Record], Iterable[Need]]
    """Says what each text needs that `texts` may draw, whatever the draw."""
    reads: tuple[Literal['caption', 'question'], ...] = ('caption',)
    """What a record must have one of."""
    pictures: bool = True
    """Whether the picture is in the row too."""
    boxes: Callable[['RowMaker', Record, np.random.Generator], Row] | None = None
    """Makes the texts of a row that asks where a phrase is; None: no row asks that."""


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of one format: `maker(position, rng)`; every random choice comes from `rng`."""

    row_format: RowFormat
    """What the rows hold."""
    data: Data
    """Lengths, prompts and augmentation."""
    memory: RecordCache
    """Where records come from, with their pictures decoded."""
    first: int
    """`image_id` of the record at position 0."""
    image_size: int
    """Height and width of the pictures; 0: feature arrays instead."""
    max_frames: int
    """Frames (F) to pad to; 0: pictures, not videos."""
    max_patches: int
    """Feature rows (P) to pad to."""
    text_tokenizer: TextTokenizer
    """The Q-Former's."""
    lm_tokenizer: LmTokenizer
    """The language model's."""
    training: bool
    """Whether pictures are cropped and mirrored, and prompts drawn."""
    reads_prompt: bool = False
    """Whether the Q-Former reads the prompt of `instruct`."""
    grid: int = 0
    """Cells along a side of a picture that boxes are said in; 0: no box is asked for."""

    def __call__(self, position: int, rng: np.random.Generator) -> Row:
        """Return the row; raises UserError when `max_lm_text` leaves no room for its target."""
        record, images = self.memory[position]
        row = {'image_id': np.int32(self.first + position)}
        if self._asks_box(record, rng):
            return row | self._seen(record, images, None) | self.row_format.boxes(self, record, rng)
        if self.row_format.pictures:
            row |= self._seen(record, images, rng)
        return row | self.row_format.texts(self, record, rng)

    def needs(self, record: Record) -> Iterator['Need']:
        """Yield what each text of a record needs that a row may draw, whatever the draw."""
        yield from self.row_format.needs(self, record)
        if self.grid and self.data.phrase_fraction:
            prompts = [
                (phrase_prompt(p, phrase), places)
                for phrase, places in record.phrases_with_boxes
                for p in self.data.phrase_prompt
            ]
            yield from (self._lm_need('', prompt, boxes.spell(places, self.grid)) for prompt, places in prompts)

    def caption(self, record: Record, rng: np.random.Generator) -> Row:
        """Return a caption for the Q-Former, or for the words that a tower is to name."""
        return self._text(_caption(record, rng))

    def caption_needs(self, record: Record) -> Iterable['Need']:
        """Return what captions need."""
        return map(self._text_need, map(clean_caption, record.captions))

    def plain_text(self, record: Record, rng: np.random.Generator) -> Row:
        """Return `caption bos prompt answer newline`: the caption stands where stage 2 will put the soft prefix."""
        caption = _caption(record, rng)
        if self._asks_caption(record, rng):
            return self._lm(record, self._drawn(self.data.caption_prompt, rng), caption, context=caption)
        question, answer = _question(record, rng)
        return self._lm(record, self._prompt(question, rng), answer, context=caption)

    def plain_text_needs(self, record: Record) -> Iterable['Need']:
        """Return what every caption needs with every prompt and answer after it."""
        rows = self._prompts_and_answers(record)
        return (self._lm_need(clean_caption(caption), *row) for caption in record.captions for row in rows)

    def captioning(self, record: Record, rng: np.random.Generator) -> Row:
        """Return a prompt for a caption, and the caption, for the language model."""
        return self._lm(record, self._drawn(self.data.caption_prompt, rng), _caption(record, rng))

    def captioning_needs(self, record: Record) -> Iterable['Need']:
        """Return what every caption needs after every prompt for one."""
        return (self._lm_need('', *row) for row in self._prompts_and_captions(record))

    def instruction(self, record: Record, rng: np.random.Generator) -> Row:
        """Return one prompt for both readers, Q-Former and language model (InstructBLIP, section 2.3)."""
        if self._asks_caption(record, rng):
            prompt = self._drawn(self.data.caption_prompt, rng)
            return self._text(prompt) | self._lm(record, prompt, _caption(record, rng))
        question, answer = _question(record, rng)
        prompt = self._prompt(question, rng)
        return self._text(prompt) | self._lm(record, prompt, answer)

    def instruction_needs(self, record: Record) -> Iterator['Need']:
        """Yield what every prompt and answer needs, and the prompt alone where the Q-Former reads it."""
        rows = self._prompts_and_answers(record)
        yield from (self._lm_need('', *row) for row in rows)
        yield from (self._text_need(prompt) for prompt in dict(rows) if self.reads_prompt)

    def grounding(self, record: Record, rng: np.random.Generator) -> Row:
        """Return a prompt that asks where a phrase is, and its boxes, however many."""
        return self._lm(record, *self._phrase(record, rng))

    def grounding_instruction(self, record: Record, rng: np.random.Generator) -> Row:
        """Return the same for both readers; the Q-Former's prompt is without the words for boxes."""
        prompt, answer = self._phrase(record, rng)
        return self._lm(record, prompt, answer) | self._text(boxes.plain(prompt))

    def _prompts_and_captions(self, record: Record) -> list[tuple[str, str]]:
        captions = map(clean_caption, record.captions)
        return [(prompt, caption) for caption in captions for prompt in self.data.caption_prompt]

    def _prompts_and_answers(self, record: Record) -> list[tuple[str, str]]:
        """Return every prompt and answer of a record, and those for its captions where they may be asked for."""
        answered = zip(record.questions, record.answers, strict=True)
        asked_of = [(p, q, a) for q, accepted in answered for a in set(accepted) for p in self.data.question_prompt]
        answers = [(question_prompt(p, q), a.lower().strip()) for p, q, a in asked_of]
        captions = self._prompts_and_captions(record) if self.data.caption_fraction or not answers else []
        return answers + captions

    def _text_need(self, text: str) -> 'Need':
        return Need('max_text', len(self.text_tokenizer.ids(text)) + 2, self.data.max_text, 0)

    def _lm_need(self, context: str, prompt: str, target: str) -> 'Need':
        ids, start = lm_row(self.lm_tokenizer, prompt, target)
        before = len(self.lm_tokenizer.ids(context))
        return Need('max_lm_text', before + len(ids), self.data.max_lm_text, before + start)

    def _seen(self, record: Record, images: Sequence[Image.Image], rng: np.random.Generator | None) -> Row:
        """Return the picture (without `rng` the whole one), or frames or features padded with zeros and their mask."""
        if not self.image_size:
            if not self.memory.features:
                return {}
            features, mask = padded(record.features, self.max_patches)
            return {'features': features, 'feature_mask': mask}
        if self.training and rng:
            pixels = train_images(images, self.image_size, self.data.crop_scale, self.data.flip, rng)
        else:
            pixels = np.stack([eval_image(image, self.image_size) for image in images])
        if not self.max_frames:
            return {'image': pixels[0]}
        frames, mask = padded(pixels, self.max_frames)
        return {'image': frames, 'frame_mask': mask}

    def _text(self, text: str) -> Row:
        ids, mask = self.text_tokenizer.encode(text, self.data.max_text)
        return {'text': ids, 'text_mask': mask}

    def _lm(self, record: Record, prompt: str, target: str, context: str = '') -> Row:
        """Return the language model's row; the loss is on the target, after a context on all but the first token."""
        before = self.lm_tokenizer.ids(context)
        ids, start = lm_row(self.lm_tokenizer, prompt, target)
        length, start = self.data.max_lm_text, len(before) + start
        if start >= length:
            raise UserError(f"data.max_lm_text {length}: no room for the answer of '{record.image_id}' after {start} "
                            'tokens; raise it')  # fmt: skip
        row, mask = pad([*before, *ids], length, self.lm_tokenizer.pad_id)
        return {'lm_text': row, 'lm_mask': mask, 'lm_target': mask & (np.arange(length) >= (1 if before else start))}

    def _phrase(self, record: Record, rng: np.random.Generator) -> tuple[str, str]:
        """Return a prompt that asks for a phrase, and the words of its boxes."""
        phrase, places = record.phrases_with_boxes[rng.integers(len(record.phrases_with_boxes))]
        prompt = phrase_prompt(self._drawn(self.data.phrase_prompt, rng), phrase)
        return prompt, boxes.spell(places, self.grid)

    def _asks_box(self, record: Record, rng: np.random.Generator) -> bool:
        """Draw nothing where no box may be asked for, so that the draws of other rows stay what they were."""
        if not self.grid or not record.phrases or not self.data.phrase_fraction:
            return False
        return not (record.captions or record.questions) or rng.random() < self.data.phrase_fraction

    def _asks_caption(self, record: Record, rng: np.random.Generator) -> bool:
        chosen = rng.random() < self.data.caption_fraction
        return not record.questions or (chosen and bool(record.captions))

    def _prompt(self, question: str, rng: np.random.Generator) -> str:
        return question_prompt(self._drawn(self.data.question_prompt, rng), question)

    def _drawn(self, prompts: tuple[str, ...], rng: np.random.Generator) -> str:
        """Return one of the prompts in training, otherwise the first, which is the one in use."""
        return prompts[rng.integers(len(prompts))] if self.training else prompts[0]


CAPTIONS = RowFormat(RowMaker.caption, RowMaker.caption_needs)
PLAIN_TEXT = RowFormat(RowMaker.plain_text, RowMaker.plain_text_needs, pictures=False)
CAPTIONING = RowFormat(RowMaker.captioning, RowMaker.captioning_needs, boxes=RowMaker.grounding)
INSTRUCTIONS = RowFormat(
    RowMaker.instruction,
    RowMaker.instruction_needs,
    reads=('caption', 'question'),
    boxes=RowMaker.grounding_instruction,
)


def padded(array: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an array with zeros behind its rows, and which rows exist."""
    grow = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, grow), np.arange(rows) < len(array)


def _caption(record: Record, rng: np.random.Generator) -> str:
    return clean_caption(record.captions[rng.integers(len(record.captions))])


def _question(record: Record, rng: np.random.Generator) -> tuple[str, str]:
    """Return a question of the record and one of its accepted answers, lower-cased."""
    drawn = rng.integers(len(record.questions))
    answers = record.answers[drawn]
    return record.questions[drawn], answers[rng.integers(len(answers))].lower().strip()
