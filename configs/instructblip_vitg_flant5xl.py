"""InstructBLIP with EVA ViT-g and Flan-T5-XL, after the paper (Dai et al. 2023, section 2.6); not run here.

    qformer train instructblip_vitg_flant5xl --run RUN --data.path A --data.mixed-with B C --start.checkpoint STAGE2

As with Vicuna-7B, but 192 rows a step, as the paper says for models of this size. STAGE2 is a run of BLIP-2's second
stage over the same language model. The numbers are written from memory of the paper: compare them before you rely on
them. Checked by shapes: 187,261,696 trained parameters.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Run
from qformer_jax.presets import FLAN_T5_XL


def config() -> Run:
    base, _ = recipes.load('instructblip_vitg_vicuna7b')
    training = replace(base.training, batch_size=192)
    return replace(base, model=replace(base.model, lm=FLAN_T5_XL), training=training)
