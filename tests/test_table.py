"""The conversion engine: every tensor exactly once, both sides named when not, and transforms that invert."""

import re

import jax
import numpy as np
import pytest
from reference import tensors

from qformer_jax.convert import lavis, table
from qformer_jax.convert.table import Row, convert, linear
from qformer_jax.errors import UserError

ROWS = (*linear(r'block\.(\d)\.fc', r'layer_\1/up'), Row('position_ids', ()))
WEIGHT, BIAS = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)
STATE = {'block.0.fc.weight': WEIGHT, 'block.0.fc.bias': BIAS, 'position_ids': np.arange(4)}


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


WANTED = {'layer_0': {'up': {'kernel': shape(3, 2), 'bias': shape(2)}}}


def test_every_tensor_finds_its_place():
    params = convert(ROWS, STATE, WANTED)
    np.testing.assert_array_equal(params['layer_0']['up']['kernel'], WEIGHT.T)
    np.testing.assert_array_equal(params['layer_0']['up']['bias'], BIAS)


def test_dtype_is_the_models():
    halves = {key: value.astype(np.float16) for key, value in STATE.items()}
    assert convert(ROWS, halves, WANTED)['layer_0']['up']['kernel'].dtype == np.float32


@pytest.mark.parametrize(
    'change, message',
    [
        ({'block.0.gc.weight': WEIGHT}, r"no row of the table matches 'block\.0\.gc\.weight' \(2, 3\)"),
        ({'block.1.fc.bias': BIAS}, r"'block\.1\.fc\.bias' becomes 'layer_1/up/bias'.*nearest: 'layer_0/up/bias'"),
        ({'block.0.fc.bias': WEIGHT}, r"'block\.0\.fc\.bias' \(2, 3\) becomes 'layer_0/up/bias'.*expects \(2,\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(UserError, match=message):
        convert(ROWS, STATE | change, WANTED)


def test_two_tensors_for_one_parameter_are_named():
    twice = (*ROWS, Row('copy', ('layer_0/up/bias',)))
    with pytest.raises(UserError, match=r"'block\.0\.fc\.bias' and 'copy' both become 'layer_0/up/bias'"):
        convert(twice, STATE | {'copy': BIAS}, WANTED)


def test_an_unfilled_parameter_is_named_unless_it_is_allowed_to_miss():
    wanted = WANTED | {'head': {'bias': shape(5)}}
    with pytest.raises(UserError, match=r"1 of the model's 3 parameters, first 'head/bias'.*3 tensors: block\.0"):
        convert(ROWS, STATE, wanted)
    with pytest.raises(UserError, match='head/bias'):
        convert(ROWS, STATE, wanted, allow_missing=('head',))
    np.testing.assert_array_equal(convert(ROWS, STATE, wanted, allow_missing=('head/.*',))['head']['bias'], np.zeros(5))


@pytest.mark.parametrize(
    'transform, sizes',
    [
        (table.KEEP, (3,)),
        (table.TRANSPOSE, (2, 3)),
        (table.CONVOLUTION, (5, 3, 2, 4)),
        (table.SPLIT_QKV, (6,)),
        (table.SPLIT_QKV_TRANSPOSE, (6, 4)),
        (table.SPLIT_LAST_ROW, (5, 2)),
        (table.drop_axes(2), (1, 1, 4)),
        (table.drop_axes(1), (1, 1, 4)),
    ],
)
def test_backward_undoes_forward(transform, sizes):
    array = np.random.default_rng(0).normal(size=sizes)
    np.testing.assert_array_equal(transform.backward(*transform.forward(array)), array)


@pytest.mark.parametrize('case', ['eva_vit', 'clip_vit', 'stage1', 'stage1_clip', 'opt_stage2'])
def test_each_recorded_key_has_one_row(case):
    """First match wins, so a second one would hide a mistake."""
    for key in tensors(case, 'state_dict'):
        assert len([row for row in lavis.BLIP2 if re.fullmatch(row.key, key)]) == 1, key
