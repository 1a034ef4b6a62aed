"""Texts to ids: both trained tokenizers, the files of BERT and OPT, and the prompt convention."""

import numpy as np
import pytest

from qformer_jax.data.tokenizers import (
    LmTokenizer,
    TextTokenizer,
    lm_row,
    prompt_ids,
    train_byte_bpe,
    train_wordpiece,
)
from qformer_jax.errors import UserError

TEXTS = ['what color is the circle?', 'a red circle', 'a blue triangle', 'yes', 'no', 'red'] * 5


@pytest.fixture(scope='module')
def text_tokenizer():
    return TextTokenizer(train_wordpiece(TEXTS, 200))


@pytest.fixture(scope='module')
def lm_tokenizer():
    return LmTokenizer(train_byte_bpe(TEXTS, 400))


def test_wordpiece_numbers_its_specials_and_leaves_dec_out(text_tokenizer):
    tokenizer = train_wordpiece(TEXTS, 200)
    assert [tokenizer.token_to_id(t) for t in ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')] == [0, 1, 2, 3, 4]
    assert tokenizer.token_to_id('[DEC]') is None
    assert text_tokenizer.dec_id == text_tokenizer.vocab_size == tokenizer.get_vocab_size()


def test_text_is_framed_padded_and_lower_cased(text_tokenizer):
    ids, mask = text_tokenizer.encode('A RED circle', 8)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert (ids[0], ids[4]) == (2, 3)
    assert mask.tolist() == [True] * 5 + [False] * 3
    assert not ids[5:].any()
    assert text_tokenizer.decode(ids) == 'a red circle'


def test_a_long_text_is_cut_before_its_sep(text_tokenizer):
    ids, mask = text_tokenizer.encode('a red circle a red circle', 5)
    assert ids[-1] == 3
    assert mask.all()
    assert text_tokenizer.decode(ids) == 'a red circle'


def test_a_typed_special_token_is_text(text_tokenizer, lm_tokenizer):
    assert 3 not in text_tokenizer.encode('a [SEP] red', 16)[0][1:4]
    assert not set(lm_tokenizer.special_tokens.begin) & set(lm_tokenizer.ids('</s>'))
    assert lm_tokenizer.decode(lm_tokenizer.ids('</s>')) == '</s>'


def test_byte_bpe_numbers_its_specials_as_opt(lm_tokenizer):
    tokenizer = train_byte_bpe(TEXTS, 400)
    assert [tokenizer.token_to_id(t) for t in ('<s>', '<pad>', '</s>', '<unk>')] == [0, 1, 2, 3]
    assert (lm_tokenizer.pad_id, lm_tokenizer.special_tokens.begin) == (1, (2,))
    assert lm_tokenizer.ids('\n') == [lm_tokenizer.end_id]


def test_byte_bpe_spells_anything(lm_tokenizer):
    text = 'Ünknown 中文 😀\ttab'
    assert lm_tokenizer.decode([*lm_tokenizer.special_tokens.begin, *lm_tokenizer.ids(text)]) == text


def test_training_is_deterministic():
    assert len({train_wordpiece(iter(TEXTS), 200).to_str() for _ in range(5)}) == 1
    assert train_byte_bpe(TEXTS, 400).to_str() == train_byte_bpe(iter(TEXTS), 400).to_str()


@pytest.mark.parametrize('prompt', ['what color is the circle?', 'what color is the circle? '])
def test_a_row_begins_with_the_prompt_as_inference_spells_it(lm_tokenizer, prompt):
    ids, start = lm_row(lm_tokenizer, prompt, 'red')
    assert ids[:start] == prompt_ids(lm_tokenizer, prompt)
    assert ids == [*lm_tokenizer.special_tokens.begin, *lm_tokenizer.ids('what color is the circle? red\n')]
    assert ids[-1] == lm_tokenizer.end_id


def test_a_row_without_prompt_has_no_leading_blank(lm_tokenizer):
    ids, start = lm_row(lm_tokenizer, '', 'a red circle')
    assert start == 1
    assert lm_tokenizer.decode(ids[1:]) == 'a red circle\n'


def test_files_of_bert_and_opt_load(tmp_path, text_tokenizer, lm_tokenizer):
    words = ['[PAD]', 'x', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'red', '##dish']
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    bert = TextTokenizer.load(tmp_path / 'vocab.txt')
    assert bert.encode('A Reddish cat', 7)[0].tolist() == [3, 6, 7, 8, 2, 4, 0]
    assert bert.dec_id == 9

    train_byte_bpe(TEXTS, 400).model.save(str(tmp_path))
    opt = LmTokenizer.load(tmp_path)
    assert opt.ids('a red circle </s>') == lm_tokenizer.ids('a red circle </s>')
    assert opt.decode([*opt.special_tokens.begin, *opt.ids('a red circle')]) == 'a red circle'


def test_a_saved_tokenizer_loads_the_same(tmp_path, text_tokenizer):
    train_wordpiece(TEXTS, 200).save(str(tmp_path / 'w.json'))
    loaded = TextTokenizer.load(tmp_path / 'w.json')
    assert loaded.encode('a blue circle', 9)[0].tolist() == text_tokenizer.encode('a blue circle', 9)[0].tolist()


def test_wrong_files_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match='no such tokenizer file'):
        TextTokenizer.load(tmp_path / 'none.json')
    (tmp_path / 'bad.json').write_text('{}')
    with pytest.raises(UserError, match='not a tokenizer file'):
        LmTokenizer.load(tmp_path / 'bad.json')
    train_wordpiece(TEXTS, 200).save(str(tmp_path / 'w.json'))
    with pytest.raises(UserError, match="lacks the token '</s>'"):
        LmTokenizer.load(tmp_path / 'w.json')
