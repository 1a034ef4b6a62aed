"""Captions that the Q-Former writes itself, with stage 1's weights but for its words' bias (case `stage1_generate`)."""

from jax.typing import DTypeLike

from ...convert import lavis
from ...models import blip2
from ...typing import Array, Params
from . import generation, stage1, writing
from .case import Case, params_of
from .collect import plan
from .comparison import Arrays, Work

BIAS = 'decoder_bias'


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError when sizes and weights do not fit."""
    c = stage1.model_of(case)
    params = params_of(case, lavis.blip2(c), blip2.shapes(c))
    if BIAS in case.arrays:
        params['qformer']['lm_head']['bias'] = case.arrays[BIAS]
    end_id, pad_id = (case.setting('bert_tokenizer', name) for name in ('sep', 'pad'))
    case = writing.padded(case, pad_id)

    def function(params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        model = blip2.Blip2Module(c, dtype)

        def write(name: str, arguments: dict, recorded: Array) -> generation.Replay:
            pixels = x['pixels'][: arguments['input_ids'][0]].transpose(0, 3, 1, 2)
            return generation.with_qformer(model, params, pixels, arguments, recorded)

        return writing.written(case, write, end_id, pad_id)

    inputs = {'pixels': case.home.array('pixels')}
    left_out = {BIAS: 'input'}
    return plan(case, params, inputs, function, left_out=left_out, unstable=writing.unstable(case))
