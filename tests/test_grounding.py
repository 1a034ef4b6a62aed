"""Words for boxes: rows that learn beside a language model that does not, and a run that says where things are."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import change, recipe
from test_export import ALONE
from test_quantize import LMS
from tokenizers import Tokenizer

from qformer_jax import boxes, cli, config
from qformer_jax.data.dataset import Source
from qformer_jax.data.grounding_tokenizer import GroundedTokenizer, with_location_tokens
from qformer_jax.data.preprocess import RowMaker
from qformer_jax.data.record_cache import RecordCache
from qformer_jax.data.records import Record
from qformer_jax.data.tokenizers import LmTokenizer, TextTokenizer, prompt_ids, train_byte_bpe, train_wordpiece
from qformer_jax.errors import UserError
from qformer_jax.evaluation import grounding as metrics
from qformer_jax.export import runner
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.locate import locate
from qformer_jax.models import blip2, lora, vocab_extension
from qformer_jax.models.lora import Adapted
from qformer_jax.models.vocab_extension import Extended
from qformer_jax.rules import flatten, unflatten
from qformer_jax.runs import run_dir
from qformer_jax.training import loop
from qformer_jax.training.stages import STAGES

GRID = config.GroundingConfig(grid=4)
WORDS = boxes.words(4)
LMS = LMS | {'opt_narrow': dataclasses.replace(LMS['opt'], embed_width=16)} | {
    'llama_tied': dataclasses.replace(LMS['llama'], tied=True)}  # fmt: skip
TEXTS = ['a red circle', 'where is the blue square', 'yes', 'no']
PLAIN = LmTokenizer(train_byte_bpe(TEXTS, 300))


def drawn(shapes: dict) -> dict:
    """Return parameters without zeros or ones."""
    draw = np.random.default_rng(0)
    return unflatten({p: draw.normal(size=x.shape).astype(np.float32) / 4 for p, x in flatten(shapes).items()})


@partial(jax.jit, static_argnums=0)
def hidden_and_logits(model: blip2.Blip2Module, params: dict, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the hidden states of tokens after 3 vectors, and their logits."""
    text_mask = jnp.ones(ids.shape, bool)
    target = text_mask.at[:, :4].set(False)

    def run(network):
        prefix = blip2.Prefix.whole(jnp.ones((*ids.shape[:1], 3, network.config.lm.input_width)) / 3)
        hidden = network.target_hidden_states(prefix, ids, text_mask, target)
        return hidden[:, 4:], network.lm.word_logits(hidden)[:, 4:]

    return model.apply({'params': params}, method=run)


@pytest.fixture(scope='module', params=LMS)
def voice(request) -> tuple[blip2.Blip2Module, dict]:
    """A language model of every kind with added rows, and its parameters."""
    lm = dataclasses.replace(LMS[request.param], depth=1)
    model = blip2.Blip2Module(config.Blip2Config(vit=None, qformer=None, lm=lm, grounding=GRID))
    return model, drawn(blip2.shapes(model.config))


def test_added_words_are_read_and_written_with_their_own_rows(voice):
    model, params = voice
    own, extra = params['lm'], params['grounding']
    table = own['word_embedding']
    extended = blip2.effective_params(params, model.config)
    assert 'grounding' not in extended
    ids = jnp.array([[3, 59, 60, 60 + len(WORDS) - 1], [0, 1, 2, 3]])
    vectors = model.apply({'params': extended}, ids, method=lambda m, ids: m.lm.embed(ids))
    expected = np.stack([table[3], table[59], extra['word_embedding'][0], extra['word_embedding'][-1]])
    np.testing.assert_array_equal(vectors[0], expected)
    np.testing.assert_array_equal(vectors[1], table[:4])
    known = jnp.arange(14).reshape(2, 7) + 3
    before = hidden_and_logits(model, {'lm': own}, known)
    hidden, logits = hidden_and_logits(model, extended, known)
    np.testing.assert_array_equal(hidden, before[0])
    assert logits.shape[-1] == 60 + len(WORDS)
    np.testing.assert_array_equal(logits[..., :60], before[1])
    rows = extra.get('output_embedding', extra['word_embedding'])
    assert ('output_embedding' in extra) == ('lm_head' in own)
    np.testing.assert_allclose(logits[..., 60:], np.asarray(hidden) @ rows.T, rtol=1e-4, atol=1e-4)


def test_merged_is_a_language_model_with_more_words(voice):
    model, params = voice
    whole = vocab_extension.merge(params, model.config.grounding)
    longer = blip2.Blip2Module(vocab_extension.merged(model.config))
    assert longer.config.grounding.in_table
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(lambda x: x.shape, blip2.shapes(longer.config))
    ids = jnp.arange(14).reshape(2, 7) + 50
    extended = hidden_and_logits(model, blip2.effective_params(params, model.config), ids)
    for mine, expected in zip(hidden_and_logits(longer, whole, ids), extended, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)


