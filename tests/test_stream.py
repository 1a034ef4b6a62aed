"""A token at a time: the ids of the compiled loop, and pieces that join to the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qformer_jax import config
from qformer_jax.data.tokenizers import LmTokenizer, train_byte_bpe
from qformer_jax.inference import decode, stream
from qformer_jax.inference.generate import GenerationConfig, row_keys
from qformer_jax.models import blip2

LMS = (
    config.OptConfig(vocab_size=40, width=16, depth=2, heads=2, mlp_width=24, max_positions=32),
    config.LlamaConfig(
        vocab_size=40, width=16, depth=2, heads=2, kv_heads=1, head_width=8, mlp_width=24, max_positions=32, tied=True
    ),
    config.T5Config(vocab_size=40, width=16, depth=2, decoder_depth=2, heads=2, head_width=8, mlp_width=24),
)
NUMBERS = np.random.default_rng(0)
PROMPT = NUMBERS.integers(4, 40, size=(3, 4)).astype(np.int32)
MASK = np.arange(4)[None] >= np.array([[0], [3], [1]])
PREFIX = blip2.Prefix.whole(NUMBERS.standard_normal((3, 2, 16), dtype=np.float32))


def drawn(lm):
    """Return a language model alone, with random parameters."""
    model = blip2.Blip2Module(config.Blip2Config(vit=None, qformer=None, lm=lm))
    shapes = blip2.shapes(model.config)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(0.4 * random.standard_normal(x.shape), jnp.float32), shapes)
    return model, params


@pytest.mark.parametrize('lm', LMS, ids=lambda lm: lm.family)
@pytest.mark.parametrize(
    'settings', [GenerationConfig(7, end_ids=(3,)), GenerationConfig(7, end_ids=(3, 9), temperature=1.5)]
)
def test_streamed_ids_are_those_of_the_loop(lm, settings):
    model, params = drawn(lm)
    keys = row_keys(jax.random.key(5), 3)
    read = stream.begin(model, params, PREFIX, PROMPT, MASK, settings=settings)
    ids = np.stack([token for token, _ in stream.tokens(model, params, read, settings, keys)], axis=1)
    whole = decode.with_lm(model, params, PREFIX, PROMPT, MASK, keys, settings=settings).tokens[:, 0]
    np.testing.assert_array_equal(ids, whole[:, : ids.shape[1]])
    assert (np.asarray(whole)[:, ids.shape[1] :] == 3).all(), 'the stream ends when the last text has'


@pytest.mark.parametrize('lm, words', [(LMS[0], 0), (LMS[1], 0), (LMS[0], 1), (LMS[2], 1)])
def test_a_row_is_drawn_alike_alone_unpadded_and_without_jit(lm, words):
    """A prompt of one token, and one of none: the language model then goes on from the last query."""
    model, params = drawn(lm)
    prompt, mask = PROMPT[[0, 1, 2, 0]], np.arange(4)[None] >= np.array([[0], [3], [1], [4]])
    prefix, keys = jax.tree.map(lambda x: x[np.array([0, 1, 2, 1])], PREFIX), row_keys(jax.random.key(5), 4)
    row, settings = 3 - 2 * words, GenerationConfig(3, temperature=1.5)
    batched = decode.with_lm(model, params, prefix, prompt, mask, keys, settings=settings)
    with jax.disable_jit(words > 0):
        given = prefix, prompt[:, 4 - words :], mask[:, 4 - words :], keys
        one = jax.tree.map(lambda x: x[row : row + 1], given)
        alone = decode.with_lm(model, params, *one, settings=settings)
    np.testing.assert_array_equal(alone.tokens[0], batched.tokens[row])
    np.testing.assert_allclose(alone.scores[0], batched.scores[row], rtol=1e-5)


@pytest.mark.parametrize('text', ['a red  circle', ' naïve café 你好 ', 'x', '', '🙂'])
def test_pieces_join_to_the_text_and_split_no_character(text):
    tokenizer = LmTokenizer(train_byte_bpe(['a red circle in a café'], 280))
    ids = tokenizer.ids(text)
    found = list(stream.pieces(tokenizer, ids))
    assert ''.join(found) == tokenizer.decode(ids).strip()
    assert not any('\ufffd' in piece for piece in found)


def test_a_text_that_ends_within_a_character_is_still_given_whole():
    tokenizer = LmTokenizer(train_byte_bpe(['a'], 270))
    ids = tokenizer.ids('a🙂')[:-1]
    assert ''.join(stream.pieces(tokenizer, ids)) == tokenizer.decode(ids).strip()
