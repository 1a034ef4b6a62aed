"""The grounding study: which pages are drawn, and what each variant trains."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from experiments import sweep
from experiments.datasets.icons.choose import Icon
from experiments.grounding import __main__ as study
from qformer_jax import config
from qformer_jax.models import blip2
from qformer_jax.rules import split


def test_pages_to_judge_on_are_other_pages():
    """`test` shows the pictures of training in other company; other splits show pictures of their own."""
    splits = {
        name: [Icon(name, f'{i}', f'thing {i}', '') for i in range(20)] for name in ('train', 'validation', 'vendor')
    }
    planned = study.plan(splits, 40)
    assert {name: len(found) for name, found in planned.items()} == {'train': 40, **dict.fromkeys(study.SPLITS, 2)}
    vendors = {name: {i.vendor for page in found for i in page.icons} for name, found in planned.items()}
    assert vendors == {name: {'train' if name == 'test' else name} for name in planned}
    assert not {page.seed for page in planned['test']} & {page.seed for page in planned['train']}


def test_what_each_variant_trains():
    o = study.Options()
    parts = {}
    for variant in ('joint', 'noise', 'blind'):
        run = study.recipe(o, variant, Path('data'), 0)
        lm = replace(run.model.lm, vocab_size=9)
        qformer = replace(run.model.qformer, vocab_size=9, feature_width=o.width)
        m = replace(run.model, lm=lm, qformer=qformer)
        parts[variant] = set(split(blip2.shapes(m), run.optimizer.rate_rules)[0])
        assert run.objective.instruction_aware == (variant != 'blind')
        assert run.model.vit.positions == ('noise' if variant == 'noise' else 'waves')
    assert set(map(frozenset, parts.values())) == {frozenset({'vit', 'qformer', 'lm_projection', 'grounding'})}


def test_results_stand_beside_those_that_are_there(tmp_path):
    path = tmp_path / 'results.jsonl'
    for steps, seed, test in ((9, 0, 0.1), (5, 1, 0.2), (5, 0, 0.3), (5, 1, 0.4)):
        sweep.keep({'variant': 'joint', 'seed': seed, 'steps': steps, 'test': test}, path)
    rows = map(json.loads, path.read_text().splitlines())
    assert [(row['steps'], row['seed'], row['test']) for row in rows] == [(5, 0, 0.3), (5, 1, 0.4), (9, 0, 0.1)]


def test_a_table_of_waves_tells_neighbours_from_far_places():
    """As large as what patches hold, and the nearer two patches are, the more alike their rows begin."""
    vit = config.VitConfig(image_size=64, patch_size=8, width=256, depth=1, heads=2, mlp_width=4, positions='waves')
    model = blip2.Blip2Module(config.Blip2Config(vit=vit, qformer=None, lm=None))
    table = np.asarray(blip2.init(model, jax.random.key(0))['vit']['position_embedding'])
    rows = table[1:].reshape(8, 8, -1)
    assert not table[0].any() and 0.7 < rows.std() < 1.4
    distance = [np.linalg.norm(rows[3, 0] - rows[3, column]) for column in (1, 4)]
    assert 0 < distance[0] < distance[1]
    assert np.linalg.norm(rows[0, 3] - rows[1, 3]) > 0
