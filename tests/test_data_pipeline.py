"""Batches of every stage: what is in them, their order, their shards, and the place they resume at."""

from dataclasses import replace

import numpy as np
import pytest
from data_sets import feature_record, record
from grain import DatasetIterator

from qformer_jax.config import Blip2Config, Data, OptConfig, QformerConfig, Run, Training, VitConfig
from qformer_jax.data import record_cache
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.pack import pack
from qformer_jax.data.pipeline import batches
from qformer_jax.data.tokenizers import prompt_ids
from qformer_jax.data.transforms import eval_image
from qformer_jax.errors import UserError
from qformer_jax.training.stages import STAGES

# Records 0, 4, 8, ... have no caption; records 2, 5, 8, ... no question; 8 has neither.
RECORDS = [record(n, captions=n % 4, questions=(n + 1) % 3) for n in range(20)]
WITH_CAPTION = [n for n in range(20) if n % 4]
WITH_TEXT = [n for n in range(20) if n % 4 or (n + 1) % 3]


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Folder of a packed data set of 20 pictures."""
    out = tmp_path_factory.mktemp('data') / 'pictures'
    pack({'train': RECORDS}, out)
    return out


@pytest.fixture(scope='module')
def arrays(tmp_path_factory):
    """Folder of a packed data set of six feature arrays of 2 to 4 rows, width 4."""
    out = tmp_path_factory.mktemp('data') / 'arrays'
    pack({'train': [feature_record(n) for n in range(6)]}, out)
    return out


VIT = VitConfig(image_size=16, patch_size=8)


def run(path, stage='stage1', vit: VitConfig | None = VIT, batch=4, **data) -> Run:
    """Return a run of that stage over the data set."""
    data = {'max_text': 12, 'max_lm_text': 24, 'question_prompt': ('{question}',)} | data
    model = Blip2Config(vit=vit, qformer=QformerConfig(feature_width=4), lm=OptConfig())
    return Run(stage, model, Data(path=str(path), **data), training=Training(batch_size=batch))


def read(of: Run, *, training=True, shard=(0, 1)) -> DatasetIterator:
    """Return the batches of the run's data set."""
    row_format, dataset = STAGES[of.stage].row_format, Dataset.open(of.data.path)
    return batches(of, row_format, dataset, 'train', training=training, shard=shard)


def rows(of: Run, count: int, *, training=True, shard=(0, 1)) -> list[dict]:
    """Return the first `count` rows, batch by batch."""
    iterator, out = read(of, training=training, shard=shard), []
    while len(out) < count:
        batch = next(iterator)
        out += [{key: value[i] for key, value in batch.items()} for i in range(len(batch['image_id']))]
    return out


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


PICTURE = {'image_id': ((4,), np.int32), 'image': ((4, 16, 16, 3), np.uint8)}
TEXT = {'text': ((4, 12), np.int32), 'text_mask': ((4, 12), np.bool_)}
LM = {'lm_text': ((4, 24), np.int32), 'lm_mask': ((4, 24), np.bool_), 'lm_target': ((4, 24), np.bool_)}
KEYS = {
    'vision': PICTURE | TEXT,
    'stage1': PICTURE | TEXT,
    'stage2': PICTURE | LM,
    'instruct': PICTURE | TEXT | LM,
    'language': {'image_id': ((4,), np.int32)} | LM,
}


@pytest.mark.parametrize('stage', KEYS)
@pytest.mark.parametrize('training', [True, False])
def test_every_stage_has_its_keys(pictures, stage, training):
    batch = next(read(run(pictures, stage), training=training))
    assert {key: (value.shape, value.dtype.type) for key, value in batch.items()} == KEYS[stage]


@pytest.mark.parametrize(
    'stage, wanted', [('stage1', WITH_CAPTION), ('language', WITH_CAPTION), ('instruct', WITH_TEXT)]
)
def test_an_epoch_has_every_useful_record_once(pictures, stage, wanted):
    epochs = rows(run(pictures, stage, batch=len(wanted)), 2 * len(wanted))
    first, second = ([int(r['image_id']) for r in part] for part in (epochs[: len(wanted)], epochs[len(wanted) :]))
    assert sorted(first) == sorted(second) == wanted
    assert first != second
    assert first != wanted


