"""Checkpoints in and out: recognised, complete, bit for bit, streamed, and refused in one line."""

import argparse
import dataclasses
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import reference
from PIL import Image
from reference import CLIP, EVA, OPT, QFORMER, T5
from safetensors.numpy import load_file, save_file

from qformer_jax import cli, config, presets, recipes
from qformer_jax.convert import bert, files, lavis, lavis_config, published, safetensors_writer
from qformer_jax.convert.assemble import assemble
from qformer_jax.convert.lazy_tensors import Tensor, in_memory, read_all
from qformer_jax.convert.recognise import NOTHING, without_dec
from qformer_jax.convert.table import NewlyInitialized, to_jax
from qformer_jax.errors import UserError
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.models import blip2
from qformer_jax.models.vit import resize_positions
from qformer_jax.rules import flatten
from qformer_jax.runs import import_export, run_dir

LAVIS = reference.GOLDENS / 'lavis'
LIKE = {
    'stage1': config.Blip2Config(EVA, QFORMER, None),
    'stage1_clip': config.Blip2Config(CLIP, QFORMER, None),
    'opt_stage2': config.Blip2Config(EVA, QFORMER, OPT),
    't5_stage2': config.Blip2Config(EVA, QFORMER, T5),
}


def recorded(case: str):
    return LAVIS / case / 'state_dict.safetensors'


def read(case: str) -> import_export.Model:
    return import_export.read([recorded(case)], LIKE[case])


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype, name


def recipe(monkeypatch, model: config.Blip2Config) -> None:
    """Make `--recipe mine` mean this model."""
    run = config.Run('stage1', model)
    original = recipes.load
    monkeypatch.setattr(recipes, 'load', lambda name: (run, 'mine') if name == 'mine' else original(name))


@pytest.mark.parametrize('case', LIKE)
def test_lavis_to_ours_to_lavis_is_bit_identical(case, tmp_path):
    import_export.import_checkpoint(read(case), tmp_path / 'runs' / 'mine')
    back = import_export.read([tmp_path / 'runs' / 'mine'])
    assert back.run.model == dataclasses.replace(read(case).run.model, word_head=0)
    written, left_out = import_export.export_checkpoint(back, tmp_path / 'back.safetensors', 'lavis')
    assert not left_out
    assert_same(load_file(written[0]), load_file(recorded(case)))


@pytest.mark.parametrize('case', ['stage1', 'opt_stage2', 't5_stage2'])
def test_lavis_to_hugging_face_loads_and_returns(case, tmp_path):
    torch = pytest.importorskip('torch', reason='the other framework is PyTorch')
    transformers = pytest.importorskip('transformers', reason='the other library is Hugging Face')
    model = read(case)
    import_export.export_checkpoint(model, tmp_path / 'theirs', 'huggingface')
    described = json.loads((tmp_path / 'theirs' / 'config.json').read_text())
    kind = getattr(transformers, described['architectures'][0])
    expected = kind(transformers.AutoConfig.from_pretrained(tmp_path / 'theirs'))
    state = load_file(tmp_path / 'theirs' / 'model.safetensors')
    expected.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=True)
    back = import_export.read([tmp_path / 'theirs'])
    kept = {path: tensor for path, tensor in model.tensors.items() if path in back.tensors}
    assert_same(read_all(back.tensors), read_all(kept))


