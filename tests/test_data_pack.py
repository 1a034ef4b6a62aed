"""Packing and opening: what goes in comes out, and nothing half written stays."""

import errno
import pickle
import re
import shlex
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tyro
from data_sets import feature_record, png, record, write_lines
from PIL import Image
from tensorflow_datasets.core import shuffle

from qformer_jax import cli, recipes
from qformer_jax.commands.parse import parse
from qformer_jax.commands.train import Train
from qformer_jax.data import pack as packing
from qformer_jax.data import pipeline, sources
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.pack import pack
from qformer_jax.data.records import Record, pack_array, unpack_array
from qformer_jax.errors import UserError
from qformer_jax.training import init_params
from qformer_jax.training.check import check
from qformer_jax.training.check_data import check_data
from qformer_jax.training.stages import STAGES

RECORDS = [record(n, captions=n % 4, questions=(n + 1) % 3) for n in range(20)]


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    """A packed data set: 20 records in `train`, 3 in `test`."""
    out = tmp_path_factory.mktemp('data') / 'set'
    pack({'train': RECORDS, 'test': RECORDS[:3]}, out)
    return out


def test_records_come_back_as_they_were(packed):
    source = Dataset.open(packed).source('train')
    assert len(source) == 20
    assert [source[n] for n in range(20)] == RECORDS
    assert list(source) == RECORDS
    assert 'tensorflow' not in sys.modules


def test_vocabularies_come_from_files_when_given(packed, tmp_path):
    words = ['[PAD]', '[unused0]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'picture']
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    pack({'train': RECORDS}, tmp_path / 'set', tmp_path / 'vocab.txt', packed / 'byte_bpe.json')
    dataset = Dataset.open(tmp_path / 'set')
    assert dataset.text_tokenizer.vocab_size == len(words)
    assert dataset.text_tokenizer.encode('A picture', 5)[0].tolist() == [3, 6, 7, 4, 0]
    assert (tmp_path / 'set' / 'byte_bpe.json').read_bytes() == (packed / 'byte_bpe.json').read_bytes()
    with pytest.raises(UserError, match='no such tokenizer file'):
        pack({'train': RECORDS}, tmp_path / 'other', tmp_path / 'absent.txt')


def test_any_reader_of_tfds_finds_the_same(packed):
    builder = tfds.builder_from_directory(packed)
    assert builder.info.splits['train'].num_examples == 20
    assert builder.as_data_source('test')[1]['image_id'] == b'1.png'


def test_records_are_written_as_they_come_however_many(tmp_path, monkeypatch):
    """tfds's other writer keeps a split in memory, and above a GiB asks for TensorFlow to put it on disk."""
    monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 0)
    monkeypatch.setattr(packing, '_SHARD', 3)
    pack({'train': iter(RECORDS), 'test': iter(RECORDS[:3])}, tmp_path / 'set')
    dataset = Dataset.open(tmp_path / 'set')
    assert list(dataset.source('train')) == RECORDS and list(dataset.source('test')) == RECORDS[:3]
    assert list(dataset.source('train[10%:50%]')) == RECORDS[2:10], 'a part of several files'
    assert len(list((tmp_path / 'set').glob('records-train*'))) == 7


def test_splits_follow_tfds_notation_and_pickle(packed):
    dataset = Dataset.open(packed)
    for split, want in [('train[10%:50%]', RECORDS[2:10]), ('test+train[18:]', RECORDS[:3] + RECORDS[18:])]:
        source = pickle.loads(pickle.dumps(dataset.source(split)))
        assert list(source) == want
        assert source.counts[:, 0].tolist() == [len(r.captions) for r in want]
        assert source.counts[:, 1].tolist() == [len(r.questions) for r in want]


def test_phrases_and_frames_come_back(tmp_path):
    where = (('a red half', (0.0, 0.0, 0.5, 1.0)), ('a black half', (0.5, 0.0, 1.0, 1 / 3)))
    grounded = [replace(record(n), phrases=where[: n % 3]) for n in range(4)]
    videos = [Record(f'{n}', frames=(png('red'), png('blue'))[: 1 + n % 2], captions=('it moves',)) for n in range(3)]
    for name, records, columns in (
        ('boxes', grounded, [[0, 0], [1, 0], [2, 0], [0, 0]]),
        ('videos', videos, [[0, 1], [0, 2], [0, 1]]),
    ):
        pack({'train': records}, tmp_path / name)
        source = Dataset.open(tmp_path / name).source('train')
        assert list(source) == records
        assert source.counts[:, 4:].tolist() == columns
    tokenizer = Dataset.open(tmp_path / 'boxes').text_tokenizer
    assert tokenizer.decode(tokenizer.encode('a black half', 8)[0]) == 'a black half', 'phrases train the tokenizers'


def test_a_data_set_packed_before_phrases_and_frames_is_read(packed, tmp_path):
    source = Dataset.open(packed).source('train')
    shutil.copytree(packed, old := tmp_path / 'old')
    with np.load(packed / 'index.npz') as index:
        np.savez(old / 'index.npz', **{split: rows[:, :4] for split, rows in index.items()})
    content = (old / 'content.txt').read_text().splitlines()[0]
    (old / 'content.txt').write_text(f'{content}\n')  # all that there was
    before = Dataset.open(old).source('train')
    np.testing.assert_array_equal(before.counts, source.counts)
    assert before[5] == RECORDS[5]
    assert {'frames', 'phrases', 'boxes'}.isdisjoint(before._features.keys())