def test_stage1_reads_a_cleaned_caption_of_its_picture(pictures):
    decode = Dataset.open(pictures).text_tokenizer.decode
    drawn = {}
    for row in rows(run(pictures), 300):
        drawn.setdefault(int(row['image_id']), set()).add(decode(row['text'][row['text_mask']]))
    said = lambda n: {c.lower().replace('.', '').strip() for c in RECORDS[n].captions}  # noqa: E731
    assert drawn == {n: said(n) for n in WITH_CAPTION}


def lm_parts(row: dict, tokenizer) -> tuple[str, str, str]:
    """Return context (before bos), prompt, and target of an `instruct` or `stage2` row, as text."""
    ids = row['lm_text'][row['lm_mask']].tolist()
    bos, start = ids.index(tokenizer.special_tokens.begin[0]), int(row['lm_target'].argmax())
    return tuple(tokenizer.decode(part) for part in (ids[:bos], ids[bos + 1 : start], ids[start:]))


def test_stage2_writes_a_caption_and_an_end(pictures):
    tokenizer = Dataset.open(pictures).lm_tokenizer
    for row in rows(run(pictures, 'stage2', caption_prompt=('a third',)), 60):
        context, prompt, target = lm_parts(row, tokenizer)
        assert (context, prompt) == ('', 'a third')
        assert target[0] == ' '
        assert target[1:-1] in {c.lower().replace('.', '') for c in RECORDS[row['image_id']].captions}
        assert target[-1] == '\n'
        start = prompt_ids(tokenizer, 'a third')
        assert row['lm_text'][: len(start)].tolist() == start
        assert (row['lm_text'][~row['lm_mask']] == tokenizer.pad_id).all()
        assert (row['lm_mask'] & ~row['lm_target']).sum() == len(start)


def test_instruct_asks_every_question_and_accepts_every_answer(pictures):
    dataset, drawn = Dataset.open(pictures), set()
    for row in rows(run(pictures, 'instruct', batch=14), 1400):
        _, prompt, target = lm_parts(row, dataset.lm_tokenizer)
        drawn.add((int(row['image_id']), prompt, target))
        read = dataset.text_tokenizer.decode(row['text'])
        assert read == prompt
    wanted = {
        (n, question.lower(), f' {answer}\n')
        for n in WITH_TEXT
        for question, answers in zip(RECORDS[n].questions, RECORDS[n].answers, strict=True)
        for answer in answers
    }
    captions = {(n, '', f'{c.lower().replace(".", "")}\n') for n in WITH_TEXT for c in RECORDS[n].captions
                if not RECORDS[n].questions}  # fmt: skip
    assert drawn == wanted | captions


@pytest.mark.parametrize('stage', ['language', 'instruct'])
def test_the_caption_fraction_is_kept(pictures, stage):
    tokenizer = Dataset.open(pictures).lm_tokenizer
    both = [n for n in WITH_CAPTION if RECORDS[n].questions]
    drawn = rows(run(pictures, stage, caption_fraction=0.25, batch=12), 1200)
    patches = [tokenizer.decode(row['lm_text']).count('?') for row in drawn if row['image_id'] in both]
    assert 0.68 < np.mean(patches) < 0.82


def test_language_rows_have_the_caption_where_the_prefix_will_be(pictures):
    tokenizer = Dataset.open(pictures).lm_tokenizer
    for row in rows(run(pictures, 'language', caption_fraction=0.5), 120):
        ids = row['lm_text'][row['lm_mask']].tolist()
        bos = ids.index(tokenizer.special_tokens.begin[0])
        caption, said = tokenizer.decode(ids[:bos]), tokenizer.decode(ids[bos + 1 :])
        assert '?' in said or said == f'{caption}\n'
        assert ids[-1] == tokenizer.end_id
        assert row['lm_target'].tolist() == [False, *row['lm_mask'][1:].tolist()]


