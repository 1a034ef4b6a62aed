"""Stage 2 on pictures of your own: frozen SmolLM2-135M-Instruct reads 8 queries and writes the caption.

    qformer train own_stage2 --run runs/own/stage2

After own_stage1. Only the Q-Former and the projection learn; SmolLM2 keeps every weight.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Run, Start
from qformer_jax.presets import SMOLLM2_135M
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    base, _ = recipes.load('own_stage1')
    rules = ('(vit|lm)/.*', None), (TEXT_SIDE, None), ('.*', 1.0)
    return replace(
        base,
        stage='stage2',
        model=replace(base.model, lm=SMOLLM2_135M),
        optimizer=replace(base.optimizer, rate_rules=rules),
        start=Start(checkpoint='runs/own/stage1', lm='runs/parts/smollm2'),
    )
