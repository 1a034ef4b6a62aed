"""Stage 2 (cases `opt_stage2`, `t5_stage2`): prefix, hidden states, logits, loss, gradients, and what is written."""

import jax
import jax.numpy as jnp
import numpy as np

from ... import config
from ...models import blip2
from ...rules import flatten
from ...training import losses
from ...training.loss_context import LossContext
from ...typing import Array, Params
from .case import Case, named
from .comparison import Arrays

TRAINED = ('qformer', 'lm_projection')
PADDING = 'padding: what stands there means nothing'


def where(mask: Array, x: Array) -> Array:
    """Return [B, T, ...] with zeros where nothing exists."""
    return jnp.where(mask[..., None], x, 0)


def without_padding(case: Case, mask: dict[str, np.ndarray]) -> tuple[Case, dict[str, str]]:
    """Return the case with zeros where arrays hold padding, and what that leaves out."""
    arrays = {name: case.array(name) for name in mask}
    cleared = {name: np.where(mask[name][..., None], x, np.zeros_like(x)) for name, x in arrays.items()}
    left_out = {f'padding rows of {name}': PADDING for name, mask in mask.items() if not mask.all()}
    return Case(case.folder, case.meta, case.arrays | cleared), left_out


def vision_features(model: blip2.Blip2Module, pixels: Array) -> tuple[Array, Array]:
    """Return the features of normalised pixels, and that all of them exist."""
    features = model.vit(pixels).features
    return features, jnp.ones(features.shape[:2], bool)


def loss_and_gradients(
    model: blip2.Blip2Module, params: Params, pixels: Array, batch: Arrays, file: str | None
) -> Arrays:
    """Return `loss`, and with a file the gradients of what stage 2 trains, named as in that file."""

    def loss(trained: Params) -> Array:
        def run(model: blip2.Blip2Module) -> Array:
            features, mask = vision_features(model, pixels)
            whole = batch | {'features': features, 'feature_mask': mask}
            return losses.generation(model, whole, LossContext(jax.random.key(0), config.Objective()))[0]

        return model.apply({'params': params | trained}, method=run)

    trained = {name: params[name] for name in TRAINED}
    if file is None:
        return {'loss': loss(trained)}
    value, gradients = jax.value_and_grad(loss)(trained)
    return {'loss': value} | {named(file, path): g for path, g in flatten(gradients).items()}
