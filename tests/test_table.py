"""The conversion engine: every tensor exactly once, both sides named when not, and rows that read both ways."""

import jax
import numpy as np
import pytest
from reference import tensors

from qformer_jax import config
from qformer_jax.convert import lavis, opt, table
from qformer_jax.convert.lazy_tensors import Tensor, in_memory, outline, read_all
from qformer_jax.convert.table import (
    Derived,
    Ignored,
    NewlyInitialized,
    Row,
    check_complete,
    check_derived,
    convert,
    linear,
    prefixed,
    row_of,
    to_jax,
    to_torch,
)
from qformer_jax.errors import UserError

ROWS = (
    *linear('block.{i}.fc', 'layer_{i}/up'),
    Derived('position_ids', (), lambda: np.arange(4)),
    Derived('tied', ('layer_0/up/bias',), lambda bias: bias),
    Ignored('head', 'classes of another task'),
)
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


def test_the_way_back_writes_second_names_and_buffers_and_nothing_ignored():
    torch_state = read_all(to_torch(ROWS, to_jax(ROWS, in_memory(STATE | {'head': WEIGHT}))))
    assert torch_state.keys() == {*STATE, 'tied'}
    for key, value in (STATE | {'tied': BIAS}).items():
        np.testing.assert_array_equal(torch_state[key], value)
        assert torch_state[key].dtype == value.dtype


def test_nothing_is_read_before_it_is_asked_for():
    def fail():
        raise AssertionError('read too early')

    state = {'block.0.fc.weight': Tensor((2, 3), np.dtype(np.float16), fail)}
    jax_state = to_jax(ROWS, state)
    assert jax_state['layer_0/up/kernel'].shape == (3, 2) and jax_state['layer_0/up/kernel'].dtype == np.float16
    assert to_torch(ROWS, jax_state)['block.0.fc.weight'].shape == (2, 3)


@pytest.mark.parametrize(
    'change, message',
    [
        (
            {'block.0.gc.weight': WEIGHT},
            r"no row .* key 'block\.0\.gc\.weight' \[2, 3\].*nearest: 'block\.0\.fc\.weight",
        ),
        ({'block.1.fc.bias': BIAS}, r"'layer_1/up/bias', which the model does not have.*nearest: 'layer_0/up/bias'"),
        ({'block.0.fc.bias': WEIGHT}, r"'layer_0/up/bias' is \[2, 3\] in the file, but the model expects \[2\]"),
        ({'position_ids': np.arange(1, 5)}, r"'position_ids' \[4\] differs from the constant"),
        ({'tied': 2 * BIAS}, r"'tied' \[2\] differs from 'layer_0/up/bias'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(UserError, match=message):
        convert(ROWS, STATE | change, WANTED)


def test_a_fused_tensor_that_does_not_split_is_named():
    rows = (Row('qkv', ('q', 'k', 'v'), table.SPLIT_QKV),)
    with pytest.raises(UserError, match=r"'qkv' \[4\] cannot be 'q', 'k', 'v'"):
        to_jax(rows, in_memory({'qkv': np.zeros(4)}))


def test_two_tensors_for_one_parameter_are_named():
    twice = (*ROWS, Row('copy', ('layer_0/up/bias',)))
    with pytest.raises(UserError, match=r"'block\.0\.fc\.bias' and 'copy' are both 'layer_0/up/bias'"):
        convert(twice, STATE | {'copy': BIAS}, WANTED)
    with pytest.raises(UserError, match=r"'layer_0/up/bias' is both 'block\.0\.fc\.bias' and 'copy'"):
        to_torch(twice, to_jax(ROWS, in_memory(STATE)))


def test_a_parameter_without_a_row_or_a_fused_part_is_named():
    jax_state = in_memory({'layer_0/up/kernel': WEIGHT, 'gate': BIAS})
    with pytest.raises(UserError, match=r"no row of the table has the parameter 'gate' \(1 in all\)"):
        to_torch(ROWS, jax_state)
    with pytest.raises(UserError, match=r"'qkv' needs 'k', which the model does not have"):
        to_torch((Row('qkv', ('gate', 'k'), table.SPLIT_LAST_ROW),), jax_state)


def test_an_unfilled_parameter_is_named_unless_a_row_excuses_it():
    wanted = WANTED | {'head': {'bias': shape(5)}}
    with pytest.raises(UserError, match=r"1 of the model's 3 parameters, first 'head/bias'.*gives 2: layer_0"):
        convert(ROWS, STATE, wanted)
    jax_state = to_jax(ROWS, in_memory(STATE))
    excuse = NewlyInitialized('head/bias', 'not in this family')
    assert check_complete(jax_state, wanted, (excuse,)) == {'head/bias': excuse}


def test_a_second_name_without_its_first_is_named():
    with pytest.raises(UserError, match=r"'tied' repeats 'layer_0/up/bias', which the file does not hold"):
        check_derived(ROWS, in_memory({'tied': BIAS}), {})


def test_a_number_is_the_same_wherever_it_stands():
    rows = prefixed((Row('a.{i}.b.{i}', ('x_{i}',)),), 'model.')
    assert row_of(rows, 'model.a.12.b.12')[1] == {'i': '12'}
    assert row_of(rows, 'model.a.1.b.2') is None and row_of(rows, 'a.1.b.1') is None


@pytest.mark.parametrize(
    'transform, sizes',
    [
        (table.IDENTITY, (3,)),
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
    assert transform.backward(*transform.forward(outline(sizes))).shape == sizes


CASES = {
    'eva_vit': lavis.EVA_VIT,
    'clip_vit': lavis.CLIP_VIT,
    'stage1': lavis.blip2(config.Blip2Config(config.VitConfig(), config.QformerConfig(max_positions=40), None)),
    'stage1_clip': lavis.blip2(
        config.Blip2Config(config.VitConfig(pre_norm=True), config.QformerConfig(max_positions=40), None)
    ),
    'opt_stage2': lavis.blip2(config.Blip2Config(qformer=config.QformerConfig(max_positions=40, text_side='none'))),
}


@pytest.mark.parametrize('case', CASES)
def test_recorded_state_dicts_return_bit_for_bit(case):
    torch_state = tensors(case, 'state_dict')
    again = read_all(to_torch(CASES[case], to_jax(CASES[case], in_memory(torch_state))))
    assert again.keys() == torch_state.keys()
    for key, value in torch_state.items():
        np.testing.assert_array_equal(again[key], value)
        assert again[key].dtype == value.dtype


@pytest.mark.parametrize('rows', [*CASES.values(), opt.opt(config.OptConfig(embed_width=512))])
def test_each_key_template_stands_once(rows):
    """First match wins, so a second row for a key would hide a mistake."""
    keys = [row.key for row in rows]
    assert len(keys) == len(set(keys))