def test_rows_and_steps_go_together():
    """LoRA on the output table of T5 does not reach the added rows."""
    lm = dataclasses.replace(LMS['t5'], depth=1, decoder_depth=1)
    c = config.Blip2Config(vit=None, qformer=None, lm=lm, grounding=GRID, lora=config.LoraConfig(rank=2, targets='.*'))
    params = drawn(blip2.shapes(c))
    both = flatten(blip2.effective_params(params, c))['lm/lm_head/kernel']
    assert isinstance(both, Extended) and isinstance(both.table, Adapted)
    merged = flatten(vocab_extension.merge(lora.merge(params, c.lora), c.grounding))['lm/lm_head/kernel']
    np.testing.assert_array_equal(merged, both.merged())
    np.testing.assert_array_equal(merged[:, 60:], params['grounding']['output_embedding'].T)
    assert np.abs(merged[:, :60] - params['lm']['lm_head']['kernel']).max() > 0.01


def test_no_gradient_has_the_size_of_the_table():
    model = blip2.Blip2Module(config.Blip2Config(vit=None, qformer=None, lm=LMS['llama_tied'], grounding=GRID))
    params = drawn(blip2.shapes(model.config))
    ids = jnp.arange(14).reshape(2, 7) + 55

    def loss(rows, frozen):
        return hidden_and_logits(model, blip2.effective_params(frozen | {'grounding': rows}, model.config), ids)[
            1
        ].sum()

    gradients = jax.grad(loss)(params['grounding'], {'lm': params['lm']})
    assert np.abs(gradients['word_embedding']).min() > 0
    made = jax.make_jaxpr(jax.grad(loss))(params['grounding'], {'lm': params['lm']}).pretty_print()
    assert f'f32[{len(WORDS)},32]' in made
    assert 'f32[60,32] =' not in made and f'f32[{60 + len(WORDS)},32]' not in made


def test_fresh_rows_are_as_large_as_the_table():
    for name in ('llama', 'llama_tied'):
        lm = drawn(blip2.shapes(config.Blip2Config(vit=None, qformer=None, lm=LMS[name])))['lm']
        lm['word_embedding'] = 3 * lm['word_embedding'] + 5
        rows = vocab_extension.init(config.GroundingConfig(grid=32), lm, jax.random.key(0))
        assert rows['word_embedding'].shape == (1024 + 6, 32)
        np.testing.assert_allclose(rows['word_embedding'].mean(), 5, atol=0.2)
        np.testing.assert_allclose((rows['word_embedding'] - 5).std(), 0.75, atol=0.1)
        if name == 'llama':
            np.testing.assert_allclose(rows['output_embedding'].std(), 0.25, atol=0.05)


def test_texts_and_ids_of_a_grounded_tokenizer():
    c = config.Blip2Config(vit=None, qformer=None, lm=dataclasses.replace(LMS['opt'], vocab_size=400), grounding=GRID)
    tokenizer = with_location_tokens(PLAIN, c)
    assert with_location_tokens(PLAIN, dataclasses.replace(c, grounding=None)) is PLAIN
    text = boxes.ask('a red circle') + boxes.spell([(0.0, 0.0, 0.5, 1.0)], 4)
    ids = tokenizer.ids(text)
    assert [i - 400 for i in ids if i >= 400] == [WORDS.index(w) for w in (
        '<grounding>', '<phrase>', '</phrase>', '<object>', '<patch_index_0000>', '<patch_index_0013>', '</object>',
    )]  # fmt: skip
    assert [i for i in ids if i < 400] == PLAIN.ids('a red circle')
    assert tokenizer.decode(ids) == text
    assert tokenizer.ids(text.replace('<object>', '  <object>')) == ids
    assert tokenizer.decode([*ids, 399]) == text, 'spare rows are no words'
    assert all(i < 300 for i in tokenizer.ids('<patch_index_9999> <patch_index_16>')), 'neither are other cells'
    merged = dataclasses.replace(vocab_extension.merged(c).lm, vocab_size=400 + len(WORDS))
    again = with_location_tokens(
        PLAIN, dataclasses.replace(c, lm=merged, grounding=dataclasses.replace(GRID, in_table=True))
    )
    assert again.ids(text) == ids
    assert again.vocab_size == PLAIN.vocab_size


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
RECORD = Record(
    image_id='x',
    features=np.ones((2, 3), np.float32),
    captions=('A red circle.',),
    questions=('what?',),
    answers=(('red',),),
    phrases=(('A red half.', LEFT), ('blue', RIGHT), ('A red half.', RIGHT)),
)


