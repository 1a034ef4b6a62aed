"""Weights in 8 and 4 bits: no entry moves further than it may, and everything else is as with wide ones."""

import contextlib
import dataclasses
import functools
import io
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from qformer_jax import cli, config
from qformer_jax.errors import UserError
from qformer_jax.inference import decode, quantize
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.generate import GenerationConfig, step_scores
from qformer_jax.models import blip2, quantized
from qformer_jax.models.quantized import FEW_ROWS, Quantized
from qformer_jax.rules import flatten, match
from qformer_jax.training import loop

WIDE = {'width': 32, 'depth': 2, 'heads': 4, 'mlp_width': 64}
LMS = {
    'opt': config.OptConfig(vocab_size=60, max_positions=40, **WIDE),
    'llama': config.LlamaConfig(vocab_size=60, kv_heads=2, head_width=8, **WIDE),
    't5': config.T5Config(vocab_size=60, decoder_depth=2, head_width=8, **WIDE),
}


def draw(*shape: int, seed: int = 0) -> jax.Array:
    """Return numbers whose rows differ in size by powers of ten."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_t(3, shape) * 10.0 ** rng.integers(-4, 3, (shape[0], 1))
    return jnp.asarray(numbers, jnp.float32)


@pytest.mark.parametrize('bits, inputs', [(8, 96), (8, 7), (4, 192), (4, 96), (4, 10)])
def test_no_entry_moves_by_more_than_half_a_step(bits, inputs):
    make = jax.jit(quantized.quantize, static_argnums=1)
    group = inputs if bits == 8 else np.gcd(inputs, 64)
    for seed in range(10):
        rows = draw(13, inputs, seed=seed)
        found = make(rows, bits)
        assert found.bits == bits
        step = np.abs(rows).reshape(13, -1, group).max(axis=-1) / (127.5 if bits == 8 else 7.5)
        np.testing.assert_allclose(found.scale, step, rtol=1e-6)
        moved = np.abs(found.dequantize(jnp.float32) - rows).reshape(13, -1, group)
        assert (moved <= 0.5001 * step[..., None]).all()
        assert (moved > 0.4 * step[..., None]).any()


def test_zeros_stay_zeros():
    found = quantized.quantize(jnp.zeros((3, 4)), 8)
    np.testing.assert_array_equal(found.dequantize(jnp.float32), 0)


@pytest.mark.parametrize('rows', [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize('bits', [8, 4])
def test_a_product_is_that_of_the_widened_weights(bits, rows):
    weights = quantized.quantize(draw(24, 96), bits)
    x = draw(rows, 96, seed=1)
    exact = np.asarray(x, np.float64) @ np.asarray(weights.dequantize(jnp.float32), np.float64).T
    size = np.abs(x).astype(np.float64) @ np.abs(weights.dequantize(jnp.float32)).astype(np.float64).T
    assert (np.abs(quantized.quantized_matmul(x, weights) - exact) <= 1e-6 * size).all()


def test_rows_are_taken_as_from_an_array():
    table = quantized.quantize(draw(9, 6), 8)
    ids = jnp.array([[0, 8], [3, 3]])
    np.testing.assert_array_equal(table[ids], table.dequantize(jnp.float32)[ids])


def language_model(lm) -> tuple[blip2.Blip2Module, dict]:
    model = blip2.Blip2Module(config.Blip2Config(vit=None, qformer=None, lm=lm))
    return model, jax.jit(partial(blip2.init, model))(jax.random.key(1))


@partial(jax.jit, static_argnums=0)
def write(model, params, tokens):
    """Return what is written greedily after a soft prefix, and the logits along `tokens`."""
    settings = GenerationConfig(max_new_tokens=8)
    prefix = blip2.Prefix.whole(jax.random.normal(jax.random.key(2), (6, 3, 32)))
    prompt = jnp.arange(12).reshape(6, 2) + 3
    given = prefix, prompt, jnp.ones(prompt.shape, bool)
    step, start = decode.prefill_lm(model, params, *given, settings.max_new_tokens)
    return decode.generate(step, start, settings).tokens[:, 0], step_scores(step, start, tokens, settings)


@pytest.mark.parametrize('family', LMS)
def test_greedy_words_change_only_where_two_were_nearly_equal(family):
    """Up to a row's first choice whose lead is within the noise of the two best logits, the words are float32's."""
    model, params = language_model(LMS[family])
    less = quantize.on_device(flatten(params).items(), 'int8')
    words, _ = write(model, params, jnp.zeros((6, 8), jnp.int32))
    _, scores = write(model, params, words)
    found, noisy = write(model, less, words)
    noise = jnp.abs(noisy - scores).max(axis=-1)
    best = jnp.sort(scores, axis=-1)
    sure = np.cumprod(best[..., -1] - best[..., -2] > 2 * noise, axis=1).astype(bool)
    assert noise.min() > 0 and sure.mean() > 0.4
    np.testing.assert_array_equal(np.asarray(found)[sure], np.asarray(words)[sure])


def test_a_loop_that_decodes_holds_small_weights():
    """XLA moves what does not change out of a loop; the widened weights of 64 x 32 must not be among what it keeps."""
    model, params = language_model(LMS['opt'])
    less = quantize.on_device(flatten(params).items(), 'int8')
    compiled = write.lower(model, less, jnp.zeros((6, 8), jnp.int32)).compile().as_text()
    loops = [line.split(' while(')[0] for line in compiled.splitlines() if ' while(' in line]
    kept = {shape for line in loops for shape in re.findall(r'([a-z]+\d+)\[([\d,]+)\]', line)}
    assert any(kind == 's8' and dims == '64,1,32' for kind, dims in kept)
    assert not [(kind, dims) for kind, dims in kept if kind[0] == 'f' and set(dims.split(',')) >= {'64', '32'}]


def test_what_is_small_and_what_stays(line):
    model = Blip2.load(line / 'instruct', weights='int4')
    kinds = {path: leaf.bits for path, leaf in flatten(model.params).items() if isinstance(leaf, Quantized)}
    assert kinds['lm/word_embedding'] == 8
    assert kinds['lm/layer_1/mlp/up/kernel'] == kinds['vit/layer_0/attention/query/kernel'] == 4
    assert {path.split('/')[0] for path in kinds} == {'lm', 'vit'}
    assert len(kinds) == 2 * 6 * 2 + 1 and 'vit/patch_projection/kernel' not in kinds


@functools.cache
def bytes_of(shape: tuple[int, ...], dtype: str, kind: quantize.Weights | None, transposed: bool) -> int:
    """Return the bytes of a parameter in fewer bits, without making it."""
    held = jax.ShapeDtypeStruct(shape, dtype)
    make = partial(quantize.smaller, kind=kind, transposed=transposed)
    return quantize.size({'held': jax.eval_shape(make, held) if kind else held})


def test_bytes_of_the_published_size():
    """OPT-2.7B behind ViT-g, 3.64e9 parameters in the towers, loaded in bfloat16; a Q-Former in float32."""
    shapes = flatten(blip2.shapes(config.Blip2Config(qformer=config.QformerConfig(text_side='none'))))

    def total(weights: quantize.Weights) -> float:
        kinds = match(quantize.RULES[weights], shapes)
        rows = [
            (shape.shape, 'bfloat16' if path.startswith(('vit/', 'lm/')) else 'float32', kinds[path], path)
            for path, shape in shapes.items()
        ]
        return sum(bytes_of(*row, quantize.is_kernel(path)) for *row, path in rows) / 2**30

    assert 7.1 < total('bfloat16') < 7.3
    assert 3.7 < total('int8') < 3.9  # a graphics card of 6 GB, with 4.6 GiB free, has room for the rest
    assert 2.2 < total('int4') < 2.6


def test_every_parameter_needs_a_rule():
    with pytest.raises(UserError, match="no rule matches parameter 'ear/kernel'"):
        quantize.on_device([('ear/kernel', np.ones((2, 2)))], 'int8')


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="'lm/norm/scale' holds numbers that float16 cannot"):
        quantize.on_device([('lm/norm/scale', np.full(3, 1e6, np.float32))], 'float16')
    with pytest.raises(UserError, match="'lm/up/kernel' holds numbers that int8 cannot"):
        quantize.on_device([('lm/up/kernel', np.full((3, 2), np.nan, np.float32))], 'int8')
    with pytest.raises(UserError, match="'lm/up/kernel' has 3 inputs, and 4 bits need an even number"):
        quantize.on_device([('lm/up/kernel', np.ones((3, 2), np.float32))], 'int4')


@pytest.fixture(scope='module')
def stored(line, tmp_path_factory):
    """The command's result for a run that answers, and what it printed."""
    folder, said = tmp_path_factory.mktemp('quantized') / 'small', io.StringIO()
    with contextlib.redirect_stdout(said):
        cli.run(['quantize', str(line / 'instruct'), str(folder), '--weights', 'int8'])
    return folder, said.getvalue()


