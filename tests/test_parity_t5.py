"""T5 against Hugging Face (run here); `test_verify.py` has stage 2 on top of it against LAVIS."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, assert_gradients_close

from qformer_jax import config
from qformer_jax.convert.lazy_tensors import in_memory
from qformer_jax.convert.t5 import T5 as TABLE
from qformer_jax.convert.table import convert, to_jax, to_torch
from qformer_jax.inference import decode
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.models import blip2, kv_cache
from qformer_jax.models.t5 import START_ID, T5, distance_buckets, relative_bias, shift_right
from qformer_jax.objectives import captioning
from qformer_jax.rules import flatten

TINY = config.T5Config(
    vocab_size=50, width=24, depth=2, decoder_depth=2, heads=3, head_width=10, mlp_width=40, buckets=8, max_distance=20
)
DRAW = np.random.default_rng(0)
READS = DRAW.integers(3, 50, size=(3, 15)).astype(np.int32)
LEFT = np.arange(15)[None] >= np.array([[0], [2], [11]])  # the encoder's rows: 15, 13 and 4 tokens, padding on the left
WRITES = DRAW.integers(3, 50, size=(3, 11)).astype(np.int32)
RIGHT = np.arange(11)[None] < np.array([[11], [8], [3]])  # what the decoder writes, padding on the right


@pytest.fixture(scope='module')
def torch():
    return pytest.importorskip('torch', reason='the oracle is PyTorch')


def hugging_face(torch, activation: str):
    transformers = pytest.importorskip('transformers', reason='the oracle is Hugging Face')
    c = transformers.T5Config(
        vocab_size=50,
        d_model=24,
        d_kv=10,
        d_ff=40,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj='gated-gelu',
        decoder_start_token_id=0,
        tie_word_embeddings=False,  # transformers 5.x then does not scale the output, but ties the tables all the same
    )
    c.dense_act_fn = activation
    c._attn_implementation = 'eager'
    model = transformers.T5ForConditionalGeneration(c).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(50, 24))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # ones would hide a wrong norm
            noise = torch.randn(parameter.shape, generator=generator)
            small = (
                0.06 if name.endswith('.q.weight') else 0.2
            )  # without scaling, larger ones would sharpen the softmax
            parameter.copy_(0.2 * noise + 1 if parameter.ndim == 1 else small * noise)
    return model


@pytest.fixture(scope='module')
def hf_model(torch):
    return hugging_face(torch, 'gelu')


def as_ours(model) -> dict:
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    shapes = blip2.shapes(config.Blip2Config(vit=None, qformer=None, lm=TINY))
    return jax.tree.map(jnp.asarray, convert(TABLE, state, shapes)['lm'])


@pytest.fixture(scope='module')
def params(hf_model):
    return as_ours(hf_model)


@functools.partial(jax.jit, static_argnames=('c', 'dtype'))
def logits(params, read=READS, token_mask=LEFT, c=TINY, dtype=jnp.float32):
    def run(model):
        memory = model.encode(model.embed(read), token_mask)
        return model.word_logits(model.decode(model.embed(shift_right(WRITES, RIGHT)), RIGHT, memory).hidden)

    return T5(c, dtype).apply({'params': params}, method=run)


def their_logits(torch, model):
    ids, mask, labels = (torch.tensor(x).long() for x in (READS, LEFT, np.where(RIGHT, WRITES, -100)))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, labels=labels).logits.numpy()


def test_logits_of_padded_batches_equal_hugging_face(torch, hf_model, params):
    assert_close(np.asarray(logits(params))[RIGHT], their_logits(torch, hf_model)[RIGHT])


def test_both_gelus_equal_hugging_face(torch, hf_model, params):
    tanh = hugging_face(torch, 'gelu_new')
    want = their_logits(torch, tanh)[RIGHT]
    got = logits(as_ours(tanh), c=dataclasses.replace(TINY, activation='gelu_tanh'))
    assert_close(np.asarray(got)[RIGHT], want)
    assert np.abs(np.asarray(logits(params))[RIGHT] - want).max() > 3e-5  # the two can be told apart


def test_loss_and_input_gradient_equal_hugging_face(torch, hf_model, params):
    embedded = hf_model.get_input_embeddings()(torch.tensor(READS).long()).detach().requires_grad_(True)
    labels = torch.tensor(np.where(RIGHT, WRITES, -100)).long()
    want = hf_model(inputs_embeds=embedded, attention_mask=torch.tensor(LEFT).long(), labels=labels).loss
    want.backward()

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        def run(model):
            memory = model.encode(x, LEFT)
            return model.word_logits(model.decode(model.embed(shift_right(WRITES, RIGHT)), RIGHT, memory).hidden)

        token_losses = captioning.token_losses(T5(TINY).apply({'params': params}, method=run), WRITES)
        return captioning.token_mean(token_losses, RIGHT)

    value, gradient = loss(jnp.asarray(embedded.detach().numpy()))
    assert_close(value, want.detach())
    assert_gradients_close({'x': gradient}, {'x': embedded.grad.numpy()})


def test_the_table_writes_what_it_read(hf_model, params):
    state = {key: value.numpy() for key, value in hf_model.state_dict().items()}
    back = to_torch(TABLE, in_memory(flatten({'lm': jax.tree.map(np.asarray, params)})))
    assert back.keys() == state.keys()
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor.read(), state[key], key)


def test_the_bias_that_early_files_hold_for_cross_attention_is_not_read(hf_model, params):
    state = {key: value.numpy() for key, value in hf_model.state_dict().items()}
    surplus = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
    found = to_jax(TABLE, in_memory(state | {surplus: np.ones((8, 3), np.float32)}))
    assert found.keys() == flatten({'lm': params}).keys()


@pytest.mark.parametrize('buckets, max_distance', [(32, 128), (8, 20), (16, 64), (64, 256), (12, 100)])
@pytest.mark.parametrize('both_sides', [True, False])
def test_every_distance_falls_into_hugging_faces_bucket(torch, buckets, max_distance, both_sides):
    t5 = pytest.importorskip('transformers.models.t5.modeling_t5', reason='the oracle is Hugging Face')
    query_position, key_position = np.array([[300]]), np.arange(601)[None]
    want = t5.T5Attention._relative_position_bucket(
        torch.arange(-300, 301), bidirectional=both_sides, num_buckets=buckets, max_distance=max_distance
    )
    table = jnp.arange(buckets, dtype=jnp.float32)[:, None]
    got = relative_bias(table, query_position, key_position, max_distance, both_sides=both_sides)
    np.testing.assert_array_equal(got[0, 0, 0], want.numpy())


def test_buckets_widen_with_the_distance():
    """The worked example of the docstring, and what makes a bucket a bucket."""
    small = distance_buckets(8, 20)
    assert small.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7]
    published = distance_buckets(32, 128)
    assert set(np.diff(published)) == {0, 1} and published[-1] == 31


def test_cache_equals_no_cache(params):
    """Three tokens in one call, then one by one and two at once, in a cache with slots to spare."""

    def run(model):
        memory = model.encode(model.embed(READS), LEFT)
        cache, pieces, ids = kv_cache.empty(TINY, 3, 14, jnp.float32), [], shift_right(WRITES, RIGHT)
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 7), (7, 11)):
            out = model.decode(model.embed(ids[:, start:end]), RIGHT[:, start:end], memory, cache)
            cache = out.cache
            pieces.append(model.word_logits(out.hidden))
        return jnp.concatenate(pieces, axis=1), cache.end

    stepwise, end = jax.jit(lambda params: T5(TINY).apply({'params': params}, method=run))(params)
    assert end == 11
    assert_close(np.asarray(stepwise)[RIGHT], np.asarray(logits(params))[RIGHT])


def test_the_decoder_reads_nothing_later_and_the_encoder_everything(params):
    whole = np.ones((1, 6), bool)

    def hidden(read, written):
        def run(model):
            memory = model.encode(read, whole)
            return memory.hidden, model.decode(written, whole, memory).hidden

        return T5(TINY).apply({'params': params}, method=run)

    read, written = params['word_embedding'][READS[:1, :6]], params['word_embedding'][WRITES[:1, :6]]
    (encoder, _), (cross, causal) = jax.jit(jax.jacobian(hidden, argnums=(0, 1)))(read, written)
    encoder, cross, causal = (np.abs(x).sum(axis=(0, 2, 3, 5)) for x in (encoder, cross, causal))
    assert (encoder > 0).all() and (cross > 0).all()
    assert (np.triu(causal, 1) == 0).all() and (causal[np.tril_indices(6)] > 0).all()


@pytest.mark.parametrize('beams', [1, 3])
def test_searches_write_hugging_faces_ids(torch, hf_model, params, beams):
    """Texts of several lengths, from encoder rows of several lengths."""
    ends = (48, 43)
    found = hf_model.generate(
        torch.tensor(READS).long(), attention_mask=torch.tensor(LEFT).long(), num_beams=beams,
        num_return_sequences=beams, max_new_tokens=8, do_sample=False, eos_token_id=list(ends), pad_token_id=ends[0],
    )  # fmt: skip
    want = found.numpy()[:, 1:]  # without the start token
    model = blip2.Blip2Module(config.Blip2Config(vit=None, qformer=None, lm=TINY))
    settings = GenerationConfig(8, num_beams=beams, num_return=beams, length_rule='generated', end_ids=ends)
    prefix = blip2.Prefix.whole(np.zeros((3, 0, TINY.width), np.float32))
    computed = decode.with_lm(model, {'lm': params}, prefix, READS, LEFT, settings=settings).tokens
    np.testing.assert_array_equal(np.asarray(computed).reshape(-1, 8), want)
    assert (want == ends[0]).any() and not np.isin(want, ends).any(axis=1).all()


def test_where_the_padding_stands_does_not_matter(params):
    """Holes do not count as positions: on the left, on the right or in the middle of the encoder's row."""
    for token_mask in (LEFT[:, ::-1], np.roll(LEFT, 5, axis=1)):
        ids = np.zeros_like(READS)
        ids[token_mask] = READS[LEFT]
        assert_close(np.asarray(logits(params, ids, token_mask))[RIGHT], np.asarray(logits(params))[RIGHT])


def test_float64_stays_float64(params):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
        got = logits(wide, dtype=jnp.float64)
        assert got.dtype == jnp.float64
    assert_close(np.asarray(got)[RIGHT], np.asarray(logits(params))[RIGHT])


def test_shift_right_starts_where_the_targets_start():
    text, target = np.array([[7, 8, 9, 5]]), np.array([[False, True, True, False]])
    assert shift_right(text, target).tolist() == [[START_ID, START_ID, 8, 9]]
