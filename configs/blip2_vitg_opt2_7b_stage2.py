"""BLIP-2 stage 2 with EVA ViT-g and OPT-2.7B, as the paper states it (Li et al. 2023, section 3.4); not run here.

    qformer train blip2_vitg_opt2_7b_stage2 --run runs/opt --data.path DATA --start.checkpoint STAGE1 --start.lm OPT_RUN

Paper: 80,000 steps of 1,920, cosine from 1e-4 to 5e-5 after 2,000 steps of warm-up. The Q-Former learns at the full
rate and the fresh projection at half of it. Checked by shapes: 107,133,696 trained parameters.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Training
from qformer_jax.presets import OPT_2_7B, QFORMER_G, VIT_G
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    return Run(
        stage='stage2',
        model=Blip2Config(vit=VIT_G, qformer=QFORMER_G, lm=OPT_2_7B),
        data=Data(crop_scale=(0.5, 1.0), flip=True, max_lm_text=32),
        optimizer=Optimizer(
            peak_rate=1e-4,
            final_rate=5e-5,
            warmup_steps=2000,
            beta2=0.98,
            weight_decay=0.05,
            rate_rules=(('(vit|lm)/.*', None), (TEXT_SIDE, None), ('qformer/.*', 1.0), ('lm_projection/.*', 0.5)),
        ),
        training=Training(steps=80_000, batch_size=1920, dtype='bfloat16', checkpoint_every=2000),
    )
