"""BLIP-2 stage 2 with EVA ViT-g and Flan-T5-XXL, as the paper states it (Li et al. 2023, section 3.4); not run here.

    qformer train blip2_vitg_flant5xxl_stage2 --run RUN --data.path DATA --start.checkpoint STAGE1 --start.lm LM

As with Flan-T5-XL.
Checked by shapes: 108,314,880 trained parameters.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Run
from qformer_jax.presets import FLAN_T5_XXL


def config() -> Run:
    base, _ = recipes.load('blip2_vitg_flant5xl_stage2')
    return replace(base, model=replace(base.model, lm=FLAN_T5_XXL))