def test_a_pth_is_read_without_running_what_it_holds(tmp_path):
    torch = pytest.importorskip('torch', reason='.pth is its format')
    written, _ = import_export.export_checkpoint(read('stage1'), tmp_path / 'blip2.pth', 'lavis')
    state = torch.load(written[0], weights_only=True)['model']
    assert_same({key: value.numpy() for key, value in state.items()}, load_file(recorded('stage1')))
    whole = {'model': {key: value.bfloat16() for key, value in state.items()}, 'epoch': 9, 'config': {'run': {}}}
    torch.save(whole, tmp_path / 'lavis.pth')
    found = files.open_checkpoint(tmp_path / 'lavis.pth')
    np.testing.assert_array_equal(found['temp'].read().astype(np.float32), state['temp'].bfloat16().float().numpy())
    torch.save(state, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert_same(read_all(files.open_checkpoint(tmp_path / 'old.pth')), load_file(recorded('stage1')))


def test_provenance_stands_beside_the_result(tmp_path):
    import_export.import_checkpoint(read('stage1'), tmp_path / 'runs' / 'mine', 'bfloat16')
    found = json.loads((tmp_path / 'runs' / 'mine' / 'provenance.json').read_text())
    assert found['dtype'] == 'bfloat16'
    (source,) = found['sources']
    assert source['file'] == 'state_dict.safetensors' and source['bytes'] == recorded('stage1').stat().st_size
    assert len(source['sha256']) == 64 and {'jax', 'numpy', 'safetensors'} <= found['versions'].keys()
    done = run_dir.finished(tmp_path / 'runs' / 'mine')
    assert {a.dtype.name for a in read_all(import_export.read([done.folder]).tensors).values()} == {'bfloat16'}


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """Return a function that writes a published file in which some values of some tensors are others."""
    recipe(monkeypatch, LIKE['stage1'])

    def write(**values: float):
        tensors = load_file(recorded('stage1'))
        names = sorted(
            name for name, tensor in tensors.items() if tensor.ndim == 2 and name.startswith('visual_encoder.')
        )
        for name, value in zip(names, values.values(), strict=False):
            tensors[name] = tensors[name].copy()
            tensors[name][-1, -1] = value
        save_file(tensors, tmp_path / 'broken.safetensors')
        return tmp_path / 'broken.safetensors', [bool(np.isfinite(t).all()) for t in tensors.values()].count(False)

    return write


@pytest.mark.parametrize('to', ['ours', 'lavis', 'huggingface'])
def test_values_that_are_not_finite_are_refused(broken, tmp_path, to):
    """Named, with nothing written; or written because that is asked for, and then their names stand beside them."""
    source, count = broken(**{str(i): value for i, value in enumerate((np.nan, np.inf, -np.inf, np.nan, np.nan))})
    assert count == 5
    dest = tmp_path / 'runs' / ('theirs.safetensors' if to == 'lavis' else 'new')
    words = ['convert', str(source), str(dest), '--recipe', 'mine', '--to', to]
    with pytest.raises(UserError, match=r'NaN or infinity in \S+, \S+, \S+, \S+ and 1 more: .*--allow-nonfinite'):
        cli.run(words)
    left = [path.name for path in (tmp_path / 'runs').rglob('*') if not path.name.endswith('.lock')]
    assert left == []
    cli.run([*words, '--allow-nonfinite'])
    (note,) = (tmp_path / 'runs').rglob('*provenance.json')
    assert len(json.loads(note.read_text())['nonfinite']) == 5


def test_values_that_a_smaller_type_cannot_hold_are_refused(broken, tmp_path):
    source, _ = broken(large=1e5)
    words = ['convert', str(source), str(tmp_path / 'runs' / 'new'), '--recipe', 'mine']
    with pytest.raises(UserError, match=r'NaN or infinity \(as float16\) in \S+: '):
        cli.run([*words, '--dtype', 'float16'])
    assert not (tmp_path / 'runs' / 'new').exists()
    cli.run([*words, '--dtype', 'bfloat16'])
    assert json.loads((tmp_path / 'runs' / 'new' / 'provenance.json').read_text())['nonfinite'] == []


def test_a_published_model_with_values_that_are_not_finite_is_not_used(tmp_path):
    import_export.export_checkpoint(read('stage1'), tmp_path / 'theirs', 'huggingface')
    file = tmp_path / 'theirs' / 'model.safetensors'
    tensors = load_file(file)
    tensors['query_tokens'] = tensors['query_tokens'].copy()
    tensors['query_tokens'][0, 0, 0] = np.nan
    save_file(tensors, file)
    with pytest.raises(UserError, match='NaN or infinity in qformer/query_token: take an intact checkpoint'):
        Blip2.load(tmp_path / 'theirs')


def test_a_file_for_lavis_and_its_provenance_are_written_both_or_neither(tmp_path):
    (tmp_path / 'blip2.provenance.json').write_text('another one')
    with pytest.raises(UserError, match=r"blip2\.provenance\.json' exists"):
        import_export.export_checkpoint(read('stage1'), tmp_path / 'blip2.safetensors', 'lavis')
    assert [path.name for path in tmp_path.iterdir()] == ['blip2.provenance.json']


@pytest.mark.parametrize('prefix', ['opt_model.', 'opt_model.model.'])
def test_parts_come_from_several_files(prefix, tmp_path):
    """A published LAVIS file holds what was trained only; tower and language model lie in files of their own."""
    whole = load_file(recorded('opt_stage2'))
    tower = {key.removeprefix('visual_encoder.'): x for key, x in whole.items() if key.startswith('visual_encoder.')}
    surplus = {key.replace('blocks.0.', 'blocks.2.'): x for key, x in tower.items() if key.startswith('blocks.0.')}
    surplus |= {'norm.weight': np.ones(48, np.float32), 'head.bias': np.ones(5, np.float32)}
    (tmp_path / 'eva').mkdir()
    save_file(tower | surplus, tmp_path / 'eva' / 'model.safetensors')
    model = {key.removeprefix(prefix): x for key, x in whole.items() if key.startswith(prefix)}  # with or without head
    (tmp_path / 'opt').mkdir()
    save_file(model, tmp_path / 'opt' / 'model.safetensors')
    described = {'model_type': 'opt', 'hidden_size': 40, 'num_hidden_layers': 2, 'num_attention_heads': 4}
    described |= {'ffn_dim': 96, 'max_position_embeddings': 96, 'vocab_size': 356, 'word_embed_proj_dim': 40}
    (tmp_path / 'opt' / 'config.json').write_text(json.dumps(described))
    trained = {key: x for key, x in whole.items() if not key.startswith(('visual_encoder.', 'opt_model.'))}
    save_file(trained, tmp_path / 'blip2.safetensors')
    sources = [tmp_path / 'blip2.safetensors', tmp_path / 'eva' / 'model.safetensors', tmp_path / 'opt']
    batched = import_export.read(sources, LIKE['opt_stage2'])
    assert batched.run.model == read('opt_stage2').run.model
    assert_same(read_all(batched.tensors), read_all(read('opt_stage2').tensors))
    import_export.import_checkpoint(batched, tmp_path / 'runs' / 'mine')
    named = json.loads((tmp_path / 'runs' / 'mine' / 'provenance.json').read_text())['sources']
    assert [source['file'] for source in named] == ['blip2.safetensors', 'model.safetensors', 'model.safetensors']
    with pytest.raises(UserError, match="brings a second 'vit'"):
        import_export.read([*sources, sources[1]], LIKE['opt_stage2'])
    with pytest.raises(UserError, match='a projection to a language model, but no language model'):
        import_export.read(sources[:2], LIKE['opt_stage2'])


def test_published_sizes_need_no_recipe():
    """Shapes of the published files, by the tables themselves; the heads are the published ones."""
    for vit, qformer in ((presets.VIT_G, presets.QFORMER_G), (presets.VIT_L, presets.QFORMER_L)):
        model = config.Blip2Config(vit, qformer, None)
        assert lavis_config.model_of(reference.outlines(model), NOTHING) == model


@pytest.mark.parametrize('vit, blocks', [(presets.VIT_G, 40), (presets.VIT_L, 24)])
def test_the_published_towers_surplus_blocks_are_left_out(vit, blocks):
    file = reference.outlines(config.Blip2Config(dataclasses.replace(vit, depth=blocks), None, None))
    tower = lavis_config.inside(file, 'visual_encoder.')
    found = lavis_config.vit_of(tower, None)
    assert found.depth == blocks and lavis_config.published_depth(found) == vit.depth


def test_a_position_table_is_resized_on_loading_by_the_towers_rule():
    for case, rule in (('stage1', 'half_pixel'), ('stage1_clip', 'align_corners')):
        like = LIKE[case]
        larger = dataclasses.replace(like, vit=dataclasses.replace(like.vit, image_size=70))
        found = assemble([recorded(case)], larger)
        assert found.model.vit.image_size == 70 and any('56 to 70' in note for note in found.notes)
        old = read(case).tensors['vit/position_embedding'].read()
        new = found.tensors['vit/position_embedding']
        assert new.shape == (26, 48)
        np.testing.assert_array_equal(new.read(), resize_positions(old, (5, 5), rule))


def test_a_vocabulary_without_dec_grows_aloud():
    key = 'Qformer.bert.embeddings.word_embeddings.weight'
    words = in_memory({key: np.zeros((bert.WORDS, 1), np.float32)})
    grown = without_dec(lavis.QFORMER, words)
    assert to_jax(grown, words).keys() == {'qformer/word_embedding'}
    assert [row.why for row in grown if isinstance(row, NewlyInitialized)] == ['the file has 30522 words and no [DEC]']
    one_more = in_memory({key: np.zeros((bert.WORDS + 1, 1), np.float32)})
    assert without_dec(lavis.QFORMER, one_more) == lavis.QFORMER


def test_shards_are_written_and_read_as_hugging_face_does(tmp_path):
    state = {f'layer.{i}': np.full((3, 5), i, np.float32) for i in range(4)}
    safetensors_writer.write_shards(tmp_path, in_memory(state), None, limit=130)
    assert len(list(tmp_path.glob('model-0000?-of-00002.safetensors'))) == 2
    assert_same(read_all(files.open_checkpoint(tmp_path)), state)
    (tmp_path / 'model-00002-of-00002.safetensors').unlink()
    with pytest.raises(UserError, match=r'names 2 shards, but model-00002-of-00002\.safetensors is missing'):
        files.open_checkpoint(tmp_path)


def test_tensors_pass_one_at_a_time(tmp_path):
    def make() -> Tensor:
        return Tensor((256, 256), np.dtype(np.float32), lambda: np.ones((256, 256), np.float32))

    tracemalloc.start()
    safetensors_writer.write(tmp_path / 'x.safetensors', {str(i): make() for i in range(20)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 256 * 256 * 4
    assert len(load_file(tmp_path / 'x.safetensors')) == 20


def damaged(tmp_path, kind: str):
    """Return a damaged checkpoint of this kind."""
    torch = pytest.importorskip('torch', reason='.pth is its format')
    path = tmp_path / f'{kind}.{"pth" if kind in ("code", "cut_pth", "list") else "safetensors"}'
    state = load_file(recorded('stage1'))
    if kind == 'cut':
        path.write_bytes(recorded('stage1').read_bytes()[:-100])
    elif kind == 'cut_pth':
        torch.save({'model': {'x': torch.ones(9)}}, path)
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == 'code':
        torch.save({'model': {'x': torch.ones(9)}, 'config': argparse.Namespace(lr=1)}, path)
    elif kind == 'list':
        torch.save([torch.ones(3)], path)
    elif kind == 'dtype':
        save_file(state | {'temp': np.ones((), np.int32)}, path)
    elif kind == 'other_key':
        save_file(state | {'Qformer.bert.pooler.dense.weight': np.ones((32, 32), np.float32)}, path)
    elif kind == 'missing':
        save_file({key: value for key, value in state.items() if key != 'itm_head.bias'}, path)
    elif kind == 'tied':
        save_file(state | {'Qformer.cls.predictions.decoder.bias': np.zeros(187, np.float32)}, path)
    elif kind == 'foreign':
        save_file({'some.weight': np.ones(3)}, path)
    return path


@pytest.mark.parametrize(
    'kind, message',
    [
        ('cut', 'damaged, or not safetensors'),
        ('cut_pth', 'damaged, or not a PyTorch file'),
        ('code', r'refused: reading it would run argparse\.Namespace'),
        ('list', 'holds no state dict'),
        ('dtype', "'qformer/temperature' is int32: weights must be float64, float32"),
        ('other_key', r"no row of the table has the key 'Qformer\.bert\.pooler\.dense\.weight' \[32, 32\]"),
        ('missing', "no tensor for 1 of the model's .* first 'qformer/itm_head/bias'"),
        ('tied', r"'Qformer\.cls\.predictions\.decoder\.bias' \[187\] differs from 'qformer/lm_head/bias'"),
        ('foreign', r'1 tensors of no known family \(first: some\.weight\)'),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(kind, message, tmp_path, monkeypatch):
    source, dest = damaged(tmp_path, kind), tmp_path / 'runs' / 'mine'
    recipe(monkeypatch, LIKE['stage1'])
    with pytest.raises(UserError, match=message) as caught:
        cli.run(['convert', str(source), str(dest), '--recipe', 'mine'])
    assert '\n' not in str(caught.value)
    assert [file.name for file in dest.parent.rglob('*')] == ['.mine.lock']


def test_a_failure_half_way_leaves_nothing(tmp_path):
    model = read('stage1')

    def fail():
        raise UserError('the disk went away')

    broken = dict(model.tensors) | {'vit/class_token': dataclasses.replace(model.tensors['vit/class_token'], read=fail)}
    with pytest.raises(UserError, match='the disk went away'):
        import_export.import_checkpoint(dataclasses.replace(model, tensors=broken), tmp_path / 'runs' / 'mine')
    assert not list((tmp_path / 'runs').iterdir())
    with pytest.raises(UserError, match='the disk went away'):
        import_export.export_checkpoint(
            dataclasses.replace(model, tensors=broken), tmp_path / 'mine.safetensors', 'lavis'
        )
    assert [path.name for path in tmp_path.iterdir()] == ['runs']


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['one'], 'name at least one source and the destination'),
        (['nowhere.pth', 'out'], "no file or folder 'nowhere.pth'"),
        ([str(recorded('stage1')), 'out'], 'no published one has the width 48: name a recipe of that width'),
        ([str(recorded('stage1')), 'out', '--recipe', 'mine', '--to', 'lavis'], 'LAVIS reads one file: name it .pth'),
        (
            [str(recorded('stage1_clip')), 'out', '--recipe', 'clip', '--to', 'huggingface'],
            r'computes what model\.vit\.pre-norm True does',
        ),
    ],
)
def test_wrong_command_lines(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    models = {'mine': LIKE['stage1'], 'clip': LIKE['stage1_clip']}
    monkeypatch.setattr(recipes, 'load', lambda name: (config.Run('stage1', models[name]), ''))
    with pytest.raises(UserError, match=message):
        cli.run(['convert', *arguments])
    assert {file.name for file in tmp_path.iterdir()} <= {'.out.lock'}


def test_an_existing_destination_is_kept(tmp_path):
    (tmp_path / 'mine').mkdir()
    with pytest.raises(UserError, match='exists: name a new one'):
        import_export.import_checkpoint(read('stage1'), tmp_path / 'mine')


def test_the_command_says_what_it_found_and_what_is_next(monkeypatch, tmp_path, capsys):
    recipe(monkeypatch, LIKE['stage1'])
    cli.run(['convert', str(recorded('stage1')), str(tmp_path / 'runs' / 'mine'), '--recipe', 'mine'])
    said = capsys.readouterr().out
    assert 'LAVIS BLIP-2' in said and 'next: qformer evaluate' in said
    cli.run(['convert', str(tmp_path / 'runs' / 'mine'), str(tmp_path / 'theirs'), '--to', 'huggingface'])
    said = capsys.readouterr().out
    assert 'left out' in said and 'qformer/lm_head/bias' in said


def test_a_model_is_used_straight_from_published_files(tmp_path):
    import_export.export_checkpoint(read('stage1'), tmp_path / 'theirs', 'huggingface')
    import_export.import_checkpoint(import_export.read([tmp_path / 'theirs']), tmp_path / 'runs' / 'mine')
    pictures = [Image.new('RGB', (56, 56), (shade, 9, 9)) for shade in (0, 200)]
    direct, converted = (Blip2.load(tmp_path / name).features(pictures) for name in ('theirs', 'runs/mine'))
    assert direct.shape == (2, 8, 16)
    np.testing.assert_array_equal(direct, converted)
    with pytest.raises(UserError, match='no tokenizer'):
        Blip2.load(tmp_path / 'theirs').features(texts=['a cat'], mode='text')


def test_a_published_model_is_asked_as_it_was_judged():
    """InstructBLIP's Q-Former reads the prompt as well, so its 32 tokens of a caption would cut the question."""
    qformer = presets.QFORMER_G
    plain, reads = (dataclasses.replace(qformer, text_side=side) for side in ('none', 'reads'))
    prompts = {}
    for name, connector, lm in (
        ('opt', plain, config.OptConfig()),
        ('t5', plain, config.T5Config()),
        ('it', reads, config.T5Config()),
    ):
        run = import_export.run_of(config.Blip2Config(qformer=connector, lm=lm))
        prompts[name] = run.stage, run.data.question_prompt[0], run.data.max_text
    short = 'Question: {question} Short answer:'
    assert prompts['opt'] == ('stage2', 'Question: {question} Answer:', 32)
    assert prompts['t5'] == ('stage2', short, 32) and prompts['it'] == ('instruct', short, 128)


def test_safetensors_need_no_torch():
    code = (
        'import sys; from pathlib import Path; from qformer_jax.convert.files import open_checkpoint; '
        f'open_checkpoint(Path({str(recorded("stage1"))!r})); sys.exit("torch" in sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


DEMO = config.Blip2Config(
    dataclasses.replace(presets.TINY_VIT, depth=2),
    dataclasses.replace(presets.TINY_QFORMER, feature_width=64, vocab_size=30, depth=2),
    dataclasses.replace(presets.TINY_OPT, vocab_size=50, depth=2),
)
"""What the demo's runs are made of, a little shallower."""


def demo(reads: bool = False, **parts) -> import_export.Model:
    """Return a run of the demo's kind, with random parameters, and other parts."""
    model = dataclasses.replace(DEMO, **parts)
    draw, shapes = np.random.default_rng(0), flatten(blip2.shapes(model))
    arrays = {path: draw.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}
    run = config.Run('stage2', model, objective=config.Objective(instruction_aware=reads))
    return import_export.Model(run, in_memory(arrays), (), ())


def other(part: str, **fields) -> dict:
    """Return a part of the demo's model with other fields."""
    return {part: dataclasses.replace(getattr(DEMO, part), **fields)}


def assert_returns(model: import_export.Model, folder) -> None:
    """Fail unless what is written for Hugging Face is read back as the same model, to the last bit."""
    _, left_out = import_export.export_checkpoint(model, folder, 'huggingface')
    back = import_export.read([folder])
    want = {path: x for path, x in read_all(model.tensors).items() if path not in left_out}
    assert back.run.model == published.for_huggingface(model.run.model, model.reads).model
    assert back.reads == model.reads
    assert_same(read_all(back.tensors), want)


@pytest.mark.parametrize(
    'reads, parts',
    [
        (False, {'lm': None}),
        (False, {}),
        (True, {}),
        (False, {'lm': T5}),
        (True, {'lm': dataclasses.replace(T5, activation='gelu_tanh')}),
        (True, {'lm': reference.LLAMA}),
        (False, {'lm': dataclasses.replace(reference.LLAMA, tied=True, rope_base=5e4, norm_eps=1e-5)}),
        (False, other('lm', embed_width=16, norm_first=False)),
        (False, {'vit': None, 'qformer': None}),
        (False, other('vit', attention_bias='query_value', activation='quick_gelu', norm_eps=1e-5)),
        (True, other('qformer', dropout=0.3, norm_eps=1e-6, vocab_size=30522)),
    ],
)
def test_a_run_returns_from_hugging_face_as_it_was(reads, parts, tmp_path):
    assert_returns(demo(reads, **parts), tmp_path / 'theirs')


def test_a_bias_of_keys_that_is_zero_returns_too(tmp_path):
    """A fresh tower's are; without our mark in `config.json`, only weights could tell."""
    model = demo()
    arrays = read_all(model.tensors)
    keys = {path: np.zeros_like(x) for path, x in arrays.items() if path.endswith('/attention/key/bias')}
    assert_returns(dataclasses.replace(model, tensors=in_memory(arrays | keys)), tmp_path / 'zero')
    import_export.export_checkpoint(demo(), tmp_path / 'unmarked', 'huggingface')
    change_config(tmp_path / 'unmarked', ('vision_config', 'key_bias'), None)
    assert import_export.read([tmp_path / 'unmarked']).run.model.vit.attention_bias == 'all'


def test_a_lora_returns_merged(tmp_path):
    plain = demo()
    tuned = dataclasses.replace(plain.run.model, lora=config.LoraConfig(rank=2))
    tensors = demo(lora=tuned.lora).tensors
    merged = import_export._merge(tensors, tuned, plain.run.model)
    assert_returns(dataclasses.replace(plain, tensors=merged), tmp_path / 'theirs')


@pytest.mark.parametrize(
    'parts, kind, message',
    [
        (other('vit', patch_bias=False), 'huggingface', r'model\.vit\.patch-bias False does: theirs has True'),
        (other('vit', final_norm=True), 'huggingface', r'model\.vit\.final-norm True'),
        (other('vit', position_resize='align_corners'), 'huggingface', r'model\.vit\.position-resize align_corners'),
        (other('qformer', feature_norm_eps=1e-3), 'huggingface', r'model\.qformer\.feature-norm-eps 0\.001'),
        (other('qformer', vocab_size=30521), 'huggingface', r'model\.qformer\.vocab-size 30521 and \[DEC\]'),
        ({'vit': None}, 'huggingface', r'here model\.vit is None'),
        ({}, 'lavis', r"LAVIS's computes what model\.vit\.attention-bias all does: theirs has query_value"),
        (other('vit', attention_bias='query_value', norm_eps=1e-5), 'lavis', r'model\.vit\.norm-eps 1e-05'),
        (
            other('vit', attention_bias='query_value') | other('qformer', norm_eps=1e-6),
            'lavis',
            r'qformer\.norm-eps 1e-06',
        ),
    ],
)
def test_what_they_cannot_say_is_refused_with_its_field(parts, kind, message, tmp_path):
    with pytest.raises(UserError, match=message):
        import_export.export_checkpoint(demo(**parts), tmp_path / 'theirs.safetensors', kind)
    assert list(tmp_path.iterdir()) == []


def change_config(folder, path: tuple[str, ...], value) -> None:
    """Put a value into a `config.json`; None: remove it."""
    tree = json.loads((folder / 'config.json').read_text())
    part = tree
    for name in path[:-1]:
        part = part[name]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    (folder / 'config.json').write_text(json.dumps(tree))


def test_a_t5_whose_head_is_its_token_table_is_read(tmp_path):
    """As transformers 5 saves it, alone and inside BLIP-2."""
    for name, parts, prefix, where in (
        ('alone', {'vit': None, 'qformer': None}, '', ()),
        ('whole', {}, 'language_model.', ('text_config',)),
    ):
        model = demo(lm=T5, **parts)
        import_export.export_checkpoint(model, tmp_path / name, 'huggingface')
        state = load_file(tmp_path / name / 'model.safetensors')
        del state[f'{prefix}lm_head.weight']
        save_file(state, tmp_path / name / 'model.safetensors')
        change_config(tmp_path / name, (*where, 'tie_word_embeddings'), True)
        with pytest.raises(UserError, match=r"no 'lm_head\.weight', and config\.json scales the outputs"):
            import_export.read([tmp_path / name])
        change_config(tmp_path / name, (*where, 'scale_decoder_outputs'), False)
        found = import_export.read([tmp_path / name]).tensors
        np.testing.assert_array_equal(found['lm/lm_head/kernel'].read(), found['lm/word_embedding'].read().T)
        np.testing.assert_array_equal(found['lm/word_embedding'].read(), model.tensors['lm/word_embedding'].read())


@pytest.mark.parametrize(
    'path, value, message',
    [
        (('model_type',), 3, 'model_type 3: expected a text'),
        (('vision_config',), 'x', "vision_config 'x': expected an object"),
        (('text_config',), [], r'text_config \[\]: expected an object'),
        (('architectures',), 'Blip2', r'architectures'),
        (('num_query_tokens',), 2.5, 'num_query_tokens 2.5: expected a whole number'),
        (('vision_config', 'image_size'), [28, 28], r'vision_config: .*image_size \[28, 28\]: expected a whole number'),
        (('vision_config', 'num_attention_heads'), 0, 'num_attention_heads is 0, it must be at least 1'),
        (('vision_config', 'hidden_act'), 'relu', "hidden_act 'relu'"),
        (('qformer_config', 'num_hidden_layers'), -1, 'qformer_config: .*num_hidden_layers is -1'),
        (('qformer_config', 'layer_norm_eps'), float('nan'), 'layer_norm_eps is nan'),
        (('text_config', 'ffn_dim'), True, 'text_config: .*ffn_dim True: expected a whole number'),
        (('text_config', 'word_embed_proj_dim'), 'x', "word_embed_proj_dim 'x'"),
        (('text_config', 'model_type'), 'gpt2', "language model of type 'gpt2'"),
    ],
)
def test_an_odd_config_is_refused_with_its_field(path, value, message, tmp_path):
    import_export.export_checkpoint(demo(), tmp_path / 'theirs', 'huggingface')
    change_config(tmp_path / 'theirs', path, value)
    with pytest.raises(UserError, match=rf'theirs.*{message}'):
        import_export.read([tmp_path / 'theirs'])


@pytest.mark.parametrize(
    'lm, path, value, message',
    [
        (reference.LLAMA, 'head_dim', 11, 'heads of width 11'),
        (reference.LLAMA, 'num_key_value_heads', 3, '4 heads of width 12 over 3 of keys'),
        (reference.LLAMA, 'num_key_value_heads', 0, 'kv-heads is 0'),
        (reference.LLAMA, 'rope_parameters', [], r'rope_parameters \[\]'),
        (T5, 'relative_attention_num_buckets', 1, 'buckets is 1'),
        (T5, 'relative_attention_max_distance', 4, 'max-distance 4'),
        (T5, 'vocab_size', 0, 'no rows'),
        (T5, 'num_decoder_layers', 999, 'lm/decoder has 2 blocks in the file, but its decoder_depth should be 999'),
        (T5, 'num_layers', 999, 'lm/encoder has 2 blocks in the file, but its depth should be 999'),
        (OPT, 'num_hidden_layers', 999, 'lm has 2 blocks in the file, but its depth should be 999'),
    ],
)
def test_sizes_that_no_model_has_are_refused(lm, path, value, message, tmp_path):
    import_export.export_checkpoint(demo(vit=None, qformer=None, lm=lm), tmp_path / 'theirs', 'huggingface')
    change_config(tmp_path / 'theirs', (path,), value)
    with pytest.raises(UserError, match=rf'theirs.*{message}'):
        import_export.read([tmp_path / 'theirs'])


@pytest.mark.parametrize('text', ['', 'null', '[]', '[' * 10_000, '{"model_type": null}', '\x00'])
def test_a_config_or_index_that_is_none_is_refused(text, tmp_path):
    import_export.export_checkpoint(demo(), tmp_path / 'theirs', 'huggingface')
    (tmp_path / 'theirs' / 'config.json').write_text(text)
    with pytest.raises(UserError, match=r'config\.json'):
        import_export.read([tmp_path / 'theirs'])
    (tmp_path / 'theirs' / 'model.safetensors.index.json').write_text(text)
    with pytest.raises(UserError, match=r'index\.json'):
        import_export.read([tmp_path / 'theirs'])


@pytest.mark.parametrize(
    'shards, message', [({}, 'names no shards'), ({'x': '../a'}, 'no file beside it'), ({'x': 3}, 'Expected `str`')]
)
def test_an_index_names_files_beside_it(shards, message, tmp_path):
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': shards}))
    with pytest.raises(UserError, match=message):
        files.open_checkpoint(tmp_path)


def test_a_trainers_folder_is_its_weights(tmp_path):
    torch = pytest.importorskip('torch', reason='.bin is its format')
    torch.save({'x': torch.ones(3)}, tmp_path / 'pytorch_model.bin')
    torch.save(argparse.Namespace(lr=1e-3), tmp_path / 'training_args.bin')
    torch.save({'state': {}}, tmp_path / 'optimizer.bin')
    assert files.open_checkpoint(tmp_path).keys() == {'x'}


def test_odd_entries_of_a_state_dict_are_named(tmp_path):
    torch = pytest.importorskip('torch', reason='.pth is its format')
    x = torch.ones(2, 2)
    entries = [
        ({3: x}, 'key of its state dict is 3, a int'),
        ({'a': x, 'b': None}, "'b' is a NoneType"),
        ({'a': x.to(torch.float8_e4m3fn)}, "'a' is float8_e4m3fn: weights must be"),
        ({'a': x.to_sparse()}, r"'a' is torch\.sparse_coo"),
        ({'a': x.to('meta')}, "on 'meta'"),
        ({'a': x[0, :1].expand(10**12)}, 'is more than the file holds'),
    ]
    for state, message in entries:
        torch.save(state, tmp_path / 'model.pth')
        with pytest.raises(UserError, match=message):
            files.open_checkpoint(tmp_path / 'model.pth')


@pytest.mark.parametrize('case, part', [('stage1', 'Qformer'), ('opt_stage2', 'opt_model'), ('t5_stage2', 't5_model')])
def test_a_lavis_file_without_a_tensor_is_no_traceback(case, part, tmp_path):
    """Nor one with an empty or flat tensor: it is refused, or, of a second name or a bias, read."""
    state = load_file(recorded(case))
    names = [name for name in state if name.startswith(part)]
    refused = 0
    for name in names[:: len(names) // 12]:
        for odd in ({}, {name: state[name].reshape(-1)}, {name: state[name][:0]}):
            save_file({key: x for key, x in state.items() if key != name} | odd, tmp_path / 'part.safetensors')
            try:
                import_export.read([tmp_path / 'part.safetensors'], LIKE[case])
            except UserError:
                refused += 1
    assert refused > len(names[:: len(names) // 12])


@pytest.mark.parametrize(
    'stage, kept', [('stage2', ['wordpiece.json', 'byte_bpe.json']), ('stage1', ['wordpiece.json'])]
)
def test_tokenizers_go_to_hugging_face_and_back(stage, kept, line, tmp_path):
    cli.run(['convert', str(line / stage), str(tmp_path / 'theirs'), '--to', 'huggingface'])
    cli.run(['convert', str(tmp_path / 'theirs'), str(tmp_path / 'back')])
    for name in kept:
        assert (tmp_path / 'back' / name).read_bytes() == (line / stage / name).read_bytes()
    assert not (tmp_path / 'back' / 'byte_bpe.json').exists() or 'byte_bpe.json' in kept
