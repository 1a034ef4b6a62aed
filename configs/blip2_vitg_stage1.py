"""BLIP-2 stage 1 with EVA ViT-g, as the paper states it (Li et al. 2023, section 3.4); not run here.

    qformer train blip2_vitg_stage1 --run runs/vitg_stage1 --data.path DATA --start.vit VIT_RUN

Paper: 129 M pairs, 250,000 steps of 1,680, AdamW (0.9, 0.98), decay 0.05, 2,000 steps of warm-up to 1e-4, cosine;
under 6 days on 16 A100. Checked by shapes: 985,894,528 frozen, 186,705,470 trained parameters.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Training
from qformer_jax.presets import QFORMER_G, VIT_G


def config() -> Run:
    return Run(
        stage='stage1',
        model=Blip2Config(vit=VIT_G, qformer=QFORMER_G, lm=None),
        data=Data(crop_scale=(0.5, 1.0), flip=True, max_text=32),
        optimizer=Optimizer(
            peak_rate=1e-4,
            warmup_steps=2000,
            beta2=0.98,
            weight_decay=0.05,
            rate_rules=(('vit/.*', None), ('qformer/.*', 1.0)),
        ),
        training=Training(steps=250_000, batch_size=1680, dtype='bfloat16', checkpoint_every=5000),
    )
