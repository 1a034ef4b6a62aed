"""The loss at targets: the numbers and gradients of the whole output table, which is read only where a target is."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from reference import assert_close

from qformer_jax import config
from qformer_jax.models import target_losses as module
from qformer_jax.models.blip2 import Blip2Module
from qformer_jax.models.target_losses import target_losses
from qformer_jax.objectives import captioning

LLAMA = config.LlamaConfig(
    vocab_size=30, width=8, depth=1, heads=2, kv_heads=1, head_width=4, mlp_width=12, max_positions=30, tied=True
)
T5 = config.T5Config(vocab_size=30, width=8, depth=1, decoder_depth=1, heads=2, head_width=4, mlp_width=12)
DRAW = np.random.default_rng(0)
HIDDEN = DRAW.normal(size=(4, 20, 8)).astype(np.float32)
TARGETS = DRAW.integers(30, size=(4, 20))
COUNTS = {
    'few': DRAW.random((4, 20)) < 0.2,
    'half': DRAW.random((4, 20)) < 0.5,
    'all': np.ones((4, 20), bool),
    'none': np.zeros((4, 20), bool),
}


def whole_table(model: Blip2Module, hidden, targets, counts):
    """The same numbers from all logits."""
    logits = model.lm.word_logits(hidden)
    return captioning.token_losses(logits, targets) * counts, (logits.argmax(-1) == targets) & counts


@pytest.fixture(scope='module', params=[LLAMA, T5], ids=['tied', 'untied'])
def network(request):
    """A model of its language model alone, and its parameters."""
    model = Blip2Module(config.Blip2Config(None, None, request.param))
    return model, model.init(jax.random.key(0), method='init_all_parts')['params']


@pytest.mark.parametrize('kind', COUNTS)
def test_losses_and_gradients_are_those_of_the_whole_table(network, kind):
    model, params = network
    weights = DRAW.normal(size=(4, 20))

    @jax.jit
    def outcome(params, hidden):
        def total(params, hidden, function):
            found = nn.apply(function, model)({'params': params}, hidden, TARGETS, COUNTS[kind])
            return (found[0] * weights).sum(), found

        both = (target_losses, whole_table)
        return [jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, hidden, f) for f in both]

    ((_, found), slopes), ((_, wanted), wanted_slopes) = outcome(params, HIDDEN)
    assert_close(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])
    jax.tree.map(assert_close, slopes, wanted_slopes)
    assert (np.abs(slopes[1]).sum(axis=-1) > 0).tolist() == COUNTS[kind].tolist()


@pytest.mark.parametrize('kept, read', [([0, 0], []), ([3, 4], [4]), ([2, 9], [4, 4, 8]), ([17, 1], [4, 4, 4, 8])])
def test_the_table_is_read_in_as_many_pieces_as_the_longest_target_needs(monkeypatch, kept, read):
    widths, read_table = [], module._read_table

    def watched(lm, hidden, targets, counts):
        jax.debug.callback(lambda x: widths.append(x.shape[1]), hidden)
        return read_table(lm, hidden, targets, counts)

    monkeypatch.setattr(module, '_read_table', watched)
    model = Blip2Module(config.Blip2Config(None, None, LLAMA))
    params = model.init(jax.random.key(0), method='init_all_parts')['params']
    counts = np.arange(20) >= 20 - np.array(kept)[:, None]  # at the right, as targets after a prompt
    run = jax.jit(lambda hidden: nn.apply(target_losses, model)({'params': params}, hidden, TARGETS[:2], counts))
    jax.block_until_ready(run(HIDDEN[:2]))
    jax.effects_barrier()
    assert sorted(widths) == read
