"""Our model on the same inputs, a part at a time: what leaves every layer, in float32 and in float64.

Only one part's weights are in memory, and they stay float32: float64 takes each matrix as it is used, for nothing here
is compiled as a whole.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ... import config
from ...convert.lazy_tensors import State
from ...models import masks
from ...models.blip2 import Blip2Module
from ...objectives.captioning import token_losses, token_mean
from ...rules import unflatten
from ...typing import Array, Params
from .inputs import Probe, after_layers

Arrays = dict[str, Array]
Stage = Callable[[Blip2Module, Probe, Arrays], Arrays]
DTYPES = ('float32', 'float64')


def compute(c: config.Blip2Config, tensors: State, probe: Probe) -> dict[str, dict[str, np.ndarray]]:
    """Return our arrays by dtype and by name."""
    found = {dtype: {} for dtype in DTYPES}
    for parts, stage in stages(c):
        params = _load(tensors, parts)
        for dtype in DTYPES:
            found[dtype] |= _run(c, params, stage, probe, found[dtype], dtype)
    return found


def stages(c: config.Blip2Config) -> list[tuple[tuple[str, ...], Stage]]:
    """Return the names of the parameters and the function of every part, in the order in which data flows."""
    stages = []
    if c.vit:
        stages.append((('vit',), vision_features))
    if c.qformer:
        stages.append((('qformer', 'lm_projection'), connect if c.vit else read_words))
    if c.lm:
        stages.append((('lm',), speak))
    return stages


def _load(tensors: State, parts: tuple[str, ...]) -> Params:
    mine = {path: tensor for path, tensor in tensors.items() if path.split('/', 1)[0] in parts}
    return unflatten({path: jnp.asarray(tensor.read().astype(np.float32)) for path, tensor in mine.items()})


def _run(
    c: config.Blip2Config, params: Params, stage: Stage, probe: Probe, before: dict[str, np.ndarray], dtype: str
) -> dict[str, np.ndarray]:
    with jax.enable_x64(dtype == 'float64'), jax.default_matmul_precision('highest'):
        given = {name: jnp.asarray(x) for name, x in before.items()}
        model = Blip2Module(c, jnp.dtype(dtype))
        out = model.apply({'params': params}, method=lambda bound: stage(bound, probe, given))
        return {name: np.asarray(x) for name, x in out.items()}


def vision_features(model: Blip2Module, probe: Probe, _: Arrays) -> Arrays:
    """Run the tower."""
    out = model.vit(_pixels(probe, model.dtype))
    found = _states('vit', (out.embedded, *out.hidden_states))
    return found | {'vit/norm': out.features} if model.config.vit.final_norm else found


def _pixels(probe: Probe, dtype: DTypeLike) -> Array:
    return jnp.asarray(probe.pixels, dtype)


def connect(model: Blip2Module, probe: Probe, before: Arrays) -> Arrays:
    """Run the Q-Former on the tower's features, with the words if it reads, and what follows it."""
    c = model.config
    features = before[f'vit/layer_{c.vit.depth - 1}']
    valid = jnp.ones(features.shape[:2], bool)
    words = () if c.qformer.text_side == 'none' else (probe.words, probe.words_exist)
    out = model.query_features(features, valid, *words)
    found = {'qformer/feature_norm': model.qformer.feature_norm(features)} | _states('qformer', out.hidden_states)
    if c.lm:
        return found | {'lm_projection': model.lm_projection(out.queries)}
    image, text = model.query_features(features, valid), _read(model, probe)
    similarity = jnp.einsum(
        'bqe,ce->bcq', model.qformer.embed_image(image.queries), model.qformer.embed_text(text.text)
    )
    found |= _states('queries alone: qformer', image.hidden_states) | _states('text alone: qformer', text.hidden_states)
    return found | {'itm_logits': model.qformer.match(out.queries), 'itc_similarity': similarity.max(axis=-1)}


def _read(model: Blip2Module, probe: Probe):
    return model.qformer(masks.unimodal(0, jnp.asarray(probe.words_exist)), text=probe.words)


def read_words(model: Blip2Module, probe: Probe, _: Arrays) -> Arrays:
    """Run the text branch alone, as the BERT that it begins as."""
    return _states('qformer', _read(model, probe).hidden_states)


def speak(model: Blip2Module, probe: Probe, before: Arrays) -> Arrays:
    """Run the language model on what the picture became, if there is one, and the text."""
    c = model.config
    x = model.lm.embed(probe.text)
    if c.qformer:
        x = jnp.concatenate([before['lm_projection'], x], axis=1)
    exist = jnp.asarray(probe.prefixed(probe.text_exist, c, True))
    if not c.lm.encoder_decoder:
        out = model.lm(x, exist)
        logits = model.lm.word_logits(out.hidden)
        targets = probe.prefixed(probe.text, c, 0)[:, 1:]
        loss = _loss(logits[:, :-1], targets, probe.prefixed(probe.text_exist, c, False)[:, 1:])
        end = dict.fromkeys(after_layers(c.lm, 'lm'), out.hidden)
        return _states('lm', out.hidden_states) | end | {'logits': logits, 'loss': loss}
    memory = model.lm.encode(x, exist)
    out = model.lm.decode(model.lm.embed(probe.answer_read()), jnp.asarray(probe.answer_exist), memory)
    logits = model.lm.word_logits(out.hidden)
    found = _states('lm/encoder', memory.hidden_states) | {'lm/encoder/norm': memory.hidden}
    found |= _states('lm/decoder', out.hidden_states) | {'lm/decoder/norm': out.hidden, 'logits': logits}
    return found | {'loss': _loss(logits, probe.answer, probe.answer_exist)}


def _loss(logits: Array, targets: np.ndarray, counts: np.ndarray) -> Array:
    return token_mean(token_losses(logits, jnp.asarray(targets)), jnp.asarray(counts))


def _states(name: str, hidden: tuple[Array, ...]) -> Arrays:
    layers = {f'{name}/layer_{i}': x for i, x in enumerate(hidden[1:])}
    return {f'{name}/embedding': hidden[0]} | layers
