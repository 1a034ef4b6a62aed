"""Gated cross-attention inside a frozen decoder: closed it is the decoder, open it reads the latest image."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from test_chat import talk
from test_lm_families import LLAMA

from qformer_jax import config
from qformer_jax.convert import published
from qformer_jax.data.dataset import Dataset
from qformer_jax.errors import UserError
from qformer_jax.export import runner
from qformer_jax.export.artifacts import write
from qformer_jax.inference import chat, decode, rank
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.models import blip2, kv_cache, masks
from qformer_jax.rules import flatten, unflatten
from qformer_jax.runs import run_dir
from qformer_jax.training import loop

GATES = config.GatesConfig(every=2, heads=2, mlp_width=16)
LMS = {'opt': dataclasses.replace(small.OPT, depth=3, vocab_size=50), 'llama': dataclasses.replace(LLAMA, depth=3)}
FAMILIES = list(LMS)
DRAW = np.random.default_rng(0)
TEXT = DRAW.integers(3, 50, (2, 6))
HERE = np.arange(6)[None] >= np.array([[0], [2]])  # left-padded
MEDIA = DRAW.standard_normal((2, 6, 16), dtype=np.float32)  # three images of two vectors each
EXISTS = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]], bool)
PREFIX = blip2.Prefix(jnp.asarray(MEDIA), jnp.asarray(EXISTS))


def network(family: str, gates: config.GatesConfig | None = GATES) -> tuple[blip2.Blip2Module, dict]:
    """Return a model without anything before its gates, all parameters random."""
    made = blip2.Blip2Module(config.Blip2Config(vit=None, qformer=None, lm=LMS[family], gates=gates))
    draw = np.random.default_rng(1)
    shapes = sorted(flatten(blip2.shapes(made.config)).items())
    flat = {path: jnp.float32(draw.standard_normal(x.shape) / 3) for path, x in shapes if not path.startswith('gates')}
    flat |= {path: jnp.float32(draw.standard_normal(x.shape) / 3) for path, x in shapes if path.startswith('gates')}
    return made, unflatten(flat)


def hidden(made, params, media=MEDIA, media_mask=None):
    """Return the hidden states of TEXT."""

    def run(made):
        projected = made.gates.project(media, EXISTS)
        return made.lm_forward(made.lm.embed(TEXT), HERE, media=projected, media_mask=media_mask).hidden

    return made.apply({'params': params}, method=run)


@pytest.mark.parametrize('family', FAMILIES)
def test_closed_gates_change_no_bit_and_are_the_first_to_learn(family):
    made, params = network(family)
    fresh = {path: x for path, x in flatten(blip2.init(made, jax.random.key(0))['gates']).items() if 'gate' in path}
    assert len(fresh) == 4 and not any(x.any() for x in fresh.values())
    closed = unflatten(flatten(params) | {f'gates/{path}': x for path, x in fresh.items()})
    plain, _ = network(family, None)
    want = plain.apply({'params': params}, method=lambda m: m.lm(m.lm.embed(TEXT), HERE).hidden)
    np.testing.assert_array_equal(hidden(made, closed), want)
    assert np.abs(hidden(made, params) - want)[HERE].max() > 1e-2
    loss = lambda gates: jnp.sin(hidden(made, closed | {'gates': gates})).sum()  # noqa: E731
    moved = {path: bool(jnp.abs(g).max() > 0) for path, g in flatten(jax.grad(loss)(closed['gates'])).items()}
    assert moved == {path: path.endswith('_gate') for path in moved}


@pytest.mark.parametrize('family', FAMILIES)
def test_a_cache_changes_nothing(family):
    """Prompts padded at their left, then token by token; media are projected once, and stay."""
    made, params = network(family)
    prompt, real = jnp.asarray(TEXT[:, :3]), jnp.asarray(HERE[:, :3])
    step, begun = decode.prefill_lm(made, params, PREFIX, prompt, real, 4)
    logits, cache = [begun.logits], begun.cache
    for token in TEXT[:, 3:].T:
        more, cache = step(cache, jnp.asarray(token))
        logits.append(more)
    chex.assert_trees_all_equal(cache.media, begun.cache.media)
    want = made.apply({'params': params}, hidden(made, params), method=lambda m, h: m.lm.word_logits(h))[:, 2:]
    np.testing.assert_allclose(np.stack(logits, axis=1), want, atol=1e-5)
    assert cache.valid.shape[1] == 3 + 4 - 1, 'no slot is taken by the picture'
    candidates = jnp.asarray(TEXT[:, None, 3:5])
    ranked = rank.scores(made, params, PREFIX, prompt, real, candidates, candidates > 0, rows_at_once=4)
    log_p = jax.nn.log_softmax(want[:, :2])
    np.testing.assert_allclose(ranked[:, 0], np.take_along_axis(log_p, TEXT[:, 3:5, None], 2).sum((1, 2)), atol=1e-5)


def test_the_mask_of_the_latest_image():
    marks = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]], bool)
    image = masks.images_so_far(marks)
    assert image.tolist() == [[-1, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    media_mask = np.array([[[1, 1], [1, 1]], [[1, 0], [1, 1]]], bool)
    drawn = ['....', 'xx..', 'xx..', '..xx', '..xx'], ['x...', 'x...', 'x...', 'x...', '..xx']
    got = masks.latest_image(image, media_mask)[:, 0]
    assert [[''.join('x' if x else '.' for x in row) for row in rows] for rows in got.tolist()] == list(drawn)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_token_reads_the_latest_image_and_before_any_nothing(family):
    """By gradient, with one gated layer: through more, what a token sees comes by the tokens before it too."""
    made, params = network(family, dataclasses.replace(GATES, every=3))
    image = np.array([[-1, 0, 0, 1, 2, 2], [0, 0, -1, -1, 1, 1]])
    media_mask = masks.latest_image(jnp.asarray(image), EXISTS.reshape(2, 3, 2))
    gate = made.bind({'params': params}).gates

    def read(media):
        layer = gate.pre_block_hooks(gate.project(media, jnp.asarray(EXISTS)), media_mask)[0]
        return layer(jnp.asarray(MEDIA)).sum(axis=-1)  # any hidden states [2, 6, 16]

    reached = jnp.abs(jax.jacobian(read)(jnp.asarray(MEDIA))).sum(axis=-1) > 0
    reached = np.stack([reached[row, :, row] for row in (0, 1)])
    np.testing.assert_array_equal(reached, media_mask[:, 0])
    assert not reached[0, 0].any() and not reached[1, 2:4].any()


@pytest.mark.parametrize('family', FAMILIES)
def test_interleaved_images_with_a_cache(family):
    """A text in which two images stand: what comes after the cache reads the last one."""
    made, params = network(family)
    image = jnp.asarray(np.array([[-1, 0, 0, 1, 1, 1], [0, 0, 0, 2, 2, 2]]))
    media_mask = masks.latest_image(image, EXISTS.reshape(2, 3, 2))
    empty = kv_cache.empty(LMS[family], 2, 6, jnp.float32)

    def in_two(made):
        x, real, media = made.lm.embed(TEXT), jnp.asarray(HERE), made.gates.project(MEDIA, EXISTS)
        first = made.lm_forward(x[:, :4], real[:, :4], empty, media, media_mask[:, :, :4])
        return jnp.concatenate([first.hidden, made.lm_forward(x[:, 4:], real[:, 4:], first.cache).hidden], axis=1)

    got = made.apply({'params': params}, method=in_two)
    np.testing.assert_allclose(got[HERE], hidden(made, params, media_mask=media_mask)[HERE], atol=1e-5)


@pytest.fixture(scope='module')
def trained(line, pictures, tmp_path_factory) -> Blip2:
    """A run whose gates learned beside a language model that was trained without them."""
    run = small.recipe('instruct', pictures, steps=100)
    run = small.change(run, 'model', gates=dataclasses.replace(GATES, every=1))
    run = small.change(run, 'data', caption_prompt=('it is',))
    starts = config.Start(checkpoint=str(line / 'stage1'), lm=str(line / 'language'))
    run = dataclasses.replace(run, start=starts)
    folder = small.made_once(tmp_path_factory, 'gated', lambda folder: loop.train(run, folder / 'run')) / 'run'
    assert run_dir.finished(folder).last['lm'] == run_dir.finished(line / 'language').last['lm']
    return small.roomy(Blip2.load(folder))


def test_everything_that_writes_goes_through_gates(trained, pictures, tmp_path):
    """Greedy, beams, streamed, ranked, in a dialogue and exported: what the picture shows, whatever the padding."""
    records = list(Dataset.open(pictures).source('test'))
    encoded, questions = trained.encode_queries([r.model_input for r in records]), [r.questions[0] for r in records]
    answers = trained.ask(encoded, questions)
    assert sum(a == r.answers[0][0] for a, r in zip(answers, records, strict=True)) >= 5
    (prompt,) = trained.question_prompts(questions[:1])
    short = GenerationConfig(max_new_tokens=4)
    assert ''.join(trained.stream(records[3].image, prompt, short)) == answers[3]
    ranked = trained.rank(encoded, questions, answers[:1])
    losses, target = trained.losses(encoded, [prompt] * 8, answers[:1] * 8)
    np.testing.assert_allclose(-(losses * target).sum(axis=1), ranked[:, 0], atol=1e-4)
    beams = trained.generate(encoded, [prompt] * 8, dataclasses.replace(short, num_beams=2))
    greedy = trained.generate(encoded, [prompt] * 8, short)
    assert all(two.score >= one.score - 1e-4 for two, one in zip(beams, greedy, strict=True))
    dialogue = talk(trained, chat.start(trained, records[0].image), questions[0], short)
    dialogue = talk(trained, chat.add_picture(trained, dialogue, records[3].image), questions[0], short)
    alone = talk(trained, chat.start(trained, records[3].image), questions[0], short)
    chex.assert_trees_all_equal(dialogue.cache.media, alone.cache.media)
    write(trained, tmp_path / 'out', 'mark')
    (tmp_path / 'picture.png').write_bytes(records[3].image)
    assert runner.Served(tmp_path / 'out').write(tmp_path / 'picture.png', questions[3]) == answers[3]
    with pytest.raises(UserError, match=r"Hugging Face's BLIP-2 has no place for model.gates: .* run of this package"):
        published.for_huggingface(trained.run.model, False)


@pytest.mark.parametrize(
    'stage, changes, says',
    [
        ('stage2', {'lm': config.T5Config()}, 'model.gates stand between the blocks of a decoder, .* and this is T5'),
        ('stage2', {'gates': config.GatesConfig(heads=3)}, r'heads is 3, and must divide the language model'),
        ('stage1', {}, r"model.gates read pictures in 'stage2' and 'instruct', not in 'stage1'"),
    ],
)
def test_what_gates_cannot_do_is_refused(stage, changes, says):
    run = small.recipe(stage, 'nowhere')
    with pytest.raises(UserError, match=says):
        loop.check(small.change(run, 'model', **{'gates': GATES} | changes))
