"""Stage 2 with T5 (case `t5_stage2`): the encoder reads queries and prompt, the decoder writes the answer."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from ... import config
from ...convert import lavis
from ...models import blip2
from ...typing import Array, Params
from . import generation, sizes, stage2, writing
from .case import Case, gradients_of, params_of
from .collect import plan
from .comparison import Arrays, Work

GRADS = 'grads.safetensors'
INPUTS = ('pixels', 'input_ids', 'output_ids', 'attention_mask', 'decoder_attention_mask', 'labels')


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError when sizes and weights do not fit."""
    c = config.Blip2Config(sizes.vit(case, 'vit'), sizes.qformer(case, 'none'), sizes.t5(case))
    end_id, pad_id = case.setting('t5', 'eos_token_id'), case.setting('t5', 'pad_token_id')
    inputs = {name: case.array(name) for name in INPUTS}
    inputs |= {name: x for name, x in case.arrays.items() if name.endswith(('.input_ids', '.attention_mask'))}
    kept = {
        'encoder_last_hidden_state': inputs['attention_mask'].astype(bool),
        'logits': inputs['decoder_attention_mask'].astype(bool),
    }
    case, left_out = stage2.without_padding(case, kept)
    case = writing.padded(case, pad_id)
    recorded_gradients = gradients_of(case, GRADS, lavis.blip2(c))

    def function(params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        model = blip2.Blip2Module(c, dtype)
        batch = _batch(x, c.qformer.num_queries)
        out = _forward(model, params, x, batch)
        out |= stage2.loss_and_gradients(model, params, x['pixels'], batch, GRADS if gradients else None)

        def write(name: str, arguments: dict, recorded: Array) -> generation.Replay:
            said = name.partition('.')[0]
            ids, mask = x[f'{said}.input_ids'], x[f'{said}.attention_mask'].astype(bool)
            pixels = x['pixels'][: ids.shape[0]].transpose(0, 3, 1, 2)
            return generation.with_t5(model, params, pixels, ids, mask, arguments, recorded)

        return out | writing.written(case, write, end_id, pad_id)

    params = params_of(case, lavis.blip2(c), blip2.shapes(c))
    return plan(case, params, inputs, function, recorded_gradients, left_out, unstable=writing.unstable(case))


def _batch(x: Arrays, num_queries: int) -> Arrays:
    """Return prompt and answer side by side, as our batches hold them."""
    prompt, answer = x['attention_mask'][:, num_queries:].astype(bool), x['decoder_attention_mask'].astype(bool)
    return {
        'lm_text': jnp.concatenate([x['input_ids'], x['output_ids']], axis=1),
        'lm_mask': jnp.concatenate([prompt, answer], axis=1),
        'lm_target': jnp.concatenate([jnp.zeros_like(prompt), answer], axis=1),
    }


def _forward(model: blip2.Blip2Module, params: Params, x: Arrays, batch: Arrays) -> Arrays:
    attention_mask, length = x['attention_mask'].astype(bool), x['input_ids'].shape[1]

    def run(model: blip2.Blip2Module) -> Arrays:
        prefix = model.soft_prefix(*stage2.vision_features(model, x['pixels']))
        embedded = jnp.concatenate([prefix.vectors, model.lm.embed(x['input_ids'])], axis=1)
        hidden = model.target_hidden_states(prefix, batch['lm_text'], batch['lm_mask'], batch['lm_target'])
        logits = model.lm.word_logits(hidden)[:, length:]
        return {
            'inputs_t5': prefix.vectors,
            'inputs_embeds': embedded,
            'encoder_last_hidden_state': stage2.where(attention_mask, model.lm.encode(embedded, attention_mask).hidden),
            'logits': stage2.where(x['decoder_attention_mask'].astype(bool), logits),
        }

    return model.apply({'params': params}, method=run)
