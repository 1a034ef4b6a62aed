"""BLIP-2 stage 2 with EVA ViT-g and Flan-T5-XL, as the paper states it (Li et al. 2023, section 3.4); not run here.

    qformer train blip2_vitg_flant5xl_stage2 --run RUN --data.path DATA --start.checkpoint STAGE1 --start.lm LM

As with OPT, but 1,520 rows a step (section 3.4). The paper splits each text for T5: its encoder reads the beginning,
and its decoder writes the rest (section 3.3); in LAVIS the data set gives both, `text_input` and `text_output`. Here
the encoder reads the queries alone, and the decoder writes the whole caption. The number of rows is from memory:
compare it.
Checked by shapes: 106,739,968 trained parameters.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Run
from qformer_jax.presets import FLAN_T5_XL


def config() -> Run:
    base, _ = recipes.load('blip2_vitg_opt2_7b_stage2')
    return replace(base, model=replace(base.model, lm=FLAN_T5_XL), training=replace(base.training, batch_size=1520))
