"""Retrieval with the stage-1 model: pairs, features, and re-ranking by ITM (case `itm_retrieval`).

Pictures are the first ones of the case that holds the weights.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ...convert import lavis
from ...inference import forward
from ...inference.rerank import EXCLUDED, rerank
from ...models import blip2, masks
from ...objectives import contrastive
from ...typing import Array, Params
from . import stage1, texts
from .case import Case, params_of
from .collect import plan
from .comparison import Arrays, Work

SCORES = ('retrieval.score_i2t', 'retrieval.score_t2i')
PAIRS = {'each': 'texts', 'batch': 'texts_batch'}
"""Suffix of the arrays of pairs (`itm_each`, `itc_each`), and where meta.json has their texts."""
NO_VOCABULARY = 'its texts need the vocabulary file that meta.json names, which is not there'


def work(case: Case) -> Work:
    """Return what there is to do; raises UserError when sizes and weights do not fit."""
    c, tokenizer = stage1.model_of(case), texts.bert(case)
    case = replace(case, arrays=case.arrays | {name: _without_excluded(case.array(name)) for name in SCORES})
    k = {name: int(np.isfinite(case.arrays[name]).sum(axis=1).max()) for name in SCORES}  # LAVIS's `k_test`
    inputs = {'pixels': case.home.array('pixels')[: len(case.array('retrieval.sims'))]}
    inputs |= {name: x for name, x in case.arrays.items() if name.endswith(('.input_ids', '.attention_mask'))}
    ids = {}
    for prefix, key in {'feat.': 'texts', 'compute_itm.': 'texts', 'retrieval.': 'retrieval_texts'}.items():
        ids |= texts.recomputed(tokenizer, case, prefix, case.meta.get(key, []))
    pairs = {suffix: case.meta[key] for suffix, key in PAIRS.items() if key in case.meta}
    if tokenizer is not None:
        length = case.setting('max_txt_len')
        inputs |= {f'pairs.{suffix}': np.stack(texts.framed(tokenizer, pair, length)) for suffix, pair in pairs.items()}

    def function(params: Params, x: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        use = _Use(blip2.Blip2Module(c, dtype), params, x)
        return use.pairs() | use.features() | use.itm() | use.retrieval(k) | ids

    left_out = {f'{head}_{suffix}': NO_VOCABULARY for head in ('itm', 'itc') for suffix in PAIRS if tokenizer is None}
    params = params_of(case, lavis.blip2(c), blip2.shapes(c))
    return plan(case, params, inputs, function, left_out=left_out, unstable=SCORES)


def _without_excluded(scores: Array) -> Array:
    """Return the scores with -inf where nothing was ranked: -100 would pass for the scale of the others."""
    return np.where(scores == EXCLUDED, -np.inf, scores)


class _Use:
    """A model in use on the inputs of the case."""

    def __init__(self, model: blip2.Blip2Module, params: Params, x: Arrays):
        self.model, self.params, self.x = model, params, x
        self.image_features = model.apply({'params': params}, method=lambda m: m.vit(x['pixels']).features)

    def _call(self, pass_, *arrays: Array) -> Array:
        return pass_(self.model, self.params, *arrays)

    def _pictures(self, rows: Array | slice) -> tuple[Array, Array]:
        features = self.image_features[rows]
        return features, jnp.ones(features.shape[:2], bool)

    def _text(self, prefix: str) -> tuple[Array, Array]:
        return self.x[f'{prefix}.input_ids'], self.x[f'{prefix}.attention_mask'].astype(bool)

    def pairs(self) -> Arrays:
        """Return logits and cosine of picture i with text i."""
        out = {}
        for suffix in (suffix for suffix in PAIRS if f'pairs.{suffix}' in self.x):
            ids, mask = self.x[f'pairs.{suffix}']
            pictures, text = self._pictures(slice(len(ids))), (ids, mask.astype(bool))
            image, words = self._call(forward.embed_image, *pictures), self._call(forward.embed_text, *text)
            out[f'itm_{suffix}'] = self._call(forward.match, *pictures, jnp.arange(len(ids)), *text)
            out[f'itc_{suffix}'] = jnp.diagonal(contrastive.similarity(image, words))[:, None]
        return out

    def features(self) -> Arrays:
        """Return LAVIS's `extract_features` in its three modes."""
        text = self._text('feat')
        pictures = self._pictures(slice(len(text[0])))

        def hidden(model: blip2.Blip2Module) -> tuple[Array, Array, Array]:
            words = model.qformer(masks.unimodal(0, text[1]), text=text[0]).text
            return model.query_features(*pictures).queries, words, model.qformer.embed_tokens(words)

        queries, words, embedded = self.model.apply({'params': self.params}, method=hidden)
        return {
            'feat.image_embeds': queries,
            'feat.image_embeds_proj': self._call(forward.embed_image, *pictures),
            'feat.text_embeds': words,
            'feat.text_embeds_proj': embedded,
            'feat.multimodal_embeds': self._call(forward.read_both, *pictures, *text),
        }

    def itm(self) -> Arrays:
        """Return LAVIS's `compute_itm` and `forward_text`."""
        text = self._text('compute_itm')

        def first(model: blip2.Blip2Module) -> Array:
            return model.qformer(masks.unimodal(0, text[1]), text=text[0]).text[:, 0]

        every = np.arange(len(text[0]))
        logits = self._call(forward.match, *self._pictures(every), every, *text)
        return {
            'compute_itm.score': logits[:, 1],
            'forward_text': self.model.apply({'params': self.params}, method=first),
        }

    def retrieval(self, k: dict[str, int]) -> Arrays:
        """Return embeddings, similarities, and the re-ranked scores both ways."""
        text = self._text('retrieval')
        image = self._call(forward.embed_image, *self._pictures(slice(None)))
        words = self._call(forward.embed_text, *text)
        similarity = contrastive.similarity(image, words)

        def match(pictures: Array, captions: Array) -> Array:
            texts = (column[captions] for column in text)
            return self._call(forward.match, *self._pictures(slice(None)), pictures, *texts)[:, 1]

        forth = rerank(similarity, match, k['retrieval.score_i2t'])
        back = rerank(similarity.T, lambda captions, pictures: match(pictures, captions), k['retrieval.score_t2i'])
        return {
            'retrieval.image_embeds': image,
            'retrieval.text_embeds': words,
            'retrieval.sims': similarity,
            'retrieval.score_i2t': jnp.where(forth == EXCLUDED, -jnp.inf, forth),
            'retrieval.score_t2i': jnp.where(back == EXCLUDED, -jnp.inf, back),
        }
