"""Mutants of what the host does: pictures to pixels, texts to clean texts, texts to ids."""

import re
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from qformer_jax.data import tokenizers, transforms
from qformer_jax.data.tokenizers import LmTokenizer, TextTokenizer
from qformer_jax.models import vit

from .mutant import Mutant, replaced

CASES = ('processors',)
WORDS = ('small_stage1', 'stage1')
PIECES = ('low_variance_opt_stage2',)


def mutants() -> Iterator[Mutant]:
    """Return them all."""
    for kind, cases, wrongs, arrays in (
        ('picture', CASES, PICTURES, '.*'),
        ('text', CASES, TEXTS, '.*'),
        ('ids', WORDS, IDS_OF_BERT, 'input_ids|attention_mask'),
        ('ids', PIECES, IDS_OF_OPT, '.*(input_ids|attention_mask|where the answer starts)'),
    ):
        for name, (owner, function, wrong) in wrongs.items():
            yield Mutant(kind, name, cases, replaced(owner, function, wrong), arrays=arrays)


def _filter(method: Image.Resampling) -> Callable:
    return lambda _: lambda image, size: image.resize((size, size), method)


def _on_black(right):
    """Lay a transparent picture on black."""

    def decode(data, *name):
        image = Image.open(data) if isinstance(data, bytes) else data
        if image.mode == 'RGBA':
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'black'), image)
        return right(image, *name)

    return decode


def _cut(change: Callable) -> Callable:
    """Return a wrong cut, whose box and mirroring differ."""
    return lambda right: lambda image, box, size, mirror: right(image, *change(box, size, mirror))


def _other_order(right):
    return lambda image: right(image[..., ::-1])


class _AsItIs(str):
    """A text that has no other case."""

    def lower(self) -> str:
        return str(self)


def _case_kept(right):
    return lambda text, *limit: right(_AsItIs(text), *limit)


def _a_word_more(right):
    return lambda text, limit=50: right(text, limit + 1)


def _end_is_cut(right):
    """Cut a long text at the end, with its [SEP]."""

    def encode(self, text, length):
        ids, mask = right(self, text, 512)
        return ids[:length], mask[:length]

    return encode


def _padding_counts(right):
    return lambda self, text, length: (right(self, text, length)[0], np.ones(length, bool))


def _one_shorter(right):
    """Cut a token early."""

    def encode(self, text, length):
        ids, mask = right(self, text, length - 1)
        return np.append(ids, np.int32(self.pad_id)), np.append(mask, False)

    return encode


def _ends_with_bos(right):
    def lm_row(tokenizer, prompt, target):
        ids, start = right(tokenizer, prompt, target)
        return [*ids[:-1], *tokenizer.special_tokens.begin], start

    return lm_row


PICTURES = {
    'bilinear': (transforms, '_resize', _filter(Image.Resampling.BILINEAR)),
    'Lanczos': (transforms, '_resize', _filter(Image.Resampling.LANCZOS)),
    'nearest pixel': (transforms, '_resize', _filter(Image.Resampling.NEAREST)),
    'centre of the picture': (
        transforms,
        '_resize',
        lambda _: lambda image, size: ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC),
    ),
    'transparency on black': (transforms, 'decode', _on_black),
    'box given by rows': (
        transforms,
        'cut',
        _cut(lambda box, size, mirror: ((box[1], box[0], box[3], box[2]), size, mirror)),
    ),
    'mirrored the other times': (transforms, 'cut', _cut(lambda box, size, mirror: (box, size, not mirror))),
    'mean and deviation exchanged': (
        vit,
        'normalise',
        lambda _: lambda image: (image / 255 - jnp.array(vit.PIXEL_STD)) / jnp.array(vit.PIXEL_MEAN),
    ),
    "ImageNet's mean": (vit, 'PIXEL_MEAN', lambda _: (0.485, 0.456, 0.406)),
    "ImageNet's deviation": (vit, 'PIXEL_STD', lambda _: (0.229, 0.224, 0.225)),
    'blue first': (vit, 'normalise', _other_order),
    'pixels by 256': (vit, 'normalise', lambda right: lambda image: right(image * (255 / 256))),
}
TEXTS = {
    'captions keep their case': (tokenizers, 'clean_caption', _case_kept),
    'questions keep their case': (tokenizers, 'clean_question', _case_kept),
    'captions of 51 words': (tokenizers, 'clean_caption', _a_word_more),
    'questions of 51 words': (tokenizers, 'clean_question', _a_word_more),
    'captions cleaned as questions': (tokenizers, 'clean_caption', lambda _: tokenizers.clean_question),
    'questions cleaned as captions': (tokenizers, 'clean_question', lambda _: tokenizers.clean_caption),
    'all punctuation': (tokenizers, '_PUNCTUATION', lambda _: re.compile(r'[.!"()*#:;~,?]')),
    'no ~ among the punctuation': (tokenizers, '_PUNCTUATION', lambda _: re.compile(r'[.!"()*#:;]')),
    'runs of blanks stay': (tokenizers, '_SPACES', lambda _: re.compile('(?!)')),
}
IDS_OF_BERT = {
    'BERT: [SEP] is cut': (TextTokenizer, 'encode', _end_is_cut),
    'BERT: padding counts': (TextTokenizer, 'encode', _padding_counts),
    'BERT: cut a token early': (TextTokenizer, 'encode', _one_shorter),
}
IDS_OF_OPT = {
    'OPT: no </s> before': (tokenizers, 'prompt_ids', lambda _: lambda t, prompt: t.ids(prompt.rstrip())),
    'OPT: the blank belongs to the prompt': (
        tokenizers,
        'prompt_ids',
        lambda _: lambda t, prompt: [*t.special_tokens.begin, *t.ids(f'{prompt} ' if prompt else '')],
    ),
    'OPT: every word begins with a blank': (
        LmTokenizer,
        'ids',
        lambda right: lambda self, text: right(self, f' {text.lstrip()}'),
    ),
    'OPT: ends with </s>': (tokenizers, 'lm_row', _ends_with_bos),
}
"""What -> the owner, the function or constant in it, and the wrong one made of the right one."""
