"""Llama against Hugging Face (run here): grouped heads, tied and untied, padding anywhere, and the tables."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, assert_gradients_close

from qformer_jax import config
from qformer_jax.convert import huggingface_config
from qformer_jax.convert.lazy_tensors import in_memory, read_all
from qformer_jax.convert.llama import gguf, llama
from qformer_jax.convert.table import convert, to_torch
from qformer_jax.inference import decode
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.models import blip2, kv_cache
from qformer_jax.models.llama import Llama
from qformer_jax.objectives import captioning
from qformer_jax.rules import flatten

UNTIED = config.LlamaConfig(
    vocab_size=50,
    width=24,
    depth=2,
    heads=6,
    kv_heads=2,
    head_width=10,  # not width / heads: a head's width is a choice of its own
    mlp_width=40,
    max_positions=64,
    rope_base=30.0,
    norm_eps=1e-5,
)
TIED = dataclasses.replace(UNTIED, tied=True)
IDS = np.random.default_rng(0).integers(3, 50, size=(3, 13)).astype(np.int32)
LEFT = np.arange(13)[None] >= np.array([[0], [4], [10]])  # rows with 13, 9 and 3 tokens, padding on the left


def hugging_face(c: config.LlamaConfig):
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    transformers = pytest.importorskip('transformers', reason='the oracle is Hugging Face')
    hf_model = huggingface_config.of_language_model(c) | {'attn_implementation': 'eager'}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_model)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # ones would hide a wrong norm
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


def state_of(model) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.state_dict().items()}


@pytest.fixture(scope='module', params=[UNTIED, TIED], ids=['untied', 'tied'])
def pair(request):
    """Return a configuration, Hugging Face's model of it, and its parameters as ours."""
    c = request.param
    model = hugging_face(c)
    shapes = blip2.shapes(config.Blip2Config(vit=None, qformer=None, lm=c))
    return c, model, jax.tree.map(jnp.asarray, convert(llama(c), state_of(model), shapes)['lm'])


@functools.partial(jax.jit, static_argnames=('c', 'dtype'))
def logits(params, c, ids=IDS, token_mask=LEFT, dtype=jnp.float32):
    def run(model):
        return model.word_logits(model(model.embed(ids), token_mask).hidden)

    return Llama(c, dtype).apply({'params': params}, method=run)


def test_logits_of_a_left_padded_batch_equal_hugging_face(pair):
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    c, hf_model, params = pair
    with torch.no_grad():
        want = hf_model(input_ids=torch.tensor(IDS).long(), attention_mask=torch.tensor(LEFT).long()).logits.numpy()
    assert_close(np.asarray(logits(params, c))[LEFT], want[LEFT])


def test_loss_and_input_gradient_equal_hugging_face(pair):
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    c, hf_model, params = pair
    embedded = hf_model.get_input_embeddings()(torch.tensor(IDS).long()).detach().requires_grad_(True)
    counts = LEFT[:, 1:] & LEFT[:, :-1]  # what a padding position predicts means nothing on either side
    labels = torch.tensor(np.pad(np.where(counts, IDS[:, 1:], -100), ((0, 0), (1, 0)))).long()
    want = hf_model(inputs_embeds=embedded, attention_mask=torch.tensor(LEFT).long(), labels=labels).loss
    want.backward()

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        def run(model):
            return model.word_logits(model(x, LEFT).hidden)

        token_losses = captioning.token_losses(Llama(c).apply({'params': params}, method=run)[:, :-1], IDS[:, 1:])
        return captioning.token_mean(token_losses, counts)

    value, gradient = loss(jnp.asarray(embedded.detach().numpy()))
    assert_close(value, want.detach())
    assert_gradients_close({'x': gradient}, {'x': embedded.grad.numpy()})


def test_the_table_writes_what_it_read(pair):
    c, hf_model, params = pair
    back = read_all(to_torch(llama(c), in_memory(flatten({'lm': jax.tree.map(np.asarray, params)}))))
    state = state_of(hf_model)
    assert back.keys() == state.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key], key)


def test_config_json_there_and_back(pair):
    c, hf_model, _ = pair
    assert huggingface_config.language_model_of(huggingface_config.of_language_model(c)) == c
    assert huggingface_config.language_model_of(hf_model.config.to_dict()) == c