def test_training_resumes_exactly(pictures):
    iterator = read(run(pictures, 'instruct'))
    for _ in range(7):
        next(iterator)
    state, want = iterator.get_state(), [next(iterator) for _ in range(5)]
    other = read(run(pictures, 'instruct'))
    next(other)
    other.set_state(state)
    assert all(same(a, next(other)) for a in want)


def test_the_seed_decides_the_order(pictures):
    first, again = (rows(run(pictures), 8) for _ in range(2))
    assert all(map(same, first, again))
    other = rows(replace(run(pictures), training=Training(batch_size=4, seed=1)), 8)
    assert [int(r['image_id']) for r in first] != [int(r['image_id']) for r in other]


@pytest.mark.parametrize('training', [True, False])
def test_two_hosts_share_the_rows_of_one(pictures, training):
    one = rows(run(pictures), 32, training=training)  # 15 records: more than two passes
    hosts = [rows(run(pictures), 16, training=training, shard=(i, 2)) for i in range(2)]
    assert all(map(same, one[0::2], hosts[0]))
    assert all(map(same, one[1::2], hosts[1]))


def test_validation_is_the_same_every_pass_and_not_augmented(pictures):
    twice = rows(run(pictures, batch=7), 28, training=False)
    assert all(map(same, twice[:14], twice[14:]))
    assert [r['image_id'] for r in twice[:14]] == WITH_CAPTION[:14]
    for row in twice[:14]:
        np.testing.assert_array_equal(row['image'], eval_image(RECORDS[row['image_id']].image, 16))


def test_training_pictures_are_augmented(pictures):
    plain = {n: eval_image(RECORDS[n].image, 16) for n in WITH_CAPTION}
    still = rows(run(pictures, crop_scale=(1.0, 1.0), flip=False), 30)
    assert all(np.array_equal(r['image'], plain[int(r['image_id'])]) for r in still)
    moved = rows(run(pictures), 60)
    assert sum(np.array_equal(r['image'], plain[int(r['image_id'])]) for r in moved) < 20


def test_rows_do_not_depend_on_what_is_kept_in_memory(pictures, monkeypatch):
    kept = rows(run(pictures), 40)
    monkeypatch.setattr(record_cache, '_BUDGET', 0)
    assert all(map(same, kept, rows(run(pictures), 40)))


@pytest.mark.parametrize('patches, padded', [(0, 4), (6, 6)])
def test_features_are_padded_and_masked(arrays, patches, padded):
    for row in rows(run(arrays, vit=None, max_patches=patches), 12):
        number, count = int(row['image_id']), 2 + int(row['image_id']) % 3
        assert row['features'].shape == (padded, 4)
        assert row['features'].dtype == np.float32
        assert row['feature_mask'].tolist() == [True] * count + [False] * (padded - count)
        np.testing.assert_array_equal(row['features'], (row['feature_mask'] * (number + 1.0))[:, None].repeat(4, 1))


def test_a_run_that_does_not_fit_is_refused(pictures, arrays):
    wrong = [
        (run(pictures, batch=16), r'batch_size 16 exceeds the 15 records'),
        (run(pictures, vit=None), r'holds pictures, and the run has no vision tower'),
        (run(arrays), r'holds feature arrays, and the run a vision tower'),
        (run(arrays, vit=None, max_patches=3), r'max_patches 3: .* array of 4 rows'),
    ]
    model = run(arrays, vit=None).model
    for part in ({'qformer': QformerConfig(feature_width=8)}, {'qformer': QformerConfig(feature_width=4, vocab_size=5)},
                 {'lm': OptConfig(vocab_size=7)}):  # fmt: skip
        wrong.append((replace(run(arrays, vit=None), model=replace(model, **part)), r'feature_width|vocab_size [57]'))
    for bad, message in wrong:
        with pytest.raises(UserError, match=message):
            read(bad)
    with pytest.raises(UserError, match='does not divide among 3 hosts'):
        read(run(pictures), shard=(0, 3))


def test_a_row_without_room_for_its_answer_is_refused(pictures):
    with pytest.raises(UserError, match='max_lm_text 4: no room for the answer'):
        rows(run(pictures, 'instruct', max_lm_text=4), 40)