def maker(stage: str, **data: object) -> RowMaker:
    """Return what makes rows of one record."""
    return RowMaker(
        row_format=STAGES[stage].row_format,
        data=config.Data(max_text=10, max_lm_text=32, question_prompt=('{question}',), **data),
        memory=RecordCache(Source(Path(), 'train', (), np.zeros((1, 6))), pictures=False, _kept={0: (RECORD, ())}),
        first=0,
        image_size=0,
        max_patches=2,
        max_frames=0,
        text_tokenizer=TextTokenizer(train_wordpiece(TEXTS, 100)),
        lm_tokenizer=GroundedTokenizer(PLAIN, WORDS, 300),
        training=True,
        grid=4,
    )


@pytest.mark.parametrize('stage', ['stage2', 'instruct'])
def test_a_row_asks_for_all_boxes_of_a_phrase(stage):
    make, drawn = maker(stage, phrase_fraction=1.0), set()
    for seed in range(8):
        row = make(0, np.random.default_rng(seed))
        said = make.lm_tokenizer.decode(row['lm_text'][row['lm_target']])
        prompt = make.lm_tokenizer.decode(row['lm_text'][row['lm_mask'] & ~row['lm_target']])
        drawn.add((prompt, said))
        if stage == 'instruct':
            phrase = boxes.read(prompt + said, 4).found[0][0]
            np.testing.assert_array_equal(row['text'], make.text_tokenizer.encode(phrase, 10)[0])
    assert {(p, boxes.read(s, 4).found[0][1]) for p, s in drawn} == {
        (boxes.ask('a red half'), tuple(boxes.box_between(*boxes.cells(b, 4), 4) for b in (LEFT, RIGHT))),
        (boxes.ask('blue'), (boxes.box_between(*boxes.cells(RIGHT, 4), 4),)),
    }
    assert all(s.endswith('\n') for _, s in drawn)


def test_the_share_of_rows_and_rows_without():
    """A share of 0 draws nothing: other rows are what they were."""
    make, plain = maker('instruct', phrase_fraction=0.3), maker('instruct', caption_fraction=0.5)
    asks = [make.lm_tokenizer.ids('<object>')[0] in make(0, np.random.default_rng(i))['lm_text'] for i in range(300)]
    assert 0.2 < np.mean(asks) < 0.4
    without = dataclasses.replace(plain, grid=0)
    for seed in range(20):
        rows = (m(0, np.random.default_rng(seed)) for m in (plain, without))
        np.testing.assert_array_equal(*(row['lm_text'] for row in rows))


