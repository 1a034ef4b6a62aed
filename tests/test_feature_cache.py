"""What is kept of pictures: found again to the bit, under all that it depends on, and anew where that changed."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from PIL import Image
from test_docs import ARCHITECTURE, blocks

from qformer_jax import cli
from qformer_jax.errors import UserError
from qformer_jax.inference import chat, feature_cache, forward
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.inference.inputs import QueryOutputs

QUESTIONS = ['what color is it?', 'is it red?', 'is it blue?']


@pytest.fixture(scope='module')
def answering(line) -> Blip2:
    """A run whose queries read no question."""
    return Blip2.load(line / 'instruct', batch_size=8)


@pytest.fixture(scope='module')
def aware(answering) -> Blip2:
    """The same weights, but the queries read the question."""
    objective = dataclasses.replace(answering.run.objective, instruction_aware=True)
    return dataclasses.replace(answering, run=dataclasses.replace(answering.run, objective=objective))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    kinds = [('red', 'square'), ('blue', 'circle'), ('green', 'square')]
    for number, kind in enumerate(kinds):
        small.draw_picture(*kind).save(folder / f'{number}.png')
    return sorted(folder.glob('*.png'))


def test_a_second_answer_looks_at_no_picture_and_is_the_same_to_the_bit(
    answering, files, tmp_path, encoded, monkeypatch
):
    prefix, answers = answering.soft_prefix(files, QUESTIONS).vectors, answering.ask(files, QUESTIONS)
    ranks = answering.rank(files, QUESTIONS, ['red', 'blue'])
    encoded.clear()
    first = small.keeping(answering, tmp_path)
    assert first.soft_prefix(files, QUESTIONS).vectors.tobytes() == prefix.tobytes()
    assert sum(encoded) == 4  # three, padded to four
    encoded.clear()
    monkeypatch.setattr(forward, 'query_features', lambda *_: pytest.fail('the queries were run again'))
    for model in (first, small.keeping(answering, tmp_path)):
        assert model.soft_prefix(files, QUESTIONS).vectors.tobytes() == prefix.tobytes()
        assert model.ask(files, QUESTIONS) == answers
        assert model.rank(files, QUESTIONS, ['red', 'blue']).tobytes() == ranks.tobytes()
        streamed = model.stream(files[0], *model.question_prompts(QUESTIONS[:1]), GenerationConfig(10))
        assert ''.join(streamed) == answers[0]
    assert encoded == []
    assert len(list(tmp_path.iterdir())) == 1  # features were not written


def test_what_is_kept_of_other_batches_agrees(answering, files, tmp_path):
    alone = small.keeping(dataclasses.replace(answering, batch_size=1), tmp_path)
    alone.encode_queries(files)
    kept_ones = small.keeping(answering, tmp_path).encode_queries(files)
    np.testing.assert_allclose(kept_ones.queries, answering.encode_queries(files).queries, atol=1e-5)


def test_an_instruction_aware_run_keeps_features(aware, files, tmp_path, encoded):
    answers = aware.ask(files, QUESTIONS)
    encoded.clear()
    assert small.keeping(aware, tmp_path).ask(files, QUESTIONS) == answers
    assert sum(encoded) == 4
    again = small.keeping(aware, tmp_path)
    both = again.soft_prefix(files, QUESTIONS), aware.soft_prefix(aware.encode_images(files), QUESTIONS)
    assert both[0].vectors.tobytes() == both[1].vectors.tobytes()
    encoded.clear()
    assert again.ask(files, QUESTIONS[::-1]) == aware.ask(again.encode_images(files), QUESTIONS[::-1])
    assert encoded == []


def test_features_that_are_kept_serve_the_queries(answering, aware, files, tmp_path, encoded):
    """Those of a search or of an instruction-aware run over the same tower."""
    small.keeping(aware, tmp_path).encode_images(files)
    encoded.clear()
    queries = small.keeping(answering, tmp_path).encode_queries(files).queries
    assert encoded == []
    assert queries.tobytes() == answering.encode_queries(files).queries.tobytes()


def test_a_stage1_run_captions_kept_pictures(line, files, tmp_path, encoded):
    model = Blip2.load(line / 'stage1', batch_size=8, cache=tmp_path)
    captions = model.caption(files, GenerationConfig(8))
    encoded.clear()
    assert Blip2.load(line / 'stage1', batch_size=8, cache=tmp_path).caption(files, GenerationConfig(8)) == captions
    assert encoded == []


def test_what_an_entry_depends_on_makes_another_entry(answering, files, tmp_path, encoded, monkeypatch):
    small.keeping(answering, tmp_path).encode_queries(files[:1])

    def runs_again(model: Blip2, file=files[0]) -> bool:
        encoded.clear()
        small.keeping(model, tmp_path).encode_queries([file])
        return bool(encoded)

    def moved(*path: str) -> Blip2:
        turn = lambda names, x: jax.numpy.nextafter(x, x + 1) if names == path else x  # noqa: E731
        named = lambda names, x: turn(tuple(name.key for name in names), x)  # noqa: E731
        return dataclasses.replace(answering, params=jax.tree_util.tree_map_with_path(named, answering.params))

    assert not runs_again(answering)
    for path in (('lm_projection', 'bias'), ('lm', 'norm', 'scale'), ('qformer', 'layer_0', 'text_mlp', 'up', 'bias')):
        assert not runs_again(moved(*path)), path
    for path in (('vit', 'class_token'), ('qformer', 'query_token'), ('qformer', 'feature_norm', 'scale')):
        assert runs_again(moved(*path)) and not runs_again(moved(*path)), path
    for part, fields in (('training', {'dtype': 'bfloat16'}), ('model', {'qformer': _other_eps(answering)})):
        assert runs_again(dataclasses.replace(answering, run=small.change(answering.run, part, **fields))), fields
    assert runs_again(answering.quantize('int8')) and not runs_again(answering.quantize('int8'))
    pixels = np.array(Image.open(files[0]))
    pixels[5, 7, 1] += 1
    Image.fromarray(pixels).save(tmp_path / 'changed.png')
    assert runs_again(answering, tmp_path / 'changed.png')
    monkeypatch.setattr(feature_cache, 'READ', 'central part, bilinear')
    assert runs_again(answering)


def _other_eps(model: Blip2):
    return dataclasses.replace(model.run.model.qformer, feature_norm_eps=1e-4)


def test_a_picture_is_known_by_its_content(answering, files, tmp_path, encoded):
    """A copy, a file's bytes and the picture twice in a list are one entry; a picture in memory is its pixels."""
    copy = tmp_path / 'copy.png'
    copy.write_bytes(files[0].read_bytes())
    model = small.keeping(answering, tmp_path / 'cache')
    first, second, third = model.encode_queries([files[0], str(copy), files[0].read_bytes()]).queries
    assert sum(encoded) == 1 and first.tobytes() == second.tobytes() == third.tobytes()
    picture = Image.open(files[0])
    model.encode_queries([picture])
    encoded.clear()
    model.encode_queries([picture.copy(), files[0]])
    assert encoded == []
    coloured = picture.convert('P', palette=Image.Palette.ADAPTIVE)
    turned = coloured.copy()
    turned.putpalette([255 - value for value in coloured.getpalette()])  # the same bytes, other colours
    model.encode_queries([coloured, turned])
    assert sum(encoded) == 1  # with its own palette it shows the same pixels


