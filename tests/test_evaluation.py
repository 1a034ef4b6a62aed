"""Scores by hand, and the evaluation of a finished run: its numbers, its predictions, and that it runs once."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qformer_jax.data.dataset import Dataset
from qformer_jax.data.records import Record
from qformer_jax.data.tokenizers import clean_caption
from qformer_jax.errors import UserError
from qformer_jax.evaluation import retrieval, task, vqa
from qformer_jax.inference.blip2 import Blip2


def test_one_accepted_answer_is_an_exact_match():
    assert vqa.score('Yes ', ('yes',)) == 1
    assert vqa.score('yes it is', ('yes',)) == 0


def test_ten_answers_are_scored_by_leaving_each_one_out():
    """Ten people, two say 'red'. Leaving out one of these two, 1 agrees (1/3); leaving out another, 2 (2/3).

    (2 * 1/3 + 8 * 2/3) / 10 = 0.6
    """
    answers = ('red',) * 2 + ('pink',) * 8
    assert vqa.score('red', answers) == pytest.approx(0.6)
    assert vqa.score('pink', answers) == 1
    assert vqa.score('blue', answers) == 0
    assert vqa.score('red', ('red',) * 3 + ('pink',) * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)


def test_without_pictures_each_question_gets_its_commonest_answer():
    records = [
        Record('1', b'x', questions=('is it red?', 'what?'), answers=(('no',), ('blue',))),
        Record('2', b'x', questions=('is it red?',), answers=(('no',),)),
        Record('3', b'x', questions=('is it red?',), answers=(('yes',),)),
    ]
    assert vqa.text_only(records) == {'is it red?': 'no', 'what?': 'blue'}


def test_questions_keep_the_place_of_their_picture():
    records = [
        Record('1', b'x', captions=('no question',)),
        Record('2', b'x', questions=('a?', 'b?'), answers=(('1',), ('2', '3'))),
    ]
    assert vqa.pairs(records) == ([1, 1], ['a?', 'b?'], [('1',), ('2', '3')])


def test_recall_counts_any_positive_among_the_best():
    similarity = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.1, 0.2, 0.3]], np.float32)
    positive = np.array([[True, False, False], [False, True, True], [True, True, False]])
    assert [retrieval.recall(similarity, positive, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 1, 1])


def test_ties_go_to_the_first_candidate_and_not_to_the_right_one():
    """A model that gives all the same similarity has the recall of chance, whichever way the columns are sorted."""
    similarity = np.zeros((4, 4), np.float32)
    assert retrieval.recall(similarity, np.eye(4, dtype=bool), 1) == 0.25


def test_candidates_are_the_different_captions():
    texts, positive = retrieval.candidates([('b', 'a'), ('a',), ('c',)])
    assert texts == ['a', 'b', 'c']
    assert positive.tolist() == [[True, True, False], [True, False, False], [False, False, True]]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_are_asked_some_at_a_time(line, pictures, monkeypatch):
    model, records = Blip2.load(line / 'instruct'), list(Dataset.open(pictures).source('test'))
    positions, questions, _ = vqa.pairs(records)
    encoded = model.encode_queries([record.image for record in records])
    batched = model.ask(encoded.take(positions), questions)
    counts, ask = [], Blip2.ask
    monkeypatch.setattr(task, 'QUESTIONS_AT_ONCE', 6)
    monkeypatch.setattr(Blip2, 'ask', lambda *given: counts.append(len(given[2])) or ask(*given))
    assert task._answers(model, encoded, positions, questions) == batched
    assert counts == [6, 6, 4]


def test_vqa_of_a_run_is_the_mean_over_its_predictions(line, capsys):
    numbers = task.evaluate(line / 'instruct', 'vqa', 'test')
    rows = lines(line / 'instruct' / 'evaluation' / 'vqa-test.jsonl')
    assert numbers['number of questions'] == len(rows) == 16
    scores = [vqa.score(row['prediction'], row['answers']) for row in rows]
    assert numbers['accuracy'] == pytest.approx(np.mean(scores))
    # What the commonest answer gives: 6 of 8 pictures are not red, and one colour of four is guessed for 'what color'.
    assert numbers['text only (commonest answer)'] == pytest.approx((6 + 2) / 16)
    assert 'accuracy' in capsys.readouterr().out


@pytest.mark.parametrize(
    'damage',
    [b'', b'{"identity": {', b'null', b'[]', b'{}', b'\xff', b'{"identity": {}, "numbers": []}', b'[' * 3000, None],
    ids=['empty', 'cut', 'null', 'list', 'no keys', 'not text', 'other types', 'nested', 'predictions gone'],
)
def test_a_damaged_table_is_evaluated_anew(line, tmp_path, monkeypatch, damage):
    """Of what was written once; with both files whole, nothing is evaluated a second time."""
    shutil.copytree(line / 'weights', tmp_path / 'weights')
    shutil.copytree(line / 'stage2', tmp_path / 'stage2', ignore=shutil.ignore_patterns('evaluation'))
    calls = []
    judged = lambda *_: calls.append(1) or task.TaskResult({'exact match': 0.5}, [{'prediction': 'a'}])  # noqa: E731
    monkeypatch.setattr(task, 'TASKS', task.TASKS | {'caption': judged})
    monkeypatch.setattr(Blip2, 'load', lambda *_, **__: None)
    for _ in range(2):
        assert task.evaluate(tmp_path / 'stage2', 'caption', 'test') == {'exact match': 0.5}
    assert len(calls) == 1
    table = tmp_path / 'stage2' / 'evaluation' / 'caption-test.json'
    whole = table.read_bytes()
    if damage is None:
        table.with_suffix('.jsonl').unlink()
    else:
        table.write_bytes(damage)
    assert task.evaluate(tmp_path / 'stage2', 'caption', 'test') == {'exact match': 0.5}
    assert len(calls) == 2 and table.read_bytes() == whole and table.with_suffix('.jsonl').is_file()


def test_a_table_is_whole_or_not_there(line, tmp_path, monkeypatch):
    """The disk is full while the predictions are written: what was there before stays."""
    monkeypatch.setattr(task, 'TASKS', task.TASKS | {'caption': lambda *_: task.TaskResult({'exact match': 0.5}, [{}])})
    monkeypatch.setattr(Blip2, 'load', lambda *_, **__: None)
    task.evaluate(line / 'stage2', 'caption', 'train[:3]')
    folder = line / 'stage2' / 'evaluation'
    before = {file: file.read_bytes() for file in folder.iterdir()}
    real = Path.write_text

    def half(file, text, **options):
        real(file, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Path, 'write_text', half)
    with pytest.raises(UserError, match='disk full'):
        task.evaluate(line / 'stage2', 'caption', 'train[3:6]')
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_retrieval_of_a_run(line):
    numbers = task.evaluate(line / 'stage1', 'retrieval', 'test')
    assert numbers['number of pictures'] == numbers['number of captions'] == 8
    assert numbers['picture to text R@1'] <= numbers['picture to text R@5'] <= 1
    rows = lines(line / 'stage1' / 'evaluation' / 'retrieval-test.jsonl')
    assert numbers['picture to text, re-ranked R@1'] == pytest.approx(
        np.mean([row['prediction'] in [c.lower() for c in row['captions']] for row in rows])
    )
    model = Blip2.load(line / 'stage1')
    records = [r for r in Dataset.open(model.run.data.path).source('test') if r.captions]
    texts, positive = retrieval.candidates([tuple(map(clean_caption, r.captions)) for r in records])
    image_features = model.encode_images([r.image for r in records])
    both = model.similarity(image_features, texts) + model.similarity(
        image_features, texts, by='itm'
    )  # all eight are among the 128
    assert numbers['picture to text, re-ranked R@1'] == retrieval.recall(both, positive, 1)
    assert numbers['text to picture, re-ranked R@5'] == retrieval.recall(both.T, positive.T, 5)
    assert 'picture to text R@10' not in numbers, 'there are eight candidates'
    assert numbers['picture to text R@1'] > 1 / 8, 'better than chance after 60 steps'


def test_captions_of_a_run(line):
    numbers = task.evaluate(line / 'stage2', 'caption', 'test')
    rows = lines(line / 'stage2' / 'evaluation' / 'caption-test.jsonl')
    right = [row['prediction'] in [caption.lower() for caption in row['captions']] for row in rows]
    assert numbers['exact match'] == pytest.approx(np.mean(right)) and len(rows) == 8
    own, other = numbers['loss, own picture (nats/token)'], numbers['loss, shuffled pictures']
    assert numbers['shuffled minus matched'] == pytest.approx(other - own)


def test_a_second_evaluation_reads_the_first(line, monkeypatch):
    first = task.evaluate(line / 'instruct', 'vqa', 'test')
    monkeypatch.setattr(task.Blip2, 'load', lambda *_, **__: pytest.fail('evaluated again'))
    assert task.evaluate(line / 'instruct', 'vqa', 'test') == first


def test_another_data_set_or_other_weights_are_evaluated_anew(line, pictures):
    task.evaluate(line / 'instruct', 'vqa', 'test', pictures)
    path = line / 'instruct' / 'evaluation' / 'vqa-test.json'
    known = json.loads(path.read_text())
    known['identity']['data'] = 'another'
    known['numbers']['accuracy'] = 2.0
    path.write_text(json.dumps(known))
    assert task.evaluate(line / 'instruct', 'vqa', 'test')['accuracy'] <= 1
