"""Prompts as data: one drawn a row in training, the first in use; what is refused, and what older runs say."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from data_sets import record
from small import change, recipe, write_recipe
from test_data_pipeline import lm_parts, rows, run, same

from qformer_jax import cli, config, prompts
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.pack import pack
from qformer_jax.errors import UserError
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.training import loop

ASKED = ('{question}', 'q: {question} a:', 'answer "{question}" shortly:')
TOLD = ('a photo of', 'a picture:')
QUESTIONS = {'what color is it?', 'is it red?'}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Folder of a packed data set of 12 pictures, each with captions and questions."""
    out = tmp_path_factory.mktemp('prompts') / 'data'
    pack({'train': [record(n, captions=2, questions=2) for n in range(12)]}, out)
    return out


def drawn(data, count, stage='instruct', training=True, shard=(0, 1), **fields) -> list[dict]:
    fields = {'question_prompt': ASKED, 'caption_prompt': TOLD, 'max_lm_text': 40} | fields
    return rows(run(data, stage, batch=12, **fields), count, training=training, shard=shard)


def prompts_of(data, found) -> list[str]:
    tokenizer = Dataset.open(data).lm_tokenizer
    return [lm_parts(row, tokenizer)[1].strip() for row in found]


@pytest.mark.parametrize('fraction, templates', [(0.0, ASKED), (1.0, TOLD)])
def test_training_draws_every_prompt_as_often(data, fraction, templates):
    said = Counter(prompts_of(data, drawn(data, 600, caption_fraction=fraction)))
    questions = QUESTIONS if fraction == 0 else {''}
    for template in templates:
        count = sum(said.pop(template.format(question=question), 0) for question in questions)
        share = 1 / len(templates)
        assert abs(count - 600 * share) < 3 * np.sqrt(600 * share * (1 - share))
    assert not said


def test_both_readers_get_the_same_prompt_and_nothing_else_changes(data):
    """Records, questions and answers are drawn as with one prompt."""
    dataset = Dataset.open(data)
    for one, many in zip(drawn(data, 60, question_prompt=('{question}',)), drawn(data, 60), strict=True):
        assert lm_parts(one, dataset.lm_tokenizer)[1] in lm_parts(many, dataset.lm_tokenizer)[1]
        (prompt,) = prompts_of(data, [many])
        np.testing.assert_array_equal(many['text'], dataset.text_tokenizer.encode(prompt, len(many['text']))[0])
        np.testing.assert_array_equal(one['image'], many['image'])


@pytest.mark.parametrize('stage', ['stage2', 'language'])
def test_the_other_stages_draw_too(data, stage):
    tokenizer = Dataset.open(data).lm_tokenizer
    said = [tokenizer.decode(row['lm_text']) for row in drawn(data, 60, stage, caption_fraction=1.0)]
    assert all(any(template in text for text in said) for template in TOLD)
    assert all(any(template in text for template in TOLD) for text in said)


def test_a_prompt_goes_with_its_row_on_any_host(data):
    one = drawn(data, 24)
    hosts = [drawn(data, 12, shard=(i, 2)) for i in range(2)]
    assert all(map(same, one[0::2], hosts[0]))
    assert all(map(same, one[1::2], hosts[1]))


def test_validation_takes_the_first(data):
    assert set(prompts_of(data, drawn(data, 24, training=False))) <= QUESTIONS
    assert set(prompts_of(data, drawn(data, 24, 'stage2', training=False))) == {'a photo of'}


def test_a_run_in_use_takes_the_first():
    of = config.Run('instruct', data=config.Data(question_prompt=ASKED[1:]))
    assert Blip2.question_prompts(SimpleNamespace(run=of), ['Is it RED? ']) == ['q: is it red? a:']


def test_the_command_line_takes_several_and_json_keeps_them(data, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        loop, 'train', lambda of, folder, *_: trained.append(of) or SimpleNamespace(run=of, folder=folder)
    )
    words = ('train', write_recipe(tmp_path / 'mine.py', recipe('instruct', data)), '--run', tmp_path / 'run')
    cli.run([*map(str, words), '--data.question-prompt', *ASKED])
    assert trained[0].data.question_prompt == ASKED
    assert config.from_json(config.to_json(trained[0])) == trained[0]


def test_older_runs_have_one_text_each(data):
    of = change(recipe('stage2', data), 'data', question_prompt=('Q: {question}',), caption_prompt=('a photo of',))
    tree = json.loads(config.to_json(of))
    tree['data'] |= {'question_prompt': 'Q: {question}', 'caption_prompt': 'a photo of'}
    assert config.from_json(json.dumps(tree)) == of


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'question_prompt': ('{question}', 'What?')}, r"question-prompt 'What\?': expected \{question\} in it"),
        ({'question_prompt': ('{question} {answer}',)}, 'nothing else in braces'),
        ({'question_prompt': ('{} {question}',)}, 'nothing else in braces'),
        ({'question_prompt': ('{question',)}, 'nothing else in braces'),
        ({'question_prompt': ()}, 'question-prompt names no prompt'),
        ({'caption_prompt': ()}, 'caption-prompt names no prompt'),
    ],
)
def test_prompts_that_cannot_serve_are_refused(data, fields, message):
    with pytest.raises(UserError, match=message):
        loop.check(change(recipe('instruct', data), 'data', **fields))


def test_a_recipe_with_a_text_in_place_of_prompts_is_refused():
    data = config.Data()
    object.__setattr__(data, 'caption_prompt', 'a photo of')  # tests check the types of arguments, users do not
    with pytest.raises(UserError, match=r"caption_prompt is one text.* write \('a photo of',\)"):
        data.__post_init__()


def test_instructblips_prompts_serve():
    of = config.Data(question_prompt=prompts.INSTRUCTBLIP_QUESTIONS, caption_prompt=prompts.INSTRUCTBLIP_CAPTIONS)
    loop.check(config.Run('instruct', data=of))
    assert [len(set(p)) for p in (of.question_prompt, of.caption_prompt)] == [10, 13]
    assert of.question_prompt[0].format(question='is it red?') == 'Question: is it red? Short answer:'
