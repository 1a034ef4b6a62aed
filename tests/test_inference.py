"""A finished run in use: the same answer however it is asked, batched, padded or cached."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from qformer_jax import cli, config
from qformer_jax.data.tokenizers import lm_row, prompt_ids
from qformer_jax.errors import UserError
from qformer_jax.inference import decode, forward
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.inference.inputs import ImageFeatures
from qformer_jax.models import masks
from qformer_jax.runs import run_dir
from qformer_jax.training import loop
from qformer_jax.training.loss_context import LossContext
from qformer_jax.training.stage1_forward import align

KINDS = [(colour, shape) for shape in small.SHAPES for colour in small.COLOURS]
QUESTIONS = ['what color is it?', 'is it red?', 'what', 'is it red? is it blue? is it green?'] * 2


@pytest.fixture(scope='module')
def pictures_drawn():
    return [small.draw_picture(*kind) for kind in KINDS]


@pytest.fixture(scope='module')
def instructed(line) -> Blip2:
    return Blip2.load(line / 'instruct', batch_size=8)


@pytest.fixture(scope='module')
def aligned(line) -> Blip2:
    return Blip2.load(line / 'stage1', batch_size=8)


@pytest.fixture(scope='module')
def heard(arrays, tmp_path_factory) -> Blip2:
    """A stage-2 run over feature arrays of ragged lengths."""
    run = small.without_tower(small.recipe('stage2', arrays, steps=6))
    return Blip2.load(loop.train(run, tmp_path_factory.mktemp('heard') / 'run').folder, batch_size=4)


def test_it_answers_in_the_words_it_was_trained_on(instructed, pictures_drawn):
    """After 60 steps a yes-or-no question gets one of the two."""
    answers = instructed.ask(pictures_drawn, ['Is it red?'] * 8)
    assert set(answers) <= {'yes', 'no'}


def test_a_batch_gives_what_singles_give(instructed, pictures_drawn):
    batched = instructed.ask(pictures_drawn, QUESTIONS)
    alone = dataclasses.replace(instructed, batch_size=1)
    singles = [alone.ask([p], [q])[0] for p, q in zip(pictures_drawn, QUESTIONS, strict=True)]
    assert singles == batched
    assert len(set(batched)) > 1


def test_the_cache_changes_nothing(instructed, pictures_drawn):
    """Greedy decoding against running everything anew for each token, without cache and without padding."""
    image_features = instructed.encode_images(pictures_drawn[:3])
    prompts = QUESTIONS[:3]
    written = instructed.generate(image_features, prompts, GenerationConfig(max_new_tokens=5))
    for row, prompt in enumerate(prompts):
        assert written[row].text == written_anew(instructed, image_features.take([row]), prompt, 5)


def written_anew(model: Blip2, image_features, prompt: str, limit: int) -> str:
    prefix = jnp.asarray(model.soft_prefix(image_features, [prompt]).vectors)
    ids = prompt_ids(model.lm_tokenizer, prompt)
    begin = len(ids)
    while len(ids) < begin + limit:
        chosen = next_token(model, prefix, ids)
        if chosen == model.lm_tokenizer.end_id:
            break
        ids.append(chosen)
    return model.lm_tokenizer.decode(ids[begin:]).strip()


def next_token(model: Blip2, prefix: jax.Array, ids: list[int]) -> int:
    def run(network):
        x = jnp.concatenate([prefix, network.lm.embed(jnp.asarray([ids]))], axis=1)
        hidden = network.lm(x, jnp.ones(x.shape[:2], bool)).hidden
        return network.lm.word_logits(hidden)[0, -1]

    return int(itm_logits_of_training(model, run).argmax())


def itm_logits_of_training(model: Blip2, method):
    return jax.jit(lambda params: model.model.apply({'params': params}, method=method))(model.params)


def test_padding_of_a_prompt_changes_nothing(instructed, pictures_drawn):
    """A long neighbour pads the short prompt further to the left; its own words stay."""
    long = ' '.join(['is it red?'] * 4)
    alone = instructed.ask(pictures_drawn[:1], QUESTIONS[:1])
    beside = instructed.ask(pictures_drawn[:2], [QUESTIONS[0], long])
    assert beside[0] == alone[0]


def test_writing_stops_at_the_end_token(instructed, pictures_drawn):
    """Up to its end a row is what it would be without one; from there on it holds nothing but end tokens."""
    image_features = instructed.encode_images(pictures_drawn)
    end, prefix = instructed.lm_tokenizer.end_id, instructed.soft_prefix(image_features, QUESTIONS)
    ids, mask = instructed.padded_prompts(QUESTIONS, 9)
    stopped, endless = (
        np.asarray(decode.with_lm(instructed.model, instructed.params, prefix, ids, mask, settings=settings).tokens)[
            :, 0
        ]
        for settings in (GenerationConfig(max_new_tokens=6, end_ids=(end,)), GenerationConfig(max_new_tokens=6))
    )
    ends = [row.tolist().index(end) for row in endless]
    for row, count in enumerate(ends):
        assert stopped[row].tolist() == [*endless[row, :count], *[end] * (6 - count)]
    texts = [instructed.lm_tokenizer.decode(row[:count]).strip() for row, count in zip(endless, ends, strict=True)]
    assert [
        text.text for text in instructed.generate(image_features, QUESTIONS, GenerationConfig(max_new_tokens=6))
    ] == texts


@pytest.mark.parametrize('settings', [GenerationConfig(6), GenerationConfig(6, temperature=2.0, top_p=0.95)])
def test_a_streamed_text_is_the_text(instructed, pictures_drawn, settings):
    key = jax.random.key(3) if settings.temperature else None
    for picture, question in zip(pictures_drawn[:3], QUESTIONS, strict=False):
        (whole,) = instructed.generate([picture], [question], settings, key=key)
        assert ''.join(instructed.stream(picture, question, settings, key=key)) == whole.text


def test_several_drawn_captions_a_picture(instructed, pictures_drawn):
    settings = GenerationConfig(4, temperature=3.0, num_return=3)
    texts = instructed.caption(pictures_drawn, settings, jax.random.key(0))
    few = dataclasses.replace(instructed, batch_size=2).caption(pictures_drawn[:3], settings, jax.random.key(0))
    assert len(texts) == 24 and few == texts[:9]


@pytest.mark.parametrize(
    'kind, words',
    [({'text_side': 'retrieval'}, "its text side is 'retrieval'"), ({'max_positions': 5}, '5 text positions')],
)
def test_a_qformer_that_cannot_write_so_much_is_refused(aligned, kind, words):
    c = dataclasses.replace(aligned.run.model, qformer=dataclasses.replace(aligned.run.model.qformer, **kind))
    run = dataclasses.replace(aligned.run, model=c)
    features = np.zeros((1, 4, c.qformer.feature_width), np.float32)
    with pytest.raises(UserError, match=words):
        dataclasses.replace(aligned, run=run).caption(
            ImageFeatures(features, np.ones((1, 4), bool)), GenerationConfig(6)
        )


def test_a_prompt_that_does_not_fit_is_refused(instructed, pictures_drawn):
    with pytest.raises(UserError, match=r'a prompt of \d+ tokens and 10 new ones do not fit .* 40 positions, 4 of'):
        instructed.ask(pictures_drawn[:1], ['red ' * 60])


def test_a_prompt_fits_to_the_last_position(instructed, pictures_drawn):
    """40 positions, 4 of them queries, and 9 that are read of 10 new tokens: a prompt may have 27."""
    image_features, settings = instructed.encode_images(pictures_drawn[:1]), GenerationConfig(max_new_tokens=10)
    lengths = {
        len(prompt_ids(instructed.lm_tokenizer, prompt)): prompt for prompt in ('red ' * n for n in range(1, 40))
    }
    (full,) = instructed.generate(image_features, [lengths[27]], settings)
    (whole,) = small.roomy(instructed).generate(image_features, [lengths[27]], settings)  # where it is padded to 32
    assert full.text == whole.text and ''.join(instructed.stream(image_features, lengths[27], settings)) == full.text
    with pytest.raises(UserError, match='a prompt of 28 tokens and 10 new ones do not fit'):
        instructed.generate(image_features, [lengths[28]], settings)


def test_counts_that_do_not_fit_are_refused(instructed, pictures_drawn):
    with pytest.raises(UserError, match=r'2 picture\(s\) but 1 prompt\(s\)'):
        instructed.generate(pictures_drawn[:2], ['what'])
    with pytest.raises(UserError, match='batch_size 0 must be at least 1'):
        dataclasses.replace(instructed, batch_size=0)
    with pytest.raises(UserError, match='no picture given'):
        instructed.caption([])


def test_a_caption_is_written_for_files_bytes_and_pictures_alike(line, pictures_drawn, tmp_path):
    model = Blip2.load(line / 'stage2', batch_size=8)
    file = tmp_path / 'red.png'
    pictures_drawn[0].save(file)
    expected = model.caption(pictures_drawn[:1])
    assert expected[0]
    for given in (file, str(file), file.read_bytes()):
        assert model.caption([given]) == expected


def test_files_are_encoded_as_one_by_one(aligned, pictures_drawn, tmp_path):
    """Three batches, the last one not full, against a file at a time; an error names the file."""
    files = [tmp_path / f'{n}.png' for n in range(8)]
    for file, picture in zip(files, pictures_drawn, strict=True):
        picture.save(file)
    batched = dataclasses.replace(aligned, batch_size=3).encode_images(files)
    singles = ImageFeatures.join([aligned.encode_images([file]) for file in files])
    np.testing.assert_allclose(batched.features, singles.features, atol=1e-5)
    assert batched.mask.all() and batched.mask.shape == singles.mask.shape == (8, 5)
    files[6].write_bytes(b'no picture')
    with pytest.raises(UserError, match=r'6\.png: not a picture'):
        aligned.encode_images(files)


def test_several_captions_of_a_picture_stand_together(line, pictures_drawn):
    model = Blip2.load(line / 'stage2', batch_size=8)
    three = model.caption(pictures_drawn[:3], GenerationConfig(6, num_beams=3, num_return=3))
    assert len(three) == 9
    assert three[::3] == model.caption(pictures_drawn[:3], GenerationConfig(6, num_beams=3))
    assert len(set(three[:3])) > 1


def test_the_command_searches_with_beams(line, pictures_drawn, tmp_path, capsys):
    file, words = tmp_path / 'red.png', ['--num-beams', '3', '--max-new-tokens', '6']
    pictures_drawn[0].save(file)
    cli.run(['caption', str(line / 'stage2'), str(file), *words])
    assert (
        capsys.readouterr().out
        == f'{file}: {Blip2.load(line / "stage2").caption([file], GenerationConfig(6, 0, 3))[0]}\n'
    )


def test_the_command_draws_answers(instructed, pictures_drawn, tmp_path, monkeypatch, capsys):
    pictures_drawn[0].save(tmp_path / 'red.png')
    monkeypatch.setattr(Blip2, 'load', lambda run, **_: instructed)
    words = '--num-return 3 --temperature 2 --top-k 40 --top-p 0.9 --seed 5 --max-new-tokens 4'
    cli.run(['ask', 'run', str(tmp_path / 'red.png'), 'is it red?', *words.split()])
    settings = GenerationConfig(4, num_return=3, temperature=2.0, top_k=40, top_p=0.9)
    drawn = instructed.ask(pictures_drawn[:1], ['is it red?'], settings, jax.random.key(5))
    assert capsys.readouterr().out == '\n'.join(drawn) + '\n' and len(set(drawn)) > 1


def test_a_stage1_run_captions_through_its_qformer(aligned, pictures_drawn):
    """Each word is the likeliest in one pass over [DEC] and the words so far, which knows no cache."""
    image_features = aligned.encode_images(pictures_drawn)
    settings = GenerationConfig(12, end_ids=(aligned.text_tokenizer.sep_id,))
    tokens = decode.with_qformer(
        aligned.model, aligned.params, image_features.features, image_features.mask, settings=settings
    ).tokens[:, 0]
    reads = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=aligned.text_tokenizer.dec_id)

    def run(model):
        memory = model.qformer.project_image(image_features.features, image_features.mask)
        mask = masks.multimodal_causal(model.config.qformer.num_queries, jnp.ones(reads.shape, bool))
        return model.qformer.word_logits(model.qformer(mask, image=memory, text=reads).text)

    likeliest = np.asarray(itm_logits_of_training(aligned, run)).argmax(axis=-1)
    written = np.asarray(tokens) != settings.fill
    lengths = written.sum(axis=1)
    assert (likeliest == tokens)[np.arange(12)[None] <= lengths[:, None]].all()  # the end token among them
    texts = [aligned.text_tokenizer.decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    assert aligned.caption(image_features, GenerationConfig(12)) == texts and len(set(texts)) > 1


def test_losses_agree_with_greedy_writing(instructed, pictures_drawn):
    """What greedy decoding wrote has, token by token, the likeliest tokens: no other answer costs less at the first."""
    image_features = instructed.encode_images(pictures_drawn)
    prompts = ['is it red?'] * 8
    written = instructed.ask(image_features, prompts)
    losses = {answer: instructed.losses(image_features, prompts, [answer] * 8)[0][:, 0:] for answer in ('yes', 'no')}
    first = {answer: rows.sum(axis=1) for answer, rows in losses.items()}
    for row, answer in enumerate(written):
        other = {'yes': 'no', 'no': 'yes'}[answer]
        assert first[answer][row] < first[other][row]


def test_losses_count_the_target_and_its_end_only(instructed, pictures_drawn):
    losses, target = instructed.losses(pictures_drawn[:2], ['is it red?', 'what color is it?'], ['yes', 'green'])
    for row, (prompt, answer) in enumerate((('is it red?', 'yes'), ('what color is it?', 'green'))):
        ids, begin = lm_row(instructed.lm_tokenizer, prompt, answer)
        assert target[row].nonzero()[0].tolist() == list(range(begin, len(ids)))
    assert (losses[~target] == 0).all() and (losses[target] > 0).all()


def test_itc_similarity_is_the_best_querys_cosine(aligned, pictures_drawn):
    texts = ['a red square', 'a blue circle']
    image = aligned.features(pictures_drawn)
    text = aligned.features(texts=texts, mode='text')
    assert image.shape == (8, 4, 8) and text.shape == (2, 8)
    np.testing.assert_allclose(np.linalg.norm(image, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text, axis=-1), 1, rtol=1e-5)
    by_hand = np.array([[max(query @ t for query in queries) for t in text] for queries in image])
    np.testing.assert_allclose(aligned.similarity(pictures_drawn, texts), by_hand, atol=1e-6)


def test_captions_are_cleaned_before_they_are_compared(aligned, pictures_drawn):
    plain, shouted = (aligned.similarity(pictures_drawn, [t]) for t in ('a red square', 'A RED square!'))
    np.testing.assert_array_equal(plain, shouted)


def test_itm_scores_are_the_logits_of_matched(aligned, pictures_drawn):
    texts = ['a red square', 'a blue circle', 'a green circle']
    image_features = aligned.encode_images(pictures_drawn[:2])
    scores = aligned.similarity(image_features, texts, by='itm')
    assert scores.shape == (2, 3)
    for row in range(2):
        for column, text in enumerate(texts):
            logits = aligned.match(image_features, aligned.text_arrays([text]), np.array([row]), np.array([0]))
            np.testing.assert_allclose(scores[row, column], logits[0, 1], atol=1e-5)


def test_pairs_go_through_in_batches(aligned, pictures_drawn):
    image_features, text = aligned.encode_images(pictures_drawn), aligned.text_arrays(['a red square', 'a blue circle'])
    pictures, texts = np.arange(13) % 8, np.arange(13) % 2
    few = dataclasses.replace(aligned, batch_size=4)
    expected = aligned.match(image_features, text, pictures, texts)
    np.testing.assert_allclose(few.match(image_features, text, pictures, texts), expected, atol=1e-5)


def test_a_picture_is_projected_once_for_its_pairs(aligned, pictures_drawn, monkeypatch):
    """Three pictures with 8 texts each, in any order: 16 pairs a batch never hold more than 8 pictures."""
    image_features, texts = aligned.encode_images(pictures_drawn[:3]), [f'a {c} {s}' for c, s in KINDS]
    shuffled = np.random.default_rng(0).permutation(24)
    shapes, match = [], forward.match
    monkeypatch.setattr(forward, 'match', lambda *given: shapes.append((len(given[2]), len(given[5]))) or match(*given))
    model, text = dataclasses.replace(aligned, batch_size=16), aligned.text_arrays(texts)
    logits = model.match(image_features, text, shuffled // 8, shuffled % 8)
    assert shapes == [(8, 16), (8, 8)]
    for row in range(3):
        alone = aligned.match(image_features.take([row]), text, np.zeros(8, int), np.arange(8))
        np.testing.assert_allclose(logits[np.argsort(shuffled)].reshape(3, 8, 2)[row], alone, atol=1e-5)


def test_match_is_what_training_computed(aligned, pictures_drawn):
    """The logits that the loss of stage 1 judges, of its first third of rows: the pairs that belong together."""
    image_features, text = aligned.encode_images(pictures_drawn), aligned.text_arrays([f'a {c} {s}' for c, s in KINDS])
    batch = {
        'features': image_features.features,
        'feature_mask': image_features.mask,
        'text': text[0],
        'text_mask': text[1],
    }
    batch = {name: jnp.asarray(rows) for name, rows in batch.items()} | {'image_id': jnp.arange(8)}

    def run(model):
        context = LossContext(jax.random.key(0), aligned.run.objective)
        return align(model, batch['features'], batch['feature_mask'], batch, context).itm.logits

    judged = itm_logits_of_training(aligned, run)
    np.testing.assert_allclose(aligned.match(image_features, text, np.arange(8), np.arange(8)), judged[:8], atol=1e-5)


def test_feature_files_and_arrays_are_read_alike(heard, tmp_path):
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=(length, 6)).astype(np.float32) for length in (2, 5, 3)]
    files = [tmp_path / f'{n}.npy' for n in range(3)]
    for file, array in zip(files, arrays, strict=True):
        np.save(file, array)
    assert heard.caption(files) == heard.caption(arrays)


def test_rows_that_pad_an_array_change_nothing(heard):
    array = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    longer = np.ones((9, 6), np.float32)
    alone, beside = heard.features([array]), heard.features([longer, array])
    np.testing.assert_allclose(beside[1], alone[0], atol=1e-6)
    assert np.abs(beside[0] - beside[1]).max() > 1e-3


@pytest.mark.parametrize(
    'stage, use, words',
    [
        ('stage1', lambda model, pictures: model.ask(pictures, ['what']), "'stage1' run, which has no lm"),
        ('vision', lambda model, pictures: model.caption(pictures), "'vision' run, which has no lm"),
        ('vision', lambda model, pictures: model.similarity(pictures, ['a']), "'vision' run, which has no qformer"),
    ],
)
def test_a_stage_that_cannot_do_it_says_which_can(line, pictures_drawn, stage, use, words):
    with pytest.raises(UserError, match=words):
        use(Blip2.load(line / stage), pictures_drawn[:1])


def test_the_best_checkpoint_can_be_loaded_instead_of_the_last(pictures, tmp_path):
    """Trained far too fast, so that a later loss is worse: `best` then differs from `last`."""
    run = small.recipe('language', pictures, steps=12)
    run = small.change(run, 'training', checkpoint_every=4, validation_batches=1)
    run = small.change(run, 'optimizer', peak_rate=3.0, warmup_steps=6)
    done = loop.train(small.change(run, 'data', validation_split='test'), tmp_path / 'run')
    assert done.best and done.best != done.last
    last, best = (run_dir.load_components(done, which)['lm']['word_embedding'] for which in ('last', 'best'))
    assert np.abs(last - best).max() > 0
    assert config.to_json(done.run) == config.to_json(Blip2.load(tmp_path / 'run', 'best').run)
