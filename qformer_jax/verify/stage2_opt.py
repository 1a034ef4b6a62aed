"""Stage 2 with OPT, in several settings of the prompt (case `opt_stage2`)."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .. import config
from ..convert import lavis
from ..data.tokenizers import LmTokenizer, lm_row, pad
from ..inference import replay
from ..models import blip2
from ..typing import Array, Params
from . import sizes, stage2, texts, writing
from .case import Case, gradients_of, params_of
from .plan import plan
from .stage1 import IGNORED
from .work import Arrays, Work

IDS = '.opt_input_ids'
VOCABULARY = ('opt', 'tokenizer', 'vocab')


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError when sizes and weights do not fit."""
    c = config.Blip2(sizes.vit(case, 'vit'), sizes.qformer(case, 'none'), sizes.opt(case))
    settings = [name.removesuffix(IDS) for name in case.arrays if name.endswith(IDS)]
    exists = {name: case.array(f'{name}.attention_mask').astype(bool) for name in settings}
    end_id, pad_id = case.setting('opt', 'tokenizer', 'eos_token_id(newline)'), case.setting('opt', 'pad_token_id')
    case, left_out = stage2.without_padding(case, {f'{name}.logits': mask for name, mask in exists.items()})
    case = writing.padded(case, pad_id)
    ids, gradients = _recomputed(case, settings, c.qformer.num_queries), {}
    for name in settings:
        gradients |= gradients_of(case, _file(name), lavis.blip2(c))

    def function(params: Params, x: Arrays, dtype: DTypeLike) -> Arrays:
        model, out = blip2.Blip2(c, dtype), dict(ids)
        for name in settings:
            found, batch = _forward(model, params, x, name, case.entry('texts', name))
            file = _file(name) if any(key.startswith(_file(name)) for key in gradients) else None
            found |= stage2.loss_and_gradients(model, params, x['pixels'], batch, file)
            out |= {key if key.startswith('grads') else f'{name}.{key}': value for key, value in found.items()}

        def write(_: str, arguments: dict, recorded: Array) -> replay.Replay:
            pixels = x['pixels'][: arguments['input_ids'][0]].transpose(0, 3, 1, 2)
            return replay.with_opt(model, params, pixels, arguments, recorded)

        return out | writing.written(case, write, end_id, pad_id)

    inputs = {'pixels': case.array('pixels')}
    inputs |= {key: case.arrays[key] for name in settings for key in (f'{name}{IDS}', f'{name}.attention_mask')}
    params = params_of(case, lavis.blip2(c), blip2.shapes(c))
    return plan(case, params, inputs, function, gradients, left_out, unstable=writing.unstable(case))


def _file(setting: str) -> str:
    return f'grads_{setting}.safetensors'


def _forward(model: blip2.Blip2, params: Params, x: Arrays, setting: str, text: dict) -> tuple[Arrays, Arrays]:
    """Return the arrays of a setting, and the batch of its loss.

    Labels: without a prompt LAVIS also asks the last query to predict `</s>`; with one, the prompt does not count.
    """
    ids, seen = x[f'{setting}{IDS}'], x[f'{setting}.attention_mask'].astype(bool)
    own = seen[:, model.config.qformer.num_queries :]
    asked = text['prompt_length'] if text['prompt'] else 0
    target = own & (jnp.arange(ids.shape[1]) >= asked)[None]

    def run(model: blip2.Blip2) -> tuple[Array, Array, Array]:
        prefix = model.soft_prefix(*stage2.see(model, x['pixels'][: ids.shape[0]]))
        embedded = jnp.concatenate([prefix, model.lm.embed(ids)], axis=1)
        return prefix, embedded, model.lm.word_logits(model.lm(embedded, seen).hidden)

    prefix, embedded, logits = model.apply({'params': params}, method=run)
    labels = jnp.where(target, ids, IGNORED)
    found = {
        'inputs_opt': prefix,
        'inputs_embeds': embedded,
        'labels': jnp.pad(labels, ((0, 0), (prefix.shape[1], 0)), constant_values=IGNORED),
        'logits': stage2.where(seen, logits),
    }
    return found, {'lm_text': ids, 'lm_mask': own, 'lm_target': target}


def _recomputed(case: Case, settings: list[str], num_queries: int) -> Arrays:
    """Return ids and masks from the texts, where the vocabulary is there."""
    vocab, merges = (texts.vocabulary(case, *VOCABULARY[:-1], name) for name in ('vocab', 'merges'))
    if not vocab.is_file() or not merges.is_file():
        return {}
    tokenizer, out = LmTokenizer.from_files(vocab, merges), {}
    for name in settings:
        said, recorded = case.entry('texts', name), case.array(f'{name}{IDS}')
        rows = [lm_row(tokenizer, '', text)[0] for text in said['text_input']]
        length = min(max(map(len, rows)), said['max_txt_len'])
        ids, mask = map(np.stack, zip(*(pad(row, length, tokenizer.pad_id) for row in rows), strict=True))
        ones = np.ones((len(recorded), num_queries), np.int32)
        out |= {f'{name}{IDS}': ids, f'{name}.attention_mask': np.concatenate([ones, mask.astype(np.int32)], axis=1)}
    return out
