"""What is said of the first step, and which images are too few."""

import dataclasses
import math

import numpy as np
import pytest
from data_sets import feature_record, record
from small import change, recipe, without_tower

from qformer_jax.data import pipeline
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.pack import pack
from qformer_jax.training import first_step, init_params
from qformer_jax.training.check_data import check_data
from qformer_jax.training.stages import STAGES


def batch(*captions: int) -> dict[str, np.ndarray]:
    """Return rows whose texts are equal where the numbers are."""
    return {'text': np.array([[1, number, 2] for number in captions], np.int32)}


@pytest.mark.parametrize(
    'captions, rule, said',
    [
        ((1, 2, 3, 4), 'shared', '3.0 of 4 negatives'),
        ((1, 1, 2, 3), 'shared', '2.5 of 4 negatives'),  # 2, 2, 3, 3
        ((1, 1, 2, 3), 'diagonal', '3.0 of 4 negatives'),
        ((1, 1, 1, 1), 'shared', 'Warning: no row has a negative, since captions are equal'),
    ],
)
def test_negatives_are_counted_in_the_first_batch(captions, rule, said):
    run = change(recipe('stage1', 'data'), 'objective', positives=rule)
    assert said in first_step.say_negatives(run, batch(*captions))


def test_a_guess_is_known_only_where_weights_begin_from_scratch():
    run = recipe('stage1', 'data')
    run = change(run, 'model', qformer=dataclasses.replace(run.model.qformer, vocab_size=30))
    guesses = first_step.expected(run, {'vit': 'pretrained runs/vit', 'qformer': 'scratch'})
    values = {name: value for name, (value, _) in guesses.items()}
    prior = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
    assert values == pytest.approx({'itc': math.log(8), 'itm': prior, 'itg': math.log(30)})
    assert first_step.expected(run, {'vit': 'scratch', 'qformer': 'checkpoint runs/a'}) == {}
    assert first_step.expected(change(run, 'objective', itm=0.0), {'qformer': 'scratch'}).keys() == {'itc', 'itg'}
    for stage in ('stage2', 'instruct'):
        assert first_step.expected(recipe(stage, 'data'), {'qformer': 'scratch', 'lm': 'pretrained runs/lm'}) == {}


def test_both_lines_name_the_metrics():
    guesses = {'itc': (math.log(8), 'ln 8, the texts of a step')}
    assert first_step.say_expected(guesses) == '  a network that guesses has: itc 2.08 (ln 8, the texts of a step) nats'
    assert first_step.say_seen(guesses, {'itc': 2.5}) == '  step 1, and what a guess would be: itc 2.50 (2.08)'


def test_every_guess_is_of_a_metric_of_its_stage():
    """`loss`, or the name of a term: `say_seen` looks them up."""
    for stage, entry in STAGES.items():
        run = recipe(stage, 'data')
        parts = {name: dataclasses.replace(part, vocab_size=9) for name in ('qformer', 'lm')
                 if (part := getattr(run.model, name))}  # fmt: skip
        run = change(run, 'model', **parts, word_head=9)
        assert entry.guess(run).keys() <= {'loss', *(term.name for term in entry.terms)}


def warnings_of(*sets: list[int], folder) -> list[str]:
    """Return what is said of the images of data sets, each with records of these images."""
    for name, images in enumerate(sets):
        records = [dataclasses.replace(feature_record(image), image_id=str(n)) for n, image in enumerate(images)]
        pack({'train': records}, folder / str(name))
    opened = [Dataset.open(folder / str(name)) for name in range(len(sets))]
    dataset = dataclasses.replace(opened[0], others=tuple(opened[1:]))
    run = without_tower(recipe('stage2', folder / '0'))
    said = check_data(init_params.complete(run, dataset), dataset, devices=1)
    return [line for line in said if 'hold the same image' in line]


@pytest.mark.parametrize('same', [True, False])
def test_one_image_in_all_records_is_a_warning(same, tmp_path):
    assert (warnings_of([0 if same else n for n in range(12)], folder=tmp_path) != []) is same


def test_another_image_anywhere_is_enough(tmp_path):
    """At a place that a sample of every second record leaves out; in the second of two data sets."""
    assert warnings_of([0] * 127 + [3], folder=tmp_path / 'late') == []
    assert warnings_of([0] * 9, [3] * 9, folder=tmp_path / 'beside') == []
    assert "all 18 records of 'train'" in warnings_of([0] * 9, [0] * 9, folder=tmp_path / 'both')[0]


def test_records_are_named_by_what_a_batch_holds_of_them(tmp_path):
    """Positions of several data sets: those of the first, then those of the second."""
    for name, numbers in (('a', range(3)), ('b', range(5, 9))):
        pack({'train': [record(n) for n in numbers]}, tmp_path / name)
    dataset = dataclasses.replace(Dataset.open(tmp_path / 'a'), others=(Dataset.open(tmp_path / 'b'),))
    assert pipeline.names(dataset, 'train', [0, 2, 3, 6]) == ['0.png', '2.png', '5.png', '8.png']
    assert pipeline.names(dataset, 'train[1:]', [0, 1, 2]) == ['1.png', '2.png', '6.png']
