"""The Q-Former against LAVIS in its four uses: queries, text, queries with text (ITM), text after queries (ITG)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import QFORMER, assert_close

from qformer_jax.models import masks
from qformer_jax.models.qformer import ImageMemory, Qformer
from qformer_jax.objectives import captioning

Q = QFORMER.num_queries
WANT = reference.arrays('qformer_modes')
TEXT, TEXT_MASK = WANT['input_ids'], WANT['attention_mask'].astype(bool)
SEES_ALL = np.ones((4, 17), bool)


@pytest.fixture(scope='module')
def use():
    """Return a function that runs `method(model)` with the recorded weights."""
    params = reference.qformer_params('qformer_modes')
    return lambda method: jax.jit(lambda p: Qformer(QFORMER).apply({'params': p}, method=method))(params)


def memory(model: Qformer, mask: np.ndarray) -> ImageMemory:
    """Return the keys and values of the recorded features, which LAVIS recorded behind `ln_vision`."""
    layers = tuple(layer.project_image(WANT['image_embeds']) for layer in model.layer)
    return ImageMemory(layers, jnp.asarray(mask)[:, None, None, :])


def queries_only(model: Qformer, mask: np.ndarray = SEES_ALL):
    return model(masks.unimodal(Q, TEXT_MASK)[:, :, :Q, :Q], image=memory(model, mask))


def captioning_text() -> np.ndarray:
    return np.where(np.arange(TEXT.shape[1]) == 0, QFORMER.vocab_size, TEXT)


def test_queries_alone(use):
    out = use(queries_only)
    assert_close(np.stack(out.hidden_states), WANT['query_only.hidden_states'])
    keys, values = (np.stack([getattr(layer, name) for layer in out.cache]) for name in ('key', 'value'))
    assert_close(keys.swapaxes(2, 3), WANT['query_only.past_keys'])
    assert_close(values.swapaxes(2, 3), WANT['query_only.past_values'])


def test_queries_with_a_masked_picture(use):
    mask = WANT['image_mask_2'].astype(bool)
    assert not mask.all()
    assert_close(use(lambda m: queries_only(m, mask)).queries, WANT['query_only.masked_image.last_hidden_state'])


def test_text_alone(use):
    out = use(lambda m: m(masks.unimodal(Q, TEXT_MASK)[:, :, Q:, Q:], text=TEXT))
    assert_close(np.stack(out.hidden_states), WANT['text_only.hidden_states'])


def test_queries_and_text_see_each_other(use):
    out = use(lambda m: m(masks.bidirectional(Q, TEXT_MASK), image=memory(m, SEES_ALL), text=TEXT))
    assert_close(np.stack(out.hidden_states), WANT['itm.hidden_states'])
    assert_close(out.queries, WANT['itm.hidden_states'][-1, :, :Q])
    assert_close(out.text, WANT['itm.hidden_states'][-1, :, Q:])


def test_captioning_after_the_cached_queries(use):
    text = captioning_text()
    np.testing.assert_array_equal(text, WANT['itg.decoder_input_ids'])

    def run(model):
        rows = masks.multimodal_causal(Q, TEXT_MASK)[:, :, Q:]
        out = model(rows, text=text, prefix=queries_only(model).cache)
        return out.hidden_states, model.word_logits(out.text)

    hidden, logits = use(run)
    assert_close(np.stack(hidden), WANT['itg.hidden_states'])
    assert_close(logits, WANT['itg.logits'])
    counts = WANT['itg.labels'][:, 1:] >= 0
    np.testing.assert_array_equal(counts, TEXT_MASK[:, 1:])
    losses = captioning.token_losses(logits[:, :-1], text[:, 1:], 0.1)
    assert_close((losses * counts).sum(axis=1), WANT['itg.loss_per_row'])
    assert_close(captioning.token_mean(losses, counts), WANT['itg.loss'])


def test_captioning_in_one_pass(use):
    def run(model):
        mask = masks.multimodal_causal(Q, TEXT_MASK)
        return model.word_logits(model(mask, image=memory(model, SEES_ALL), text=captioning_text()).text)

    logits = use(run)
    assert_close(logits, WANT['itg.uncached_logits'])
    assert_close(logits, WANT['itg.logits'])
