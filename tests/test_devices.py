"""Eight devices give the losses of one: the batch is global, wherever its rows lie."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import small
from small import change, recipe

from qformer_jax import config
from qformer_jax.convert.lazy_tensors import in_memory
from qformer_jax.data.dataset import Dataset
from qformer_jax.data.pack import BYTE_BPE
from qformer_jax.errors import UserError
from qformer_jax.models import blip2
from qformer_jax.parallel.mesh import check_batch, data_mesh
from qformer_jax.rules import flatten
from qformer_jax.runs import import_export
from qformer_jax.training import logs, loop

STEPS = 3
STAGES = ('stage1', 'stage2', 'instruct')


def tiny(stage: str, data: Path, voice: Path) -> config.Run:
    """Return three steps of 16 rows, two a device, with dropout; ITC and ITM need the rows of the other devices.

    Each step draws how many queries exist; in `instruct` the voice learns too, by LoRA; in `stage2` it reads a
    resampler's tokens through gates, and validates on fewer rows than there are devices.
    """
    run = change(recipe(stage, data, steps=STEPS), 'training', batch_size=16)
    run = change(run, 'objective', nested_queries=True)
    shallow = {'vit': small.VIT, 'qformer': small.QFORMER, 'lm': small.OPT}
    parts = {name: dataclasses.replace(part, depth=1) for name, part in shallow.items()}
    run = change(run, 'optimizer', warmup_steps=1)
    if stage == 'stage1':
        return change(run, 'model', **(parts | {'lm': None}))
    if stage == 'stage2':
        resampler = config.ConnectorConfig('resampler', tokens=4, width=16, depth=1, heads=2, mlp_width=32)
        gates = config.GatesConfig(every=1, heads=2, mlp_width=32)
        run = change(run, 'objective', nested_queries=False)
        run = change(run, 'data', validation_split='test[:3]')
        parts |= {'qformer': None, 'connector': resampler, 'time': config.TimeConfig(2), 'gates': gates}
    run = change(run, 'model', **parts, lora=config.LoraConfig(rank=2) if stage == 'instruct' else None)
    return dataclasses.replace(run, start=config.Start(lm=str(voice), scratch=('vit',)))


@pytest.fixture(scope='module')
def voice(pictures, tmp_path_factory) -> Path:
    """Return a run of a language model that learned nothing."""
    rows = Dataset.open(pictures).lm_tokenizer.vocab_size
    model = config.Blip2Config(None, None, dataclasses.replace(small.OPT, depth=1, vocab_size=rows))
    draw = np.random.default_rng(0)
    arrays = {path: draw.normal(size=x.shape).astype('f') / 4 for path, x in flatten(blip2.shapes(model)).items()}
    folder = tmp_path_factory.mktemp('voice') / 'voice'
    made = import_export.Model(config.Run('language', model), in_memory(arrays), (), ())
    import_export.import_checkpoint(made, folder, lm=pictures / BYTE_BPE)
    return folder


@pytest.mark.parametrize('stage', STAGES)
def test_eight_devices_give_the_losses_of_one(pictures, voice, tmp_path, capsys, stage):
    for devices in (1, 8):
        loop.train(tiny(stage, pictures, voice), tmp_path / f'{devices}', mesh=data_mesh(devices))
        assert f'{devices} cpu device(s)' in capsys.readouterr().err
    one, eight = logs.records(tmp_path / '1'), logs.records(tmp_path / '8')
    assert len(one) == len(eight) == STEPS + (stage == 'stage2')
    assert stage == 'stage2' or len({record['queries'] for record in one}) > 1
    for a, b in zip(one, eight, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {'kind', 'timing'}:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-5, err_msg=f'{name}, step {a["step"]}')


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(UserError, match=r'batch size 10 .* 1 device\(s\) x 4 micro-batch\(es\): .* such as 8'):
        check_batch(data_mesh(1), 10, 4)