def test_the_table_of_gguf_undoes_llama_cpps_order():
    """Row 2 j of a head there is row j here, row 2 j + 1 is row j + K / 2, as the module's drawing says."""
    c = dataclasses.replace(UNTIED, heads=2, kv_heads=1, head_width=6, width=5)
    drawn = np.array([0, 3, 1, 4, 2, 5])
    query = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)  # Hugging Face's
    stored = in_memory({'lm/layer_0/attention/query/kernel': query.T, 'lm/layer_0/attention/key/kernel': query[:6].T})
    written = read_all(to_torch(gguf(c), stored))
    np.testing.assert_array_equal(written['blk.0.attn_q.weight'], query[np.concatenate([drawn, 6 + drawn])])
    np.testing.assert_array_equal(written['blk.0.attn_k.weight'], query[:6][drawn])


def test_both_tables_hold_the_same_model(pair):
    c, _, params = pair
    shapes = blip2.shapes(config.Blip2Config(vit=None, qformer=None, lm=c))
    there = read_all(to_torch(gguf(c), in_memory(flatten({'lm': jax.tree.map(np.asarray, params)}))))
    back = convert(gguf(c), there, shapes)['lm']
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_cache_equals_no_cache(pair):
    """Three tokens in one call, then one by one and two at once, in a cache with slots to spare."""
    c, _, params = pair

    def run(model):
        cache, pieces = kv_cache.empty(c, 3, 16, jnp.float32), []
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 7), (7, 13)):
            out = model(model.embed(IDS[:, start:end]), LEFT[:, start:end], cache)
            cache = out.cache
            pieces.append(model.word_logits(out.hidden))
        return jnp.concatenate(pieces, axis=1), cache.end

    stepwise, end = jax.jit(lambda params: Llama(c).apply({'params': params}, method=run))(params)
    assert end == 13
    assert_close(np.asarray(stepwise)[LEFT], np.asarray(logits(params, c))[LEFT])


@pytest.mark.parametrize('beams', [1, 3])
def test_searches_write_hugging_faces_ids(pair, beams):
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    c, hf_model, params = pair
    want = hf_model.generate(
        torch.tensor(IDS).long(), attention_mask=torch.tensor(LEFT).long(), num_beams=beams, num_return_sequences=beams,
        max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = blip2.Blip2Module(config.Blip2Config(vit=None, qformer=None, lm=c))
    settings = GenerationConfig(max_new_tokens=8, num_beams=beams, num_return=beams)
    nothing = blip2.Prefix.whole(jnp.zeros((3, 0, c.width)))
    written = decode.with_lm(model, {'lm': params}, nothing, IDS, LEFT, settings=settings)
    np.testing.assert_array_equal(np.asarray(written.tokens).reshape(-1, 8), want.numpy()[:, 13:])


def test_no_position_reads_a_later_one(pair):
    c, _, params = pair

    def hidden(x):
        return Llama(c).apply({'params': params}, x, np.ones((1, 6), bool)).hidden

    moves = jnp.abs(jax.jit(jax.jacobian(hidden))(params['word_embedding'][IDS[:1, :6]])).sum(axis=(0, 2, 3, 5))
    assert (np.triu(moves, 1) == 0).all()
    assert (np.asarray(moves)[np.tril_indices(6)] > 0).all()


def test_where_the_padding_stands_does_not_matter(pair):
    """Holes do not count as positions: on the left, on the right or in the middle of a row."""
    c, _, params = pair
    for token_mask in (LEFT[:, ::-1], np.roll(LEFT, 5, axis=1)):
        where = np.argsort(~token_mask, axis=1, kind='stable')  # the real slots of a row, in their order
        ids = np.zeros_like(IDS)
        for row in range(3):
            ids[row, where[row][: LEFT[row].sum()]] = IDS[row][LEFT[row]]
        assert_close(np.asarray(logits(params, c, ids, token_mask))[token_mask], np.asarray(logits(params, c))[LEFT])


def test_bfloat16_turns_in_float32_and_gives_float32_logits(pair):
    c, _, params = pair
    narrow = logits(params, c, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.float32
    assert_close(np.asarray(narrow)[LEFT], np.asarray(logits(params, c))[LEFT], 0.03)
