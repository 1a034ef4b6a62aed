"""Every recorded case passes, and verification can fail: a wrong weight, size or recording is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qformer_jax import cli, verify
from qformer_jax.errors import UserError
from qformer_jax.rules import flatten, unflatten
from qformer_jax.verify import report, tolerance
from qformer_jax.verify.recorded.comparison import Work

GOLDENS = Path(__file__).parent / 'goldens' / 'lavis'
CASES = sorted(folder.name for folder in GOLDENS.iterdir() if (folder / 'meta.json').exists())


@pytest.fixture(scope='module')
def cases():
    """Return the cases by name, read (and compiled) once."""
    return {name: verify.read(GOLDENS / name) for name in CASES}


def failing(rows):
    return [row.name for row in rows if not row.passed]


@pytest.mark.parametrize('name', CASES)
def test_recorded_arrays_equal_ours(name, cases):
    rows = verify.check(cases[name])
    assert not failing(rows)
    accounted = {row.name for row in rows} | verify.work(cases[name]).left_out.keys()
    assert set(cases[name].arrays) <= accounted
    assert all(row.tolerance <= 1e-5 * row.scale for row in rows)


@pytest.mark.parametrize('name', CASES)
def test_the_stored_noise_is_what_float32_does(name, cases):
    """Measured anew, it gives tolerances that pass, and the stored one is not much wider."""
    work = dataclasses.replace(verify.work(cases[name]), gradients={})  # they have no noise: not computed
    assert work.noise.keys() == work.measurable, f'python tests/measure_noise.py {name}'
    measured = work.measure_noise()
    for row in work.rows(work.params, 'float32'):
        if row.name in measured:
            tolerated = tolerance.float32(work.expected[row.name], measured[row.name])
            assert row.difference <= tolerated, row
            assert row.tolerance <= 4 * tolerated, row


def test_every_weight_matters(cases):
    """Each tensor, nudged, makes a row fail; the same compiled function serves all of them."""
    case = cases['clip_vit']
    flat = flatten(verify.work(case).params)
    unseen = []
    for path, tensor in flat.items():
        nudged = tensor + 0.01 * jnp.cos(jnp.arange(tensor.size, dtype=jnp.float32)).reshape(tensor.shape)
        if not failing(verify.check(case, unflatten(flat | {path: nudged}))):
            unseen.append(path)
    assert not unseen


@pytest.fixture(params=['one', 'all'])
def nan_recorded(request, copy):
    """Return a case that holds one NaN in each of two arrays, or nothing else."""

    def change(arrays):
        for name in ('features', 'block_outputs'):
            (arrays[name] if request.param == 'all' else arrays[name].reshape(-1)[:1])[...] = np.nan

    change_arrays(copy, change)
    return copy


def test_nan_in_a_recording_fails(nan_recorded, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(['verify', str(nan_recorded)])
    assert stop.value.code == 1
    assert capsys.readouterr().out.count('NaN was recorded') == 2


@pytest.fixture
def copy(tmp_path):
    """Return a copy of a case whose files may be changed."""
    shutil.copytree(GOLDENS / 'eva_vit', tmp_path / 'eva_vit')
    return tmp_path / 'eva_vit'


def change_meta(folder, change):
    meta = json.loads((folder / 'meta.json').read_text())
    change(meta)
    (folder / 'meta.json').write_text(json.dumps(meta))


def change_arrays(folder, change):
    with np.load(folder / 'arrays.npz') as file:
        arrays = dict(file)
    change(arrays)
    np.savez(folder / 'arrays.npz', **arrays)


def exit_code(*arguments, capsys):
    """Return the exit code of `qformer verify` and what it printed."""
    try:
        cli.run(['verify', *map(str, arguments)])
    except SystemExit as stop:
        return stop.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_the_command_prints_a_row_an_array(capsys):
    code, out = exit_code(GOLDENS / 'clip_vit', capsys=capsys)
    assert code == 0
    assert all(name in out for name in ('block_outputs', 'pos_interp_5x5', 'keys of vit/layer_1/attention'))
    assert 'not compared, input: pixels' in out
    assert 'all 6 pass' in out


def test_a_wrong_eps_fails(copy, capsys):
    change_meta(copy, lambda meta: meta['config'].update(norm_eps=1e-4))
    code, out = exit_code(copy, capsys=capsys)
    assert code == 1
    assert 'FAIL: block_outputs, features' in out


def test_a_changed_recording_fails_and_is_named(copy, capsys):
    change_arrays(copy, lambda arrays: arrays['pos_interp_3x3'].__iadd__(1e-4))
    code, out = exit_code(copy, capsys=capsys)
    assert code == 1
    assert 'FAIL: pos_interp_3x3\n' in out


def test_an_array_that_nobody_knows_fails(copy, capsys):
    change_arrays(copy, lambda arrays: arrays.update(surprise=np.zeros(3)))
    code, out = exit_code(copy, capsys=capsys)
    assert code == 1
    assert 'nothing here computes it' in out
    assert 'FAIL: surprise\n' in out


@pytest.mark.parametrize('file', ['arrays.npz', 'state_dict.safetensors', 'grads.safetensors', 'meta.json'])
def test_a_truncated_file_is_named(file, copy):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=file):
        cli.run(['verify', str(copy)])


@pytest.mark.parametrize('file', ['arrays.npz', 'state_dict.safetensors', 'meta.json', 'grads.safetensors'])
def test_a_missing_file_is_named(file, copy):
    (copy / file).unlink()
    with pytest.raises(UserError, match=file):
        cli.run(['verify', str(copy)])


def test_a_missing_size_input_or_kind_is_a_user_error(copy):
    change_meta(copy, lambda meta: meta['config'].pop('num_heads'))
    with pytest.raises(UserError, match=r"no 'config\.num_heads'"):
        cli.run(['verify', str(copy)])
    change_arrays(copy, lambda arrays: arrays.pop('block_outputs'))
    with pytest.raises(UserError, match="no 'block_outputs'"):
        cli.run(['verify', str(copy)])
    change_meta(copy, lambda meta: meta['arrays'].pop('block_outputs'))
    with pytest.raises(UserError, match='no known kind of case'):
        cli.run(['verify', str(copy)])
    with pytest.raises(UserError, match='no case given'):
        cli.run(['verify'])


def test_an_array_of_another_shape_is_a_user_error(copy):
    change_arrays(copy, lambda arrays: arrays.update(pixels=arrays['pixels'][:, :2]))
    with pytest.raises(UserError, match=r"'pixels' is \[2, 2, 56, 56\], but meta.json says \[2, 3, 56, 56\]"):
        cli.run(['verify', str(copy)])
    change_meta(copy, lambda meta: meta['arrays']['pixels'].pop('shape'))
    with pytest.raises(UserError, match='do not fit the sizes'):
        cli.run(['verify', str(copy)])


def test_a_case_of_another_depth_is_a_user_error(copy):
    change_meta(copy, lambda meta: meta['config'].update(depth=1))
    with pytest.raises(UserError, match='layer_1'):
        cli.run(['verify', str(copy)])


@pytest.mark.parametrize('name', ['eva_vit', 'qformer_modes', 'stage1_clip'])
def test_bfloat16_is_near(name, cases):
    assert not failing(verify.check(cases[name], dtype='bfloat16'))


def test_what_decides_must_be_float32_in_any_precision():
    def function(params, inputs, dtype, gradients):
        return {name: jnp.ones(3, dtype) for name in ('no_prompt.logits', 'features')}

    want = {name: np.ones(3, np.float32) for name in ('no_prompt.logits', 'features')}
    narrow, hidden = Work({}, {}, function, want, {}, (), {}, frozenset()).rows({}, 'bfloat16')
    assert not narrow.passed and narrow.note == 'is bfloat16, must be float32'
    assert hidden.passed


def test_a_tolerance_is_ten_times_the_noise_and_no_more_than_the_limit():
    expected = np.array([4.0, -1.0], np.float32)
    noise = lambda shift: report.difference(expected, expected + shift)  # noqa: E731
    assert tolerance.float32(expected, noise(0)) == pytest.approx(40 * tolerance.EPSILON)
    assert tolerance.float32(expected, noise(1e-6)) == pytest.approx(1e-5, rel=0.2)
    assert tolerance.float32(expected, noise(1e-3)) == pytest.approx(4e-5)
    assert tolerance.float32(expected.astype(np.int32), noise(1)) == 0


def test_a_failing_number_says_whose_rounding_it_is(copy):
    change_arrays(copy, lambda arrays: arrays['pos_interp_3x3'].__iadd__(1e-4))
    case = verify.read(copy)
    notes = {row.name: row.note for row in verify.work(case).explained(verify.check(case)) if row.note}
    assert list(notes) == ['pos_interp_3x3']
    assert notes['pos_interp_3x3'].endswith(
        'from ours, 6.4e-05 from the recorded'
    )  # 1e-4, where the largest entry is 1.57


def test_nan_infinity_and_another_shape_never_pass():
    one, nan, infinite = np.ones(2), np.array([1, np.nan]), np.array([1, -np.inf])
    assert report.difference(nan, one) == report.difference(one, nan) == np.inf
    assert report.difference(infinite, one) == report.difference(one, one[:1]) == np.inf
    assert report.difference(infinite, infinite) == 0
    assert report.scale(infinite) == 1


def test_bfloat16_leaves_out_what_rounding_can_turn(cases):
    case = cases['stage1_generate']
    assert 'beam3.sequences' not in verify.left_out(case)
    assert 'nearly as likely' in verify.left_out(case, 'bfloat16')['beam3.sequences']
