"""OPT against Hugging Face (run here); `test_verify.py` has stage 2 on top of it against LAVIS."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, assert_gradients_close

from qformer_jax import config
from qformer_jax.convert import huggingface_config, opt
from qformer_jax.convert.lazy_tensors import in_memory, read_all
from qformer_jax.convert.table import convert
from qformer_jax.inference import decode
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.models import blip2, kv_cache
from qformer_jax.models.opt import Opt
from qformer_jax.objectives import captioning

TINY = config.OptConfig(vocab_size=50, width=24, depth=2, heads=3, mlp_width=40, max_positions=20)
LIKE_350M = dataclasses.replace(TINY, embed_width=16, norm_first=False)
IDS = np.random.default_rng(0).integers(3, 50, size=(3, 7)).astype(np.int32)
LEFT = np.arange(7)[None] >= np.array([[0], [2], [5]])  # rows with 7, 5 and 2 tokens, padding on the left


def made(size):
    """Return their model of this size, no weight of which is one or zero."""
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    transformers = pytest.importorskip('transformers', reason='the oracle is Hugging Face')
    c = transformers.OPTConfig(**huggingface_config.of_language_model(size))
    model = transformers.OPTForCausalLM(c).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # ones and zeros would hide a wrong norm or bias
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


def converted(hf_model, size):
    state = {key: value.numpy() for key, value in hf_model.state_dict().items()}
    shapes = blip2.shapes(config.Blip2Config(vit=None, qformer=None, lm=size))
    return jax.tree.map(jnp.asarray, convert(opt.opt(size), state, shapes)['lm'])


@pytest.fixture(scope='module')
def hf_model():
    return made(TINY)


@pytest.fixture(scope='module')
def params(hf_model):
    return converted(hf_model, TINY)


def test_projected_tokens_and_norms_behind_the_branches_equal_hugging_face():
    """OPT-350M alone has both: logits of a padded batch, and what it writes with its cache."""
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    hf_model = made(LIKE_350M)
    assert huggingface_config.language_model_of(hf_model.config.to_dict()) == LIKE_350M
    params = converted(hf_model, LIKE_350M)
    batch = {'input_ids': torch.tensor(IDS).long(), 'attention_mask': torch.tensor(LEFT).long()}
    with torch.no_grad():
        want = hf_model(**batch).logits.numpy()
        ids = hf_model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=1)
    assert_close(np.asarray(logits(params, IDS, LEFT, LIKE_350M))[LEFT], want[LEFT])
    computed = written(params, GenerationConfig(8, 8, end_ids=(1,)), size=LIKE_350M).tokens[:, 0]
    np.testing.assert_array_equal(computed, ids[:, IDS.shape[1] :].numpy())


def test_a_file_of_the_model_without_its_head_is_read(hf_model, params):
    state = {key: value.numpy() for key, value in hf_model.model.state_dict().items()}  # decoder.layers.0...
    state = read_all(opt.plain(in_memory(state | {'decoder.version': np.ones(1)}), {}))
    again = convert(opt.opt(TINY), state, blip2.shapes(config.Blip2Config(vit=None, qformer=None, lm=TINY)))['lm']
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


@functools.partial(jax.jit, static_argnames='size')
def logits(params, ids, token_mask, size=TINY):
    def run(model):
        return model.word_logits(model(model.embed(ids), token_mask).hidden)

    return Opt(size).apply({'params': params}, method=run)


def test_logits_of_a_left_padded_batch_equal_hugging_face(hf_model, params):
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    with torch.no_grad():
        want = hf_model(input_ids=torch.tensor(IDS).long(), attention_mask=torch.tensor(LEFT).long()).logits.numpy()
    assert_close(np.asarray(logits(params, IDS, LEFT))[LEFT], want[LEFT])


def test_loss_and_input_gradient_equal_hugging_face(hf_model, params):
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
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

        token_losses = captioning.token_losses(Opt(TINY).apply({'params': params}, method=run)[:, :-1], IDS[:, 1:])
        return captioning.token_mean(token_losses, counts)

    value, gradient = loss(jnp.asarray(embedded.detach().numpy()))
    assert_close(value, want.detach())
    assert_gradients_close({'x': gradient}, {'x': embedded.grad.numpy()})


def test_cache_equals_no_cache(params):
    """Prompt of 3 in one call, then token by token, in a cache with slots to spare."""

    def run(model):
        cache, pieces = kv_cache.empty(TINY, 3, 10, jnp.float32), []
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 7)):
            out = model(model.embed(IDS[:, start:end]), LEFT[:, start:end], cache)
            cache = out.cache
            pieces.append(model.word_logits(out.hidden))
        return jnp.concatenate(pieces, axis=1), cache.end

    stepwise, end = jax.jit(lambda params: Opt(TINY).apply({'params': params}, method=run))(params)
    assert end == 7
    assert_close(np.asarray(stepwise)[LEFT], np.asarray(logits(params, IDS, LEFT))[LEFT], 3e-6)


def test_no_position_reads_a_later_one(params):
    def hidden(x):
        return Opt(TINY).apply({'params': params}, x, np.ones((1, 7), bool)).hidden

    x = params['word_embedding'][IDS[:1]]
    moves = jnp.abs(jax.jit(jax.jacobian(hidden))(x)).sum(axis=(0, 2, 3, 5))  # [position that reads, position read]
    assert (np.triu(moves, 1) == 0).all()
    assert (np.asarray(moves)[np.tril_indices(7)] > 0).all()


def test_the_side_of_the_padding_does_not_matter(params):
    right = LEFT[:, ::-1]
    ids = np.zeros_like(IDS)
    ids[right] = IDS[LEFT]
    assert_close(np.asarray(logits(params, ids, right))[right], np.asarray(logits(params, IDS, LEFT))[LEFT], 3e-6)


def written(params, settings, rows=slice(None), size=TINY):
    """Write after the left-padded prompts, without a picture."""
    model = blip2.Blip2Module(config.Blip2Config(vit=None, qformer=None, lm=size))
    prefix = blip2.Prefix.whole(np.zeros((len(IDS[rows]), 0, size.input_width), np.float32))
    return decode.with_lm(model, {'lm': params}, prefix, IDS[rows], LEFT[rows], settings=settings)


@pytest.mark.parametrize('penalty, ends, repetition', [(1.0, (7,), 1.0), (-2.0, (7, 11), 1.0), (0.5, (7,), 1.3)])
def test_beams_equal_hugging_face(hf_model, params, penalty, ends, repetition):
    """Texts of several lengths after prompts of several lengths; their repetition penalty counts padding as said."""
    torch = pytest.importorskip('torch', reason='the oracle is PyTorch')
    rows = slice(None) if repetition == 1 else slice(0, 1)
    found = hf_model.generate(
        input_ids=torch.tensor(IDS[rows]).long(),
        attention_mask=torch.tensor(LEFT[rows]).long(),
        num_beams=3,
        num_return_sequences=2,
        min_new_tokens=2,
        max_new_tokens=9,
        length_penalty=penalty,
        repetition_penalty=repetition,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    settings = GenerationConfig(9, 2, 3, 2, penalty, repetition, 'generated', ends)
    computed = written(params, settings, rows)
    want = found.sequences[:, IDS.shape[1] :].numpy()
    want = np.pad(want, ((0, 0), (0, 9 - want.shape[1])), constant_values=ends[0])
    np.testing.assert_array_equal(computed.tokens.reshape(-1, 9), want)
    assert_close(computed.scores.reshape(-1), found.sequences_scores)


@pytest.mark.parametrize('beams', [1, 3])
def test_neighbours_and_their_padding_do_not_change_a_text(params, beams):
    settings = GenerationConfig(8, num_beams=beams, num_return=beams, repetition_penalty=1.2, end_ids=(7,))
    batched = written(params, settings)
    for row in range(3):
        alone = written(params, settings, slice(row, row + 1))
        np.testing.assert_array_equal(alone.tokens[0], batched.tokens[row])
        assert_close(alone.scores[0], batched.scores[row], 3e-6)