def test_a_stored_run_is_the_model_that_was_stored(stored, line):
    """Bit for bit, and it answers with the same words as one that was quantized while it was loaded."""
    want = Blip2.load(line / 'instruct', weights='int8')
    found = Blip2.load(stored[0])
    assert jax.tree.structure(found.params) == jax.tree.structure(want.params)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(want.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    again = Blip2.load(line / 'instruct').quantize('int8')
    pictures = [small.draw_picture(colour, 'square') for colour in small.COLOURS]
    answers = [model.ask(pictures, ['what color is it?'] * 4) for model in (found, want, again)]
    assert answers[0] == answers[1] == answers[2] and all(answers[0])


def test_the_command_says_bytes_errors_and_the_task(stored):
    folder, said = stored
    words = ('before', 'after', 'lm_projection', 'relative rms', 'vqa on test', 'accuracy', 'perplexity of the answers')
    assert [word for word in words if word not in said] == []
    assert f'wrote {folder}' in said.replace('\n', '') and f'next: qformer caption {folder} PICTURE' in said


def test_a_quantized_run_is_neither_quantized_nor_converted_nor_trained(stored, line, tmp_path):
    folder = str(stored[0])
    for words in (
        ['quantize', folder, str(tmp_path / 'b'), '--weights', 'int4'],
        ['convert', folder, 'x', '--to', 'lavis'],
    ):
        with pytest.raises(UserError, match='holds quantized weights'):
            cli.run(words)
    with pytest.raises(UserError, match='is quantized already'):
        Blip2.load(folder, weights='int8')
    run = Blip2.load(line / 'instruct').run
    run = dataclasses.replace(run, start=config.Start(checkpoint=folder))
    with pytest.raises(UserError, match='holds quantized weights, for use only'):
        loop.train(run, tmp_path / 'run')


def test_a_tower_alone_is_not_quantized(line, tmp_path):
    with pytest.raises(UserError, match="is a 'language' run, for stages to start from"):
        cli.run(['quantize', str(line / 'language'), str(tmp_path / 'b'), '--weights', 'int8'])