def test_the_content_of_old_records_keeps_its_hash(packed):
    assert (packed / packing.CONTENT).read_text().startswith('3c13ebe636db6eda')


def test_feature_arrays_come_back_ragged(tmp_path):
    records = [feature_record(n) for n in range(5)]
    pack({'train': records}, tmp_path / 'set')
    dataset = Dataset.open(tmp_path / 'set')
    assert dataset.feature_shape == (4, 4)
    for want, got in zip(records, dataset.source('train'), strict=True):
        assert got.image is None
        np.testing.assert_array_equal(got.features, want.features)


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_an_array_keeps_its_dtype_in_its_bytes(dtype):
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    data = pack_array(array)
    assert len(data) == 16 + array.nbytes
    np.testing.assert_array_equal(unpack_array(data), array, strict=True)
    assert unpack_array(pack_array(array.T)).shape == (5, 3)


def test_tokenizers_are_trained_on_lower_cased_train_texts(packed):
    dataset = Dataset.open(packed)
    assert dataset.feature_shape is None
    ids = dataset.text_tokenizer.encode('A RED half', 8)[0]
    assert dataset.text_tokenizer.decode(ids) == 'a red half'
    assert len(dataset.lm_tokenizer.ids('what color is it?')) == 5


def test_tokenizers_do_not_see_other_splits(packed, tmp_path):
    pack({'train': RECORDS, 'test': [replace(RECORDS[1], captions=('zygote zygote',))]}, tmp_path / 'set')
    for name in (packing.WORDPIECE, packing.BYTE_BPE):
        assert (tmp_path / 'set' / name).read_bytes() == (packed / name).read_bytes()


def test_the_same_records_pack_to_the_same_fingerprint(packed, tmp_path):
    pack({'train': RECORDS, 'test': RECORDS[:3]}, tmp_path / 'again')
    assert Dataset.open(tmp_path / 'again').fingerprint == Dataset.open(packed).fingerprint
    pack({'train': RECORDS, 'test': RECORDS[:2]}, tmp_path / 'other')
    assert Dataset.open(tmp_path / 'other').fingerprint != Dataset.open(packed).fingerprint


def test_a_second_pack_does_nothing_or_is_refused(packed, capsys):
    before = {f: f.stat().st_mtime_ns for f in packed.iterdir()}
    pack({'train': RECORDS, 'test': RECORDS[:3]}, packed)
    assert 'holds these records already' in capsys.readouterr().out
    with pytest.raises(UserError, match='another packed data set'):
        pack({'train': RECORDS[:5]}, packed)
    assert {f: f.stat().st_mtime_ns for f in packed.iterdir()} == before
    assert not [p for p in packed.parent.iterdir() if 'unfinished' in p.name]


def test_what_was_written_is_said_on_stdout_only_once(tmp_path, capsys):
    pack({'train': RECORDS}, tmp_path / 'set')
    lines = capsys.readouterr().out.splitlines()
    assert 'train 20 records' in lines[0]
    assert sum('wrote' in line for line in lines) == 1


def test_a_table_says_what_each_split_holds(tmp_path, capsys):
    """Captions as stage 1 reads them: cleaned, with both marks; a vocabulary of `train` may lack words of `test`."""
    texts = ['a red half', '(A "red" half!)', 'a red half', 'a red half is half red', 'a half']
    records = [replace(record(n, questions=n % 2), captions=(text,)) for n, text in enumerate(texts)]
    test = [replace(record(9), captions=('half half half ж',)), record(8, captions=0, questions=0)]
    pack({'train': records, 'test': test}, tmp_path / 'set', left_out=[tmp_path / 'a.png', tmp_path / 'b.png'])
    said = capsys.readouterr().out.splitlines()
    rows = {cells[0]: cells[1:] for line in said if len(cells := [c.strip() for c in line.strip('│').split('│')]) > 2}
    assert rows['train'] == ['5', '5', '2', '0', '6 words, 8 tokens', '3 words, 5 tokens', '100.0%']
    assert rows['test'] == ['2', '1', '1', '0', '4 words, 6 tokens', '4 words, 6 tokens', '75.0%']
    assert said[-2:] == [
        "1 of 2 records of 'test' have no text: no stage reads them",
        f'left out: 2 files that no line names, such as {tmp_path / "a.png"}',
    ]


@pytest.mark.parametrize('name, why', [('dev set', 'may have letters'), ('all', 'stands for all splits'), ('a+b', '')])
def test_a_split_that_nothing_can_ask_for_is_refused(name, why, tmp_path):
    with pytest.raises(UserError, match=f"split '{re.escape(name)}': the name of a split {why}.*; rename its folder"):
        pack({'train': RECORDS, name: RECORDS}, tmp_path / 'set')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('count', [3, 19, 24])
