"""Stage 1, beside what `test_verify.py` compares with LAVIS: the captioning mean, and keys of wrong pictures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference
from reference import EVA, QFORMER, assert_close, assert_gradients_close, nhwc

from qformer_jax import config
from qformer_jax.models import blip2
from qformer_jax.objectives import captioning
from qformer_jax.objectives.matching import Negatives
from qformer_jax.training import losses
from qformer_jax.training.loss_context import LossContext

MODEL = config.Blip2Config(EVA, QFORMER, None)


def test_the_captioning_mean_is_per_shard_or_global():
    """Numbers from the recordings: mean of two processes' means, and the mean over all tokens of the batch."""
    want = reference.arrays('stage1')
    text, counts = want['input_ids'][:, 1:], want['attention_mask'][:, 1:].astype(bool)
    token_losses = captioning.token_losses(want['lm_logits'][:, :-1], text, 0.1)
    assert abs(captioning.token_mean(token_losses, counts, shards=2) - 11.46747) < 1e-5
    assert abs(captioning.token_mean(token_losses, counts) - 11.46437) < 1e-5
    assert abs(captioning.token_mean(token_losses, counts) - want['loss_lm']) < 1e-5


def test_keys_of_wrong_pictures_may_be_shared_or_projected_again():
    """`share_image_keys` moves data differently, and nothing else: loss and gradients within 1e-6."""
    want, params = reference.arrays('stage1'), reference.params('stage1', MODEL)
    available = np.ones(6, bool)
    negatives = Negatives(want['neg_image_idx'], want['neg_text_idx'], available, available)
    batch = {
        'feature_mask': jnp.arange(17)[None] < jnp.arange(12, 18)[:, None],
        'text': jnp.asarray(want['input_ids']),
        'text_mask': jnp.asarray(want['attention_mask'].astype(bool)),
        'image_id': jnp.arange(6),
    }

    @functools.partial(jax.jit, static_argnames='share')
    @jax.value_and_grad
    def loss(params, share):
        def run(model):
            features = model.vit(nhwc(want['pixels'])).features
            options = {'negatives': negatives, 'share_image_keys': share}
            whole = batch | {'features': features}
            return losses.stage1(model, whole, LossContext(jax.random.key(0), config.Objective(), **options))[0]

        return blip2.Blip2Module(MODEL).apply({'params': params}, method=run)

    shared, shared_gradients = loss(params, share=True)
    again, gradients = loss(params, share=False)
    assert_close(shared, again, 1e-6)
    assert_gradients_close(shared_gradients, jax.tree.map(np.asarray, gradients), 1e-6)