def test_a_flipped_byte_is_said_and_computed_again(answering, files, tmp_path, encoded, capsys):
    queries = small.keeping(answering, tmp_path).encode_queries(files).queries
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[data.index(queries[1].tobytes()) + 9] ^= 4
    file.write_bytes(bytes(data))
    encoded.clear(), capsys.readouterr()
    again = small.keeping(answering, tmp_path)
    assert again.encode_queries(files).queries.tobytes() == queries.tobytes()
    assert encoded and f'{file}: damaged' in capsys.readouterr().err
    encoded.clear()
    assert (
        small.keeping(answering, tmp_path).encode_queries(files).queries.tobytes() == queries.tobytes() and not encoded
    )


def test_feature_arrays_are_looked_at_once(answering, tmp_path, monkeypatch):
    """A run without a tower, and one with a tower that is given arrays: of 2 to 4 rows, so some are padded."""
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=(rows, 16)).astype(np.float32) for rows in (2, 4, 3)]
    np.save(tmp_path / 'first.npy', arrays[0])
    blind = dataclasses.replace(
        answering,
        run=small.without_tower(answering.run),
        params={name: part for name, part in answering.params.items() if name != 'vit'},
    )
    for model in (blind, answering):
        expected = model.encode_queries(arrays).queries
        assert small.keeping(model, tmp_path).encode_queries(arrays).queries.tobytes() == expected.tobytes()
        file = small.keeping(model, tmp_path).encode_queries([tmp_path / 'first.npy']).queries
        np.testing.assert_allclose(file, expected[:1], atol=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(forward, 'query_features', lambda *_: pytest.fail('the queries were run again'))
            again = small.keeping(model, tmp_path)
            assert again.encode_queries(arrays).queries.tobytes() == expected.tobytes()
            assert again.encode_queries([tmp_path / 'first.npy']).queries.tobytes() == file.tobytes()


def test_many_questions_about_a_picture_run_its_queries_once(answering, files, monkeypatch):
    rows, queries = [], forward.query_features
    monkeypatch.setattr(forward, 'query_features', lambda *given: rows.append(len(given[2])) or queries(*given))
    encoded = answering.encode_queries(files)
    assert rows == [4]
    many = answering.ask(encoded.take([0, 0, 0, 2]), [*QUESTIONS, QUESTIONS[0]])
    assert rows == [4]
    single = [answering.ask(files[:1], [question])[0] for question in QUESTIONS]
    assert many == [*single, answering.ask(files[2:], QUESTIONS[:1])[0]]


def test_the_snippet_of_the_architecture_asks_many_times(answering, line, files, tmp_path, encoded):
    _, snippet, _ = blocks(ARCHITECTURE.read_text(), 'python')
    names = {}
    exec(snippet, names)
    for _ in range(2):
        given = names['answers'](str(line / 'instruct'), str(tmp_path), list(map(str, files)), QUESTIONS[:2])
        assert given == [answering.ask(files, [question] * 3) for question in QUESTIONS[:2]]
    assert len(encoded) == 5  # four times by the line above, once by the snippet


def test_a_dialogue_of_yesterday_is_begun_without_the_tower(answering, files, tmp_path, encoded):
    model = small.roomy(answering)

    def answer() -> str:
        dialogue = chat.start(small.keeping(model, tmp_path), files[0])
        return ''.join(piece for piece, _ in chat.say(model, dialogue, QUESTIONS[0], GenerationConfig(4)))

    first = answer()
    encoded.clear()
    assert answer() == first and encoded == []


@pytest.mark.parametrize('command', ['caption', 'ask', 'rank'])
def test_the_commands_keep_what_they_are_told_to(line, files, command, encoded, capsys):
    words = {'ask': ['is it red?'], 'rank': ['is it red?', 'yes', 'no']}.get(command, [])
    call = [command, str(line / 'stage2'), str(files[0]), *words]
    run = lambda *more: cli.run([*call, *more]) or capsys.readouterr()  # noqa: E731
    folder = line / 'cache'
    before = sum(1 for _ in folder.glob('*'))
    plain = run()
    assert plain.err == '' and sum(1 for _ in folder.glob('*')) == before
    assert run('--cache').out == plain.out
    encoded.clear()
    assert run('--cache') == (plain.out, f'cache: {folder}, 0 new\n') and encoded == []


def test_queries_do_for_answers_only(aware, answering, files):
    queries = answering.encode_queries(files)
    assert len(queries) == 3 and isinstance(queries, QueryOutputs)
    for use in (lambda: aware.ask(queries, QUESTIONS), lambda: answering.encode_images(queries)):
        with pytest.raises(UserError, match='queries hold no features: give pictures'):
            use()
    with pytest.raises(UserError, match='no picture given'):
        answering.encode_queries([])
    wide = QueryOutputs(np.zeros((1, 4, 20), np.float32))
    with pytest.raises(UserError, match=r'queries must be \[4, 16\] for this run, not \[4, 20\]'):
        answering.ask(wide, QUESTIONS[:1])
