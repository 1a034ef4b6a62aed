"""BLIP-2 stage 1 with CLIP ViT-L, as the paper states it (Li et al. 2023, section 3.4); not run here.

    qformer train blip2_vitl_stage1 --run runs/vitl_stage1 --data.path DATA --start.vit VIT_RUN

Paper: 250,000 steps of 2,320. Checked by shapes: 277,985,280 frozen, 183,165,758 trained parameters.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Training
from qformer_jax.presets import QFORMER_L, VIT_L


def config() -> Run:
    return Run(
        stage='stage1',
        model=Blip2Config(vit=VIT_L, qformer=QFORMER_L, lm=None),
        data=Data(crop_scale=(0.5, 1.0), flip=True, max_text=32),
        optimizer=Optimizer(
            peak_rate=1e-4,
            warmup_steps=2000,
            beta2=0.98,
            weight_decay=0.05,
            rate_rules=(('vit/.*', None), ('qformer/.*', 1.0)),
        ),
        training=Training(steps=250_000, batch_size=2320, dtype='bfloat16', checkpoint_every=5000),
    )
