"""Candidates ranked over a shared prefix: what each costs alone, whoever stands beside it."""

import dataclasses

import jax
import numpy as np
import pytest
import small

from qformer_jax import cli, config
from qformer_jax.errors import UserError
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.models import blip2

LLAMA = config.LlamaConfig(width=16, depth=1, heads=4, kv_heads=2, head_width=4, mlp_width=32, max_positions=40)
T5 = config.T5Config(
    width=16, depth=1, decoder_depth=1, heads=2, head_width=8, mlp_width=32, buckets=8, max_distance=20
)
QUESTIONS = ['what color is it?', 'is it red?', 'is it red? is it blue?']
CANDIDATES = ['yes', 'a red square or a blue circle', 'no']


@pytest.fixture(scope='module')
def drawn():
    return [small.draw_picture(*kind) for kind in (('red', 'square'), ('blue', 'circle'), ('green', 'square'))]


@pytest.fixture(scope='module')
def instructed(line) -> Blip2:
    return Blip2.load(line / 'instruct', batch_size=8)


@pytest.fixture(scope='module', params=['opt', 'llama', 't5'])
def model(request, instructed) -> Blip2:
    """Language models of every family; what was not trained has fresh weights, made larger so that answers differ."""
    if request.param == 'opt':
        return instructed
    vocabulary = instructed.run.model.lm.vocab_size
    lm = dataclasses.replace({'llama': LLAMA, 't5': T5}[request.param], vocab_size=vocabulary)
    run = small.change(instructed.run, 'model', lm=lm)
    fresh = jax.jit(lambda key: blip2.init(blip2.Blip2Module(run.model), key)['lm'])(jax.random.key(0))
    params = instructed.params | {'lm': jax.tree.map(lambda x: 2 * x, fresh)}
    return dataclasses.replace(instructed, run=run, params=params)


def one_by_one(model: Blip2, image_features, questions: list[str], candidates: list[str]) -> np.ndarray:
    """Return what each candidate costs where no other is read."""
    prompts = model.question_prompts(questions)
    costs = [model.losses(image_features, prompts, [text] * len(questions))[0].sum(axis=1) for text in candidates]
    return -np.stack(costs, axis=1)


def test_scores_are_the_losses_one_by_one(model, drawn):
    image_features = model.encode_images(drawn)
    expected = one_by_one(model, image_features, QUESTIONS, CANDIDATES)
    assert expected.std() > 1, 'candidates must differ for the test to say anything'
    np.testing.assert_allclose(model.rank(image_features, QUESTIONS, CANDIDATES), expected, rtol=1e-5, atol=1e-5)


def test_other_candidates_change_nothing(instructed, drawn):
    image_features = instructed.encode_images(drawn)
    scores = instructed.rank(image_features, QUESTIONS, CANDIDATES)
    backwards = instructed.rank(image_features, QUESTIONS, CANDIDATES[::-1])
    np.testing.assert_allclose(backwards[:, ::-1], scores, atol=1e-5)
    np.testing.assert_allclose(instructed.rank(image_features, QUESTIONS, CANDIDATES[:1]), scores[:, :1], atol=1e-5)
    many = instructed.rank(image_features, QUESTIONS, CANDIDATES * 5)  # more than go through at a time
    np.testing.assert_allclose(many, np.tile(scores, 5), atol=1e-5)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_no_number_is_not_printed(instructed, drawn, value):
    """As of a run whose weights somebody damaged."""
    queries = instructed.params['qformer']['query_token'].at[0].set(value)
    qformer = instructed.params['qformer'] | {'query_token': queries}
    broken = dataclasses.replace(instructed, params=instructed.params | {'qformer': qformer})
    with pytest.raises(UserError, match='not a number: the weights of this run are broken'):
        broken.rank(drawn, QUESTIONS, CANDIDATES)


def test_every_question_may_have_candidates_of_its_own(instructed, drawn):
    image_features = instructed.encode_images(drawn)
    scores = instructed.rank(image_features, QUESTIONS, CANDIDATES)
    own = instructed.rank(image_features, QUESTIONS, [CANDIDATES[:1], CANDIDATES[1:], CANDIDATES[2:]])
    expected = [[scores[0, 0], -np.inf], scores[1, 1:], [scores[2, 2], -np.inf]]
    np.testing.assert_allclose(own, expected, atol=1e-5)


def test_a_mean_is_over_the_tokens_and_the_end(instructed, drawn):
    tokens = [len(instructed.lm_tokenizer.ids(f' {text}')) + 1 for text in CANDIDATES]
    assert len(set(tokens)) > 1
    scores = instructed.rank(drawn, QUESTIONS, CANDIDATES)
    mean = instructed.rank(drawn, QUESTIONS, CANDIDATES, 'mean')
    np.testing.assert_allclose(mean, scores / np.array(tokens)[None], atol=1e-6)


def test_what_is_missing_is_named(instructed, drawn):
    with pytest.raises(UserError, match='no candidate given'):
        instructed.rank(drawn, QUESTIONS, [])
    with pytest.raises(UserError, match='no candidate given'):
        instructed.rank(drawn, QUESTIONS, [['yes'], [], ['no']])
    with pytest.raises(UserError, match=r'3 picture\(s\) but 1 question\(s\)'):
        instructed.rank(drawn, QUESTIONS[:1], CANDIDATES)


def test_the_command_prints_the_best_first(line, instructed, drawn, tmp_path, capsys):
    file = tmp_path / 'red.png'
    drawn[0].save(file)
    cli.run(['rank', str(line / 'instruct'), str(file), QUESTIONS[0], *CANDIDATES])
    printed = capsys.readouterr().out
    scores = instructed.rank(drawn[:1], QUESTIONS[:1], CANDIDATES)[0]
    order = np.argsort(-scores)
    places = [printed.index(f' {CANDIDATES[c]} ') for c in order]
    assert places == sorted(places)
    assert all(f'{score:.4f}' in printed for score in scores)