@pytest.mark.parametrize('kind', ['folder', 'features'])
def test_the_printed_commands_pass_what_is_checked_before_the_first_step(kind, count, tmp_path, capsys):
    """On exactly this set: long captions and questions, few records; what they start from is not looked at."""
    source = tmp_path / 'my source'
    source.mkdir()
    suffix = '.png' if kind == 'folder' else '.npy'
    questions = [{'question': 'what is it that can be seen on the left here?', 'answers': ['a half']}]
    lines = [{'file': f'{n}{suffix}', 'caption': 'a half ' * (n % 9 + 1), 'questions': questions} for n in range(count)]
    for n, line in enumerate(lines):
        if kind == 'folder':
            pixels = np.full((8, 8, 3), n % 250, np.uint8)
            pixels[0] = n // 250
            Image.fromarray(pixels).save(source / line['file'])
        else:
            np.save(source / line['file'], np.full((2, 4), n, np.float32))
    write_lines(source, *lines)
    cli.run(['data', 'pack', kind, str(tmp_path / 'my set'), '--path', str(source)])
    said = capsys.readouterr().out.partition('next: ')[2]
    commands = [shlex.split(line)[1:] for line in said.splitlines()]
    trained = [words for words in commands if words[0] == 'train']
    assert [words[1].rpartition('_')[2] for words in trained][-4:] == ['stage1', 'language', 'stage2', 'instruct']
    for words in trained:
        default, _ = recipes.load(words[1])
        run = parse(tyro.conf.AvoidSubcommands[Train], words[2:], prog='x', default=Train(default)).config
        dataset = Dataset.open(run.data.path)
        check(run)
        assert check_data(init_params.complete(run, dataset), dataset, devices=1) == [], 'nothing is cut'
        options = {'training': True, 'features': False}
        next(pipeline.batches(init_params.complete(run, dataset), STAGES[run.stage].row_format, dataset,
                              run.data.train_split, **options))  # fmt: skip
    for words in (words for words in commands if words[0] == 'evaluate'):
        split = words[words.index('--split') + 1] if '--split' in words else 'test'
        assert len(dataset.source(split)) >= 1
    assert sum(words[0] == 'evaluate' for words in commands) == 3


def test_a_public_data_set_is_packed_wherever_one_is(tmp_path, monkeypatch):
    """Its files are not those of a folder of one's own: nothing is looked for there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').mkdir()
    monkeypatch.setattr(sources, 'easy_vqa', lambda: {'train': iter(RECORDS), 'test': iter(RECORDS[:3])})
    cli.run(['data', 'pack', 'easy-vqa', 'set'])
    assert len(Dataset.open('set').source('test')) == 3


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'note.txt').write_text('mine')
    with pytest.raises(UserError, match='not a packed data set'):
        pack({'train': RECORDS}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['note.txt']


@pytest.mark.parametrize(
    'splits, message',
    [
        ({'test': RECORDS}, "no split 'train' among test"),
        ({'train': RECORDS, 'test': []}, "split 'test' has no record"),
        ({'train': [record(1, 0, 0)]}, 'no caption, no question and no phrase'),
        ({'train': [Record('x', captions=('a',))]}, 'x: expected a picture, a feature array or frames'),
        ({'train': [record(1), replace(record(2), image=None, frames=(png('red'),))]}, 'kinds: a picture, frames'),
        ({'train': [replace(record(1), frames=(png('red'),))]}, '1.png: expected a picture, a feature array or frames'),
        ({'train': [record(1), feature_record(1)]}, 'several kinds: a picture, features of width 4'),
    ],
)
def test_an_unusable_source_leaves_nothing(tmp_path, splits, message):
    with pytest.raises(UserError, match=message):
        pack(splits, tmp_path / 'set')
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_passes_through(tmp_path):
    def broken():
        yield RECORDS[0]
        raise UserError('captions.jsonl line 2: not JSON')

    with pytest.raises(UserError, match=r'^captions\.jsonl line 2: not JSON$'):
        pack({'train': broken()}, tmp_path / 'set')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'error', [OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('write: No space left on device')]
)
def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch, error):
    def full(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(packing.np, 'savez', full)
    with pytest.raises(UserError, match=r'disk full \(\d+ MiB free\)'):
        pack({'train': RECORDS}, tmp_path / 'set')
    assert list(tmp_path.iterdir()) == []


def test_opening_something_else_is_explained(packed, tmp_path):
    with pytest.raises(UserError, match=rf"no such folder \(nearest: '{packed}'\)"):
        Dataset.open(packed.parent / 'sett')
    with pytest.raises(UserError, match=rf"not a packed data set, it lacks 'content.txt' \(nearest: '{packed}'\)"):
        Dataset.open(packed.parent)
    with pytest.raises(UserError, match=r"no split 'trian' \(nearest: 'train'\); known are train, test"):
        Dataset.open(packed).source('trian')
    with pytest.raises(UserError, match=r"no split 'train\[5%'"):
        Dataset.open(packed).source('train[5%')
    with pytest.raises(UserError, match=r"split 'train\[20:\]' .* is empty"):
        Dataset.open(packed).source('train[20:]')
