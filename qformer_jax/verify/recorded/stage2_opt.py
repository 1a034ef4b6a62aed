"""Stage 2 with OPT, in several settings of the prompt (case `opt_stage2`)."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ... import config
from ...convert import lavis
from ...data import tokenizers
from ...data.tokenizers import LmTokenizer
from ...models import blip2
from ...typing import Array, Params
from . import generation, sizes, stage2, texts, writing
from .case import Case, gradients_of, params_of
from .collect import plan
from .comparison import Arrays, Work
from .stage1 import IGNORED

IDS = '.opt_input_ids'
START = 'where the answer starts'
VOCABULARY = ('opt', 'tokenizer')


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError when sizes and weights do not fit."""
    c = config.Blip2Config(sizes.vit(case, 'vit'), sizes.qformer(case, 'none'), sizes.opt(case))
    settings = [name.removesuffix(IDS) for name in case.arrays if name.endswith(IDS)]
    attention_masks = {name: case.array(f'{name}.attention_mask').astype(bool) for name in settings}
    end_id, pad_id = case.setting('opt', 'tokenizer', 'eos_token_id(newline)'), case.setting('opt', 'pad_token_id')
    case, left_out = stage2.without_padding(case, {f'{name}.logits': mask for name, mask in attention_masks.items()})
    case = writing.padded(case, pad_id)
    tokenizer, recorded_gradients = _tokenizer(case), {}
    for name in settings:
        recorded_gradients |= gradients_of(case, _file(name), lavis.blip2(c))
    files = {name.partition(':')[0] for name in recorded_gradients}

    def function(params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        model, out = blip2.Blip2Module(c, dtype), _recomputed(tokenizer, case, settings, c.qformer.num_queries)
        for name in settings:
            found, batch = _forward(model, params, x, name, case.entry('texts', name))
            file = _file(name) if gradients and _file(name) in files else None
            found |= stage2.loss_and_gradients(model, params, x['pixels'], batch, file)
            out |= {key if key.startswith('grads') else f'{name}.{key}': value for key, value in found.items()}

        def write(_: str, arguments: dict, recorded: Array) -> generation.Replay:
            pixels = x['pixels'][: arguments['input_ids'][0]].transpose(0, 3, 1, 2)
            return generation.with_opt(model, params, pixels, arguments, recorded)

        return out | writing.written(case, write, end_id, pad_id)

    inputs = {'pixels': case.array('pixels')}
    inputs |= {key: case.arrays[key] for name in settings for key in (f'{name}{IDS}', f'{name}.attention_mask')}
    params = params_of(case, lavis.blip2(c), blip2.shapes(c))
    starts = {f'{name}: {START}': case.entry('texts', name, 'prompt_length') for name in settings if tokenizer}
    derived = {name: np.array(start, np.int32) for name, start in starts.items()}
    return plan(case, params, inputs, function, recorded_gradients, left_out, derived, writing.unstable(case))


def _file(setting: str) -> str:
    return f'grads_{setting}.safetensors'


def _forward(model: blip2.Blip2Module, params: Params, x: Arrays, setting: str, text: dict) -> tuple[Arrays, Arrays]:
    """Return the arrays of a setting, and the batch of its loss.

    Labels: without a prompt LAVIS also asks the last query to predict `</s>`; with one, the prompt does not count.
    """
    ids, attention_mask = x[f'{setting}{IDS}'], x[f'{setting}.attention_mask'].astype(bool)
    own = attention_mask[:, model.config.qformer.num_queries :]
    prompt_length = text['prompt_length'] if text['prompt'] else 0
    target = own & (jnp.arange(ids.shape[1]) >= prompt_length)[None]

    def run(model: blip2.Blip2Module) -> tuple[Array, Array, Array]:
        prefix = model.soft_prefix(*stage2.vision_features(model, x['pixels'][: ids.shape[0]])).vectors
        embedded = jnp.concatenate([prefix, model.lm.embed(ids)], axis=1)
        return prefix, embedded, model.lm.word_logits(model.lm(embedded, attention_mask).hidden)

    prefix, embedded, logits = model.apply({'params': params}, method=run)
    labels = jnp.where(target, ids, IGNORED)
    found = {
        'inputs_opt': prefix,
        'inputs_embeds': embedded,
        'labels': jnp.pad(labels, ((0, 0), (prefix.shape[1], 0)), constant_values=IGNORED),
        'logits': stage2.where(attention_mask, logits),
    }
    return found, {'lm_text': ids, 'lm_mask': own, 'lm_target': target}


def _tokenizer(case: Case) -> LmTokenizer | None:
    """Return OPT's tokenizer, or None where its files were not copied with the case."""
    vocab, merges = (texts.vocabulary(case, *VOCABULARY, name) for name in ('vocab', 'merges'))
    return LmTokenizer.from_files(vocab, merges) if vocab.is_file() and merges.is_file() else None


def _recomputed(tokenizer: LmTokenizer | None, case: Case, settings: list[str], num_queries: int) -> Arrays:
    """Return ids, masks and where the answer starts, from the texts; nothing without a tokenizer."""
    out = {}
    for name in settings if tokenizer else ():
        said, recorded = case.entry('texts', name), case.array(f'{name}{IDS}')
        answers = [text.removeprefix(said['prompt']).lstrip() for text in said['text_input']]
        rows, starts = zip(*(tokenizers.lm_row(tokenizer, said['prompt'], answer) for answer in answers), strict=True)
        length = min(max(map(len, rows)), said['max_txt_len'])
        ids, mask = map(np.stack, zip(*(tokenizers.pad(row, length, tokenizer.pad_id) for row in rows), strict=True))
        out[f'{name}: {START}'] = jnp.int32(starts[0])
        ones = np.ones((len(recorded), num_queries), np.int32)
        out |= {f'{name}{IDS}': ids, f'{name}.attention_mask': np.concatenate([ones, mask.astype(np.int32)], axis=1)}
    return out
