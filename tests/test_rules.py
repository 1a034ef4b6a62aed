"""The rule engine: total, first match wins, and `split` loses nothing."""

import numpy as np
import pytest

from qformer_jax.errors import UserError
from qformer_jax.rules import flatten, match, merge, split, vit_layer_decay

PARAMS = {
    'vit': {'layer_0': {'mlp': {'up': {'kernel': np.ones(2)}}}, 'class_token': np.zeros(2)},
    'qformer': {'query_token': np.full(3, 7.0)},
}


def test_first_match_wins():
    rules = ((r'vit/layer_0/.*', 0.5), (r'vit/.*', None), (r'.*', 1.0))
    assert match(rules, flatten(PARAMS)) == {
        'qformer/query_token': 1.0,
        'vit/class_token': None,
        'vit/layer_0/mlp/up/kernel': 0.5,
    }


def test_a_rule_matches_whole_paths_only():
    with pytest.raises(UserError, match=r"'vit/class_token'"):
        match((('vit', 1.0),), ['vit/class_token'])


def test_a_path_without_a_rule_is_named():
    with pytest.raises(UserError, match=r"no rule matches parameter 'qformer/query_token'.*\('\.\*', value\)"):
        match(((r'vit/.*', 1.0),), flatten(PARAMS))


@pytest.mark.parametrize('frozen', [r'vit/.*', r'.*', r'nothing'])
def test_merge_undoes_split(frozen):
    trainable, kept = split(PARAMS, ((frozen, None), (r'.*', 1.0)))
    assert not flatten(trainable).keys() & flatten(kept).keys()
    assert all(path.startswith('vit/') for path in flatten(kept)) or frozen == r'.*'
    merged = flatten(merge(trainable, kept))
    assert merged.keys() == flatten(PARAMS).keys()
    assert all(merged[path] is array for path, array in flatten(PARAMS).items())


def test_vit_layer_decay_worked_example():
    paths = {
        'vit/class_token': 0.125,
        'vit/patch_projection/kernel': 0.125,
        'vit/position_embedding': 0.125,
        'vit/pre_norm/scale': 0.125,
        'vit/layer_0/mlp/up/kernel': 0.25,
        'vit/layer_1/attention/key/kernel': 0.5,
        'vit/norm/scale': 1.0,
        'qformer/query_token': 1.0,
    }
    assert match((*vit_layer_decay(2, 0.5), ('.*', 1.0)), paths) == paths