@pytest.fixture(scope='module')
def placed(tmp_path_factory, line):
    """A finished stage-2 run over pictures whose halves are named, with its data set."""
    folder = tmp_path_factory.mktemp('placed')
    for split in ('train', 'test'):
        (folder / 'source' / split).mkdir(parents=True)
        lines = []
        for number in range(16 if split == 'train' else 8):
            name = ('red', 'blue')[number % 2]
            picture = small.draw_picture('green', 'square')
            picture.paste(small.COLOURS[name], (0, 0, 32, 64) if number // 2 % 2 else (32, 0, 64, 64))
            picture.save(folder / 'source' / split / f'{number}.png')
            box = LEFT if number // 2 % 2 else RIGHT
            lines.append({'file': f'{number}.png', 'caption': name, 'phrases': [{'phrase': name, 'box': box}]})
        (folder / 'source' / split / 'captions.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    tokenizers = '--text-tokenizer', str(line / 'stage2' / 'wordpiece.json')
    tokenizers += '--lm-tokenizer', str(line / 'stage2' / 'byte_bpe.json')
    cli.run(['data', 'pack', 'folder', str(folder / 'data'), '--path', str(folder / 'source'), *tokenizers])
    run = recipe('stage2', folder / 'data', steps=180)
    run = dataclasses.replace(run, start=config.Start(checkpoint=str(line / 'stage1'), lm=str(line / 'language')))
    run = change(change(run, 'model', grounding=config.GroundingConfig(grid=8)), 'data', phrase_fraction=1.0)
    loop.train(run, folder / 'runs' / 'placed')
    return folder


def test_a_run_learns_where_things_are(placed, line):
    run = placed / 'runs' / 'placed'
    done = run_dir.finished(run)
    assert done.last['lm'] == run_dir.finished(line / 'language').last['lm'], 'the language model stays, to the byte'
    cli.run(['evaluate', str(run), '--task', 'grounding'])
    numbers = json.loads((run / 'evaluation' / 'grounding-test.json').read_text())['numbers']
    assert numbers['R@1 at IoU 0.5'] == 1 and numbers['malformed answers'] == 0
    assert numbers['with shuffled pictures'] < 0.9 and numbers['one box for all pictures'] == 0.5
    assert numbers['mean IoU'] == pytest.approx(0.65625), 'of sides on lines between cells, half a cell each is lost'
    rows = [json.loads(x) for x in (run / 'evaluation' / 'grounding-test.jsonl').read_text().splitlines()]
    assert {row['phrase'] for row in rows} == {'red', 'blue'} and all(row['iou'] > metrics.FITS for row in rows)


def test_the_command_draws_and_a_converted_run_says_the_same(placed, tmp_path, capsys):
    picture = placed / 'source' / 'test' / '0.png'
    cli.run(['ground', str(placed / 'runs' / 'placed'), str(picture), 'red', '--out', str(tmp_path / 'ground')])
    (found,) = json.loads((tmp_path / 'ground' / 'ground.json').read_text())['phrases']
    assert found['dropped'] == 0 and (tmp_path / 'ground' / 'ground.png').stat().st_size > 100
    assert 'red: (' in capsys.readouterr().out
    cli.run(['convert', str(placed / 'runs' / 'placed'), str(tmp_path / 'runs' / 'whole')])
    whole = Blip2.load(tmp_path / 'runs' / 'whole')
    assert whole.run.model.grounding.in_table and 'grounding' not in whole.params
    (again,) = locate(whole, [picture], ['red'])
    assert [list(box) for box in again.found[0][1]] == found['boxes']


def test_an_exported_run_says_the_same_without_this_package(placed, tmp_path, capsys):
    run, dest, picture = placed / 'runs' / 'placed', tmp_path / 'out', placed / 'source' / 'test' / '2.png'
    cli.run(['export', str(run), str(dest)])
    assert '--where "PHRASE"' in capsys.readouterr().out
    model, served = Blip2.load(run), runner.Served(dest)
    assert served.tokenizers['tokens'].token_to_id('<grounding>') == model.lm_tokenizer.ids('<grounding>')[0]
    for phrase in ('Red!', 'blue'):
        (said,) = locate(model, [picture], [phrase])
        assert served.where(picture, phrase) == list(said.found[0][1])
    words = [sys.executable, '-I', '-c', ALONE, str(dest / 'run.py'), str(picture), '--where', 'red']
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ' '.join(f'{edge:.3f}' for edge in locate(model, [picture], ['red'])[0].found[0][1][0]) + '\n'


@pytest.mark.parametrize('spare', [0, 7])
def test_a_saved_tokenizer_has_the_added_words_where_the_table_has_them(tmp_path, spare):
    tokenizer = GroundedTokenizer(PLAIN, WORDS, PLAIN.vocab_size + spare)
    tokenizer.save(tmp_path / 'words.json')
    saved = Tokenizer.from_file(str(tmp_path / 'words.json'))
    saved.encode_special_tokens = True
    for text in (boxes.ask('a red circle') + boxes.spell([LEFT], 4), 'no </s> <object>', 'yes <patch_index_16>'):
        assert saved.encode(text, add_special_tokens=False).ids == tokenizer.ids(text)
    assert PLAIN.tokenizer.token_to_id('<object>') is None, 'the tokenizer itself has not changed'


def test_a_run_names_the_rows_that_it_leaves_behind(placed, capsys):
    before = placed / 'runs' / 'placed'
    run = dataclasses.replace(
        recipe('stage2', placed / 'data', steps=6), start=config.Start(checkpoint=str(before), lm=str(before))
    )
    loop.train(change(run, 'model', grounding=config.GroundingConfig(grid=8)), placed / 'runs' / 'on')
    assert 'stays behind' not in capsys.readouterr().err
    loop.train(run, placed / 'runs' / 'without')
    assert f'  grounding      stays behind in {before}: this model has none\n' in capsys.readouterr().err


def test_what_lacks_words_is_named(line, placed):
    with pytest.raises(UserError, match='no words for boxes'):
        locate(Blip2.load(line / 'stage2'), [placed / 'source' / 'test' / '0.png'], ['red'])
    run = change(recipe('stage2', placed / 'data', steps=10), 'data', phrase_fraction=0.5)
    with pytest.raises(UserError, match='no words for them; set model'):
        loop.train(run, placed / 'runs' / 'none')


def test_prompts_ask_as_kosmos_2_does():
    tokenizer = GroundedTokenizer(PLAIN, WORDS, 300)
    ids = prompt_ids(tokenizer, boxes.ask('yes'))
    assert tokenizer.decode(ids) == '<grounding><phrase>yes</phrase>'
