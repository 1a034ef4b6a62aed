"""Which ids begin, close, end and pad a text: OPT, Llama, Vicuna, SmolLM2, T5."""

import lm_tokenizers
import pytest

from qformer_jax.data.tokenizers import LmTokenizer, lm_row, prompt_ids, train_byte_bpe

KINDS = {
    'opt': lambda: train_byte_bpe(['a red circle'], 300),
    'smollm': lm_tokenizers.smollm,
    'llama': lm_tokenizers.llama,
    'vicuna': lambda: lm_tokenizers.llama('</s>'),
    't5': lm_tokenizers.t5,
}


@pytest.mark.parametrize(
    'kind, begin, close, end, pad',
    [
        ('opt', ['</s>'], [], 'Ċ', '<pad>'),
        ('smollm', [], [], 'Ċ', 'Ċ'),
        ('llama', ['<s>'], [], '</s>', '</s>'),
        ('vicuna', ['</s>'], [], '</s>', '</s>'),
        ('t5', [], ['</s>'], '</s>', '<pad>'),
    ],
)
def test_the_marks_of_each_kind(kind, begin, close, end, pad):
    raw = KINDS[kind]()
    marks = LmTokenizer(raw).special_tokens
    named = [raw.id_to_token(i) for i in (*marks.begin, *marks.close, marks.end, marks.pad)]
    assert named == [*begin, *close, end, pad]
    assert (len(marks.begin), len(marks.close)) == (len(begin), len(close))


def test_t5_is_known_without_its_template():
    assert LmTokenizer(lm_tokenizers.t5(states=False)).special_tokens == LmTokenizer(lm_tokenizers.t5()).special_tokens


@pytest.mark.parametrize('kind', KINDS)
def test_a_row_is_the_prompt_as_inference_spells_it_and_the_target(kind):
    tokenizer = LmTokenizer(KINDS[kind]())
    ids, start = lm_row(tokenizer, 'what color is it? ', 'red')
    assert ids[:start] == prompt_ids(tokenizer, 'what color is it?')
    assert ids[-1] == tokenizer.end_id and len(ids[start:]) >= 2
    assert tokenizer.decode(ids[start:-1]).strip() == 'red'
    assert tokenizer.decode(ids[:start]) == 'what color is it?'
    assert lm_row(tokenizer, '', 'red')[1] == len(tokenizer.special_tokens.begin + tokenizer.special_tokens.close)


@pytest.mark.parametrize('kind', ['smollm', 'llama', 't5'])
def test_a_word_after_a_prompt_is_a_word_with_its_blank(kind):
    """` red` is one token of these vocabularies; `red` after a blank of its own would be several, or another one."""
    tokenizer = LmTokenizer(KINDS[kind]())
    ids, start = lm_row(tokenizer, 'what color?', 'red')
    assert len(ids[start:-1]) == 1


@pytest.mark.parametrize('kind', KINDS)
def test_a_saved_tokenizer_keeps_its_marks_and_drops_padding(kind, tmp_path):
    raw = KINDS[kind]()
    raw.enable_padding(length=40)
    raw.enable_truncation(3)
    raw.save(str(tmp_path / 'tokenizer.json'))
    loaded = LmTokenizer.load(tmp_path)  # a folder
    loaded.save(tmp_path / 'again.json')
    assert (
        LmTokenizer.load(tmp_path / 'again.json').special_tokens
        == loaded.special_tokens
        == LmTokenizer(KINDS[kind]()).special_tokens
    )
    assert loaded.ids('a red square') == LmTokenizer(KINDS[kind]()).ids('a red square')


def test_files_of_transformers_frame_texts_as_it_does(tmp_path):
    """T5's encoder text and labels, and Vicuna's prompt, by the classes that BLIP-2's authors call."""
    transformers = pytest.importorskip('transformers')
    pieces = [(f'▁{word}', -1.0) for word in ('what', 'color', 'red')]
    hf_tokenizer = transformers.T5Tokenizer(vocab=[('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0), *pieces], extra_ids=3)
    hf_tokenizer.save_pretrained(tmp_path / 't5')
    ids, start = lm_row(LmTokenizer.load(tmp_path / 't5'), 'what color', 'red')
    assert (ids[:start], ids[start:]) == (
        hf_tokenizer('what color').input_ids,
        hf_tokenizer(text_target='red').input_ids,
    )
    assert len(ids) == 5

    words = {word: i for i, word in enumerate(['<unk>', '<s>', '</s>', '▁', 'a', '▁a'])}
    hf_tokenizer = transformers.LlamaTokenizer(vocab=words, merges=[('▁', 'a')])
    hf_tokenizer.save_pretrained(tmp_path / 'llama')
    ids, start = lm_row(LmTokenizer.load(tmp_path / 'llama'), 'a', 'a')
    assert (ids[:start], ids[start:]) == ([1, *hf_tokenizer('a').input_ids], [*hf_tokenizer('a').input_ids, 2])
