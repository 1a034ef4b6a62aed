"""The Q-Former in its four uses, over features that are given: queries, text, both, text after queries.

Recorded features stand behind `ln_vision`.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ... import config
from ...convert import lavis
from ...models import blip2, masks
from ...models.qformer import ImageMemory, Qformer, QformerOutput
from ...objectives import captioning
from ...training.loss_context import LossContext
from ...training.stage1_forward import caption
from ...typing import Params
from . import sizes
from .case import Case, params_of
from .collect import plan
from .comparison import Arrays, Work
from .stage1 import IGNORED

INPUTS = ('image_embeds', 'input_ids', 'attention_mask', 'image_mask_2')
UNUSED = ('qformer/(feature_norm|vision_projection|text_projection|itm_head)/.*', 'qformer/temperature')
OBJECTIVE = config.Objective()


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError when sizes and weights do not fit."""
    c = sizes.qformer(case, 'full')
    shapes = blip2.shapes(config.Blip2Config(None, c, None))
    params = params_of(case, lavis.qformer(c), {'qformer': shapes['qformer']}, UNUSED)

    def function(params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        def run(q: Qformer) -> Arrays:
            queries = _queries(q, x, _everything(x))
            masked = _queries(q, x, x['image_mask_2'].astype(bool))
            alone = {
                'query_only.hidden_states': jnp.stack(queries.hidden_states),
                'query_only.past_keys': jnp.stack([layer.key.swapaxes(1, 2) for layer in queries.cache]),
                'query_only.past_values': jnp.stack([layer.value.swapaxes(1, 2) for layer in queries.cache]),
                'query_only.masked_image.last_hidden_state': masked.queries,
            }
            return alone | _text(q, x) | _captioning(q, x, queries)

        return Qformer(c, dtype).apply({'params': params['qformer']}, method=run)

    return plan(case, params, {name: case.array(name) for name in INPUTS}, function)


def _memory(q: Qformer, x: Arrays, mask: jnp.ndarray) -> ImageMemory:
    return q.project_normalised(x['image_embeds'].astype(q.dtype), mask)


def _everything(x: Arrays) -> jnp.ndarray:
    return jnp.ones(x['image_embeds'].shape[:2], bool)


def _queries(q: Qformer, x: Arrays, mask: jnp.ndarray) -> QformerOutput:
    n = q.config.num_queries
    unimodal = masks.unimodal(n, x['attention_mask'].astype(bool))
    return q(unimodal[:, :, :n, :n], image=_memory(q, x, mask))


def _text(q: Qformer, x: Arrays) -> Arrays:
    n, text, valid = q.config.num_queries, x['input_ids'], x['attention_mask'].astype(bool)
    alone = q(masks.unimodal(n, valid)[:, :, n:, n:], text=text)
    both = q(masks.bidirectional(n, valid), image=_memory(q, x, _everything(x)), text=text)
    return {
        'text_only.hidden_states': jnp.stack(alone.hidden_states),
        'itm.hidden_states': jnp.stack(both.hidden_states),
    }


def _captioning(q: Qformer, x: Arrays, queries: QformerOutput) -> Arrays:
    n, valid = q.config.num_queries, x['attention_mask'].astype(bool)
    after = caption(q, queries, x['input_ids'], valid, LossContext(jax.random.key(0), OBJECTIVE))
    mask = masks.multimodal_causal(n, valid)
    at_once = q(mask, image=_memory(q, x, _everything(x)), text=after.text)
    losses = captioning.token_losses(after.logits[:, :-1], after.text[:, 1:], OBJECTIVE.label_smoothing)
    return {
        'itg.decoder_input_ids': after.text,
        'itg.labels': jnp.where(valid, after.text, IGNORED),
        'itg.hidden_states': jnp.stack(after.hidden_states),
        'itg.logits': after.logits,
        'itg.loss': after.loss,
        'itg.loss_per_row': (losses * valid[:, 1:]).sum(axis=1),
        'itg.uncached_logits': q.word_logits(at_once.text),
    }
