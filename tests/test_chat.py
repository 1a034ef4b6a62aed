"""Dialogue: a turn reads what is new and nothing else, and says what it would say had it read everything at once."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import small

from qformer_jax import cli
from qformer_jax.data.tokenizers import prompt_ids
from qformer_jax.errors import UserError
from qformer_jax.inference import chat, decode
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.inference.prompts import with_eos

QUESTIONS = ('is it red?', 'what color is it?', 'is it blue?')
SETTINGS = GenerationConfig(max_new_tokens=3)
RED, BLUE = small.draw_picture('red', 'square'), small.draw_picture('blue', 'circle')


@pytest.fixture(scope='module')
def talker(line) -> Blip2:
    """A run with room for a few turns; 60 steps of training make poor answers, but answers."""
    return small.roomy(Blip2.load(line / 'stage2'))


def talk(model, dialogue, question, settings=SETTINGS):
    """Return the dialogue after one more turn."""
    pieces, dialogues = zip(*chat.say(model, dialogue, question, settings), strict=True)
    assert dialogues[-1].turns[-1] == (question, ''.join(pieces))
    return dialogues[-1]


def test_a_turn_encodes_no_picture_and_reads_its_own_words_only(talker, monkeypatch):
    first = talk(talker, chat.start(talker, RED), QUESTIONS[0])
    monkeypatch.setattr(Blip2, 'encode_queries', None)  # nobody may ask
    monkeypatch.setattr(Blip2, 'soft_prefix', None)
    second = talk(talker, first, QUESTIONS[1])
    assert first.pictures_encoded == second.pictures_encoded == 1
    (prompt,) = talker.question_prompts([QUESTIONS[1]])
    new = len(talker.lm_tokenizer.ids(' ' + prompt)) + len(first.unread)
    assert second.words_read - first.words_read == new
    queries = talker.run.model.qformer.num_queries
    answers = int(second.cache.valid.sum()) - queries - second.words_read
    assert 0 < answers <= 2 * SETTINGS.max_new_tokens


@pytest.mark.parametrize('penalty', [1.0, 5.0])
def test_a_kept_cache_says_what_a_fresh_reading_says(talker, penalty):
    """Logits and words of every turn, from the cache and from all ids read at once, which a penalty counts."""
    dialogue = chat.start(talker, RED)
    tokenizer = talker.lm_tokenizer
    ids, endless = [], GenerationConfig(max_new_tokens=4, end_ids=(10**6,), repetition_penalty=penalty)
    for i, question in enumerate(QUESTIONS):
        (prompt,) = talker.question_prompts([question])
        ids += tokenizer.ids(' ' + prompt) if i else prompt_ids(tokenizer, prompt)
        prefix = talker.soft_prefix(dialogue.encoded, [''])
        row, token_mask = np.array([ids], np.int32), np.ones((1, len(ids)), bool)
        fresh = decode.with_lm(talker.model, talker.params, prefix, row, token_mask, settings=endless).tokens[0, 0]
        read, *_ = chat._go_on(talker, dialogue, question, endless)
        _, start = decode.prefill_lm(talker.model, talker.params, prefix, row, token_mask, 4)
        np.testing.assert_allclose(read.logits, start.logits, atol=1e-5)
        np.testing.assert_array_equal(read.prompt[read.prompt_mask], ids)
        dialogue = talk(talker, dialogue, question, endless)
        assert dialogue.turns[-1][1] == tokenizer.decode(fresh).strip()
        ids += fresh.tolist()


def test_an_answer_that_was_stopped_counts_as_far_as_it_went(talker):
    endless = GenerationConfig(max_new_tokens=6, end_ids=(10**6,))
    steps = [dialogue for _, dialogue in chat.say(talker, chat.start(talker, RED), QUESTIONS[0], endless)]
    stopped = talk(talker, steps[2], QUESTIONS[1], endless)
    assert stopped.turns[0][1] == steps[2].turns[0][1]
    short = talk(talker, chat.start(talker, RED), QUESTIONS[0], dataclasses.replace(endless, max_new_tokens=3))
    assert talk(talker, short, QUESTIONS[1], endless).turns[1] == stopped.turns[1]


def test_one_more_picture_is_seen(talker):
    one = talk(talker, chat.start(talker, RED), QUESTIONS[0])
    two = chat.add_picture(talker, one, BLUE)
    assert two.pictures_encoded == len(two.encoded) == 2
    queries = talker.run.model.qformer.num_queries
    assert int(two.cache.valid.sum()) == int(one.cache.valid.sum()) + queries + len(one.unread)
    assert talk(talker, two, QUESTIONS[1]).turns[0] == one.turns[0]


def test_an_instruction_aware_model_keeps_features_only(talker, monkeypatch):
    objective = dataclasses.replace(talker.run.objective, instruction_aware=True)
    aware = dataclasses.replace(talker, run=dataclasses.replace(talker.run, objective=objective))
    dialogue = talk(aware, chat.start(aware, RED), QUESTIONS[0])
    assert dialogue.cache is None and dialogue.pictures_encoded == 1
    again = talk(aware, dialogue, QUESTIONS[1])
    assert again.pictures_encoded == 1
    said = f'{aware.question_prompts(QUESTIONS[:1])[0]} {dialogue.turns[0][1]} '
    newest = aware.question_prompts(QUESTIONS[1:2])
    prefix = aware.soft_prefix(again.encoded, newest)
    padded = aware.padded_prompts([said + newest[0]], prefix.mask.shape[1] + SETTINGS.max_new_tokens - 1)
    settings = with_eos(SETTINGS, aware.lm_tokenizer.end_id)
    (ids,) = decode.with_lm(aware.model, aware.params, prefix, *padded, settings=settings).tokens[0]
    assert again.turns[1][1] == aware.lm_tokenizer.decode(ids[~np.isin(ids, settings.end_ids)]).strip()


@pytest.mark.parametrize('aware', [False, True])
def test_a_dialogue_ends_where_the_positions_do(line, aware):
    """40 of them: the answer stops there, and there is no room for another turn, as one line says."""
    model = Blip2.load(line / 'stage2')
    objective = dataclasses.replace(model.run.objective, instruction_aware=aware)
    model = dataclasses.replace(model, run=dataclasses.replace(model.run, objective=objective))
    endless = GenerationConfig(max_new_tokens=64, end_ids=(10**6,))
    steps = [dialogue for _, dialogue in chat.say(model, chat.start(model, RED), QUESTIONS[0], endless)]
    (prompt,) = model.question_prompts(QUESTIONS[:1])
    words = len(prompt_ids(model.lm_tokenizer, prompt))
    words = -(-words // 8) * 8 if aware else words  # what is read again is read with its padding
    assert len(steps) == 40 - 4 - words + 1
    with pytest.raises(UserError, match=r'the dialogue is full: it would have \d+ positions of 40') as caught:
        talk(model, steps[-1], 'red ' * 60 if aware else QUESTIONS[1], endless)
    assert '\n' not in str(caught.value)


def test_short_and_long_questions_are_answered_by_one_compilation(talker, monkeypatch):
    """Until the cache grows: 128 slots hold both."""
    compiled, lm_step = [], decode.make_decode_step
    monkeypatch.setattr(decode, 'make_decode_step', lambda *given: compiled.append(1) or lm_step(*given))
    settings = GenerationConfig(max_new_tokens=5, end_ids=(10**6,))
    dialogue = talk(talker, chat.start(talker, RED), 'red', settings)
    dialogue = talk(talker, dialogue, 'is it red? is it blue? is it green? is it yellow?', settings)
    assert dialogue.cache.valid.shape == (1, 128) and len(compiled) == 1


def test_the_terminal(line, tmp_path, monkeypatch, capsys):
    """Two turns, a file that is no picture, and the end of input; the program ends well."""
    RED.save(tmp_path / 'red.png')
    (tmp_path / 'no.png').write_text('text')
    lines = iter(['is it red?', f'/image {tmp_path / "no.png"}', '', '/image', '/imagine', 'is it blue?'])
    monkeypatch.setattr('builtins.input', lambda prompt: _next(lines))
    cli.run(['chat', str(line / 'instruct'), str(tmp_path / 'red.png'), '--max-new-tokens', '2'])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert 'no.png' in said.err and said.err.count('error: ') == 3
    assert "no command '/image'" in said.err and "no command '/imagine'" in said.err


def _next(lines):
    try:
        return next(lines)
    except StopIteration:
        raise EOFError from None


@pytest.fixture
def ctrl_c():
    """Let SIGINT interrupt, here and in processes started here: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_an_answer_and_not_the_program(ctrl_c, line, tmp_path, monkeypatch, capsys):
    RED.save(tmp_path / 'red.png')
    lines, say = iter(['is it red?', 'is it blue?']), chat.say

    def slow(*arguments):
        for i, step in enumerate(say(*arguments)):
            yield step
            if i == 0 and len(step[1].turns) == 1:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat, 'say', slow)
    monkeypatch.setattr('builtins.input', lambda prompt: _next(lines))
    cli.run(['chat', str(line / 'stage2'), str(tmp_path / 'red.png'), '--max-new-tokens', '2'])
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith('(stopped)') and not second.endswith('(stopped)')


def test_a_process_survives_ctrl_c_and_ends_with_its_input(ctrl_c, line, tmp_path):
    """Ctrl-C while it waits for a line; then a question through the pipe, and the end of the pipe."""
    RED.save(tmp_path / 'red.png')
    with small.start_command('chat', line / 'stage2', tmp_path / 'red.png', '--max-new-tokens', '2') as process:
        assert 'Ctrl-C ends an answer' in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == '\n' and process.stderr.readline() == '/quit ends the dialogue\n'
        out, err = process.communicate('is it red?\n/image nothing.png\nis it blue?\n', timeout=120)
    assert process.returncode == 0 and len(out.splitlines()) == 2
    assert err.startswith('error: nothing.png: ') and len(err.splitlines()) == 1
