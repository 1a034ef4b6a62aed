"""BLIP-2 stage 1 with CLIP ViT-L, as the paper states it (Li et al. 2023, section 3.4); not run here.

    qformer train blip2_vitl_stage1 --run runs/vitl_stage1 --data.path DATA --start.vit VIT_RUN

Paper: 250,000 steps of 2,320. Checked by shapes: 277,985,280 frozen, 183,165,758 trained parameters.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Run
from qformer_jax.presets import QFORMER_L, VIT_L


def config() -> Run:
    large, _ = recipes.load('blip2_vitg_stage1')
    model = replace(large.model, vit=VIT_L, qformer=QFORMER_L)
    return replace(large, model=model, training=replace(large.training, batch_size=2320))
