"""Features from several blocks of a tower: which they are, what they cost, and who tells them apart."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import reference
import small
from reference import assert_close

from qformer_jax import cli, config
from qformer_jax.convert import published
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.encoder import Encoder
from qformer_jax.errors import UserError
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.models import blip2
from qformer_jax.models.vit import Vit
from qformer_jax.rules import flatten, unflatten
from qformer_jax.runs import run_dir
from qformer_jax.training import init_params, loop

PIXELS = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
TOWER = dataclasses.replace(small.VIT, depth=3, final_norm=True)


def tapped(*taps: int) -> config.VitConfig:
    return dataclasses.replace(TOWER, taps=taps)


def shapes(vit: config.VitConfig) -> dict:
    return flatten(blip2.shapes(config.Blip2Config(vit, qformer=None, lm=None)))


def drawn() -> dict:
    draw = np.random.default_rng(1)
    params = {path: (draw.normal(size=x.shape) / 4).astype(np.float32) for path, x in shapes(TOWER).items()}
    return {'params': unflatten(params)['vit']}


def compiled(vit: config.VitConfig):
    """Return what sees pixels, compiled."""
    return jax.jit(lambda params: Vit(vit).apply(params, PIXELS)).lower(drawn()).compile()


def test_features_are_the_tapped_blocks_side_by_side():
    """In the order of the taps, through the last norm where there is one; the last block alone is no tap at all."""
    all_of_it, two = compiled(TOWER)(drawn()), compiled(tapped(2, 0))(drawn())
    first, _, last = all_of_it.hidden_states
    norm = lambda x: jax.jit(lambda p, x: Vit(TOWER).apply(p, x, method=lambda m, x: m.norm(x)))(drawn(), x)  # noqa: E731
    assert_close(two.features, np.concatenate([norm(last), norm(first)], axis=-1))
    assert_close(all_of_it.features, norm(last))
    assert two.features.shape == (2, 5, tapped(2, 0).feature_width) and TOWER.feature_width == 16


def test_blocks_after_the_last_tap_are_kept_but_not_computed():
    one, three = compiled(tapped(0)), compiled(tapped(0, 2))
    assert len(one(drawn()).hidden_states) == 1
    assert one.cost_analysis()['flops'] < 0.5 * three.cost_analysis()['flops']
    same = {path: x.shape for path, x in shapes(tapped(0)).items()}
    assert same == {path: x.shape for path, x in shapes(TOWER).items()}


def test_a_tap_that_is_no_block_is_named():
    with pytest.raises(UserError, match=r'model\.vit\.taps has 3, but the blocks are numbered 0 to 2'):
        tapped(1, 3)
    with pytest.raises(UserError, match='has -1'):
        tapped(-1)


@pytest.mark.parametrize('choose', [published.for_lavis, published.for_huggingface])
def test_published_towers_have_no_taps(choose):
    vit = dataclasses.replace(reference.EVA, taps=(0, 1))
    qformer = dataclasses.replace(reference.QFORMER, feature_width=vit.feature_width)
    with pytest.raises(UserError, match=r'model\.vit\.taps \(0, 1\)'):
        choose(config.Blip2Config(vit, qformer, lm=None), False)


def test_runs_say_their_taps_and_older_ones_have_none():
    run = config.Run('stage1', config.Blip2Config(tapped(0, 2), lm=None))
    assert config.from_json(config.to_json(run)) == run
    tree = json.loads(config.to_json(run))
    del tree['model']['vit']['taps']
    assert config.from_json(json.dumps(tree)).model.vit == TOWER


@pytest.fixture(scope='module')
def tower(pictures, tmp_path_factory):
    """A finished `vision` run of two blocks."""
    run = small.change(small.recipe('vision', pictures, steps=2), 'optimizer', warmup_steps=1)
    return loop.train(run, tmp_path_factory.mktemp('tower') / 'vision').folder


@pytest.fixture(scope='module')
def features(tower, pictures, tmp_path_factory):
    """The pictures as what both blocks give, and what the command said."""
    out = tmp_path_factory.mktemp('encoded') / 'features'
    cli.run(['data', 'encode', str(pictures), str(out), '--vit', str(tower), '--taps', '0', '1'])
    return out


def from_features(features, tower, taps=(0, 1)) -> config.Run:
    run = small.change(small.recipe('stage1', features, steps=2), 'optimizer', warmup_steps=1)
    run = small.change(run, 'model', vit=dataclasses.replace(run.model.vit, taps=taps))
    return dataclasses.replace(run, start=config.Start(vit=str(tower)))


def test_a_run_reads_tapped_features_in_the_towers_place(features, tower, pictures):
    """The tower's run knows of no taps: they are the reader's, and its weights are found by their digest."""
    dataset = Dataset.open(features)
    run = init_params.complete(from_features(features, tower), dataset)
    assert Encoder.load(features).vit.taps == (0, 1) and run.model.qformer.feature_width == 32
    assert init_params.inputs_of(run, dataset)['vit'] == run_dir.finished(tower).last['vit']
    model = Blip2.load(tower, batch_size=8)
    model = dataclasses.replace(model, run=small.change(model.run, 'model', vit=run.model.vit))
    tower_features = model.encode_images([Dataset.open(pictures).source('test')[0].image]).features
    assert_close(dataset.source('test')[0].features, tower_features[0])
    from_pictures = dataclasses.replace(from_features(features, tower), data=small.recipe('stage1', pictures).data)
    params, _ = init_params.parameters(
        init_params.complete(from_pictures, Dataset.open(pictures)), init_params.inputs_of(run, dataset)
    )
    assert params['vit'].keys() == model.params['vit'].keys(), 'all blocks, from a run without taps'


@pytest.mark.parametrize('taps', [(), (1, 0)])
def test_features_of_other_taps_are_refused(features, tower, tmp_path, taps):
    run = from_features(features, tower, taps)
    with pytest.raises(UserError, match=r'model\.vit\.taps \(0, 1\) there'):
        loop.train(run, tmp_path / 'run')


def test_the_command_says_which_taps_read_them(tower, pictures, tmp_path, capsys):
    cli.run(['data', 'encode', str(pictures), str(tmp_path / 'out'), '--vit', str(tower), '--taps', '1', '0'])
    assert '--data.no-flip --model.vit.taps 1 0' in capsys.readouterr().out


def test_kept_features_of_other_taps_are_others(tower, tmp_path, encoded):
    model = small.keeping(Blip2.load(tower, batch_size=8), tmp_path)
    other = dataclasses.replace(model.run.model.vit, taps=(0,))
    for known, vit in ((False, model.run.model.vit), (True, model.run.model.vit), (False, other), (True, other)):
        encoded.clear()
        changed = dataclasses.replace(model, run=small.change(model.run, 'model', vit=vit))
        changed.encode_images([small.draw_picture('red', 'square')])
        assert bool(encoded) is not known, vit.taps
