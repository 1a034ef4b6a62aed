"""Decoding against the texts that LAVIS wrote (recorded) and against today's transformers (run here)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import EVA, OPT, QFORMER, QUERIES, T5, assert_close

from qformer_jax import config
from qformer_jax.inference import replay
from qformer_jax.models import blip2

STAGE1 = blip2.Blip2(config.Blip2(EVA, QFORMER, None))
STAGE2 = blip2.Blip2(config.Blip2(EVA, QUERIES, OPT))
STAGE2_T5 = blip2.Blip2(config.Blip2(EVA, QUERIES, T5))


def names(case: str) -> list[str]:
    return sorted(reference.meta(case)['generate_kwargs'])


@pytest.fixture(scope='module')
def opt_params():
    return jax.tree.map(jnp.asarray, reference.params('opt_stage2', STAGE2.config))


@pytest.fixture(scope='module')
def t5_params():
    return jax.tree.map(jnp.asarray, reference.params('t5_stage2', STAGE2_T5.config))


@pytest.fixture(scope='module')
def qformer_params():
    """Stage 1's, with the bias of this case, which makes [SEP] likelier."""
    params = reference.params('stage1', STAGE1.config)
    params['qformer']['lm_head']['bias'] = reference.arrays('stage1_generate')['decoder_bias']
    return jax.tree.map(jnp.asarray, params)


def assert_equal(ours: replay.Replay, case: str, name: str) -> None:
    """Every id equal; scores, and for greedy search the logits of every step, to 1e-5 of their scale."""
    want = reference.arrays(case)
    np.testing.assert_array_equal(ours.written.tokens, ours.recorded)
    if ours.step_scores is None:
        assert_close(ours.written.scores.reshape(-1), want[f'{name}.sequences_scores'])
        return
    steps = want[f'{name}.step_scores']
    allowed = np.isfinite(steps)
    np.testing.assert_array_equal(np.isfinite(ours.step_scores), allowed)
    assert_close(np.asarray(ours.step_scores)[allowed], steps[allowed])


@pytest.mark.parametrize('name', names('opt_stage2'))
def test_opt_writes_what_it_writes_in_lavis(name, opt_params):
    arguments, want = reference.meta('opt_stage2')['generate_kwargs'][name], reference.arrays('opt_stage2')
    pixels = want['pixels'][: arguments['input_ids'][0]]
    ours = replay.with_opt(STAGE2, opt_params, pixels, arguments, want[f'{name}.sequences'])
    assert_equal(ours, 'opt_stage2', name)


@pytest.mark.parametrize('name', names('t5_stage2'))
def test_t5_writes_what_it_writes_in_lavis(name, t5_params):
    """One batch of prompts of three lengths, padded on the right."""
    arguments, want = reference.meta('t5_stage2')['generate_kwargs'][name], reference.arrays('t5_stage2')
    kind = name.partition('.')[0]
    prompt = want[f'{kind}.input_ids']
    mask = want[f'{kind}.attention_mask'][:, -prompt.shape[1] :].astype(bool)
    ours = replay.with_t5(STAGE2_T5, t5_params, want['pixels'], prompt, mask, arguments, want[f'{name}.sequences'])
    assert_equal(ours, 't5_stage2', name)


@pytest.mark.parametrize('name', names('stage1_generate'))
def test_the_qformer_writes_what_it_writes_in_lavis(name, qformer_params):
    arguments, want = reference.meta('stage1_generate')['generate_kwargs'][name], reference.arrays('stage1_generate')
    pixels = reference.arrays('stage1')['pixels'][:4]
    ours = replay.with_qformer(STAGE1, qformer_params, pixels, arguments, want[f'{name}.sequences'])
    assert_equal(ours, 'stage1_generate', name)
