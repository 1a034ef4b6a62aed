"""BLIP-2 stage 2 with EVA ViT-g and OPT-6.7B, as the paper states it (Li et al. 2023, section 3.4); not run here.

    qformer train blip2_vitg_opt6_7b_stage2 --run RUN --data.path DATA --start.checkpoint STAGE1 --start.lm LM

As with OPT-2.7B: 80,000 steps of 1,920. That the paper trains both alike is from memory: compare it.
Checked by shapes: 108,314,880 trained parameters.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Run
from qformer_jax.presets import OPT_6_7B


def config() -> Run:
    base, _ = recipes.load('blip2_vitg_opt2_7b_stage2')
    return replace(base, model=replace(base.model, lm=OPT_6_7B))
