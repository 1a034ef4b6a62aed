"""BLIP-2 stage 2 with EVA ViT-g and OPT-2.7B, as the released LAVIS code runs it; not run here.

    qformer train blip2_vitg_opt2_7b_stage2_lavis --run RUN --data.path DATA --start.checkpoint STAGE1 --start.lm LM

LAVIS: 10 epochs of 1,024, AdamW (0.9, 0.999), 2,000 steps of warm-up from 1e-6 inside epoch 0, a cosine that moves once
an epoch towards 1e-5, one rate for Q-Former and projection. `steps_per_epoch` is for 4.6 million pairs; set yours.
"""

from qformer_jax.config import Blip2Config, Data, Objective, Optimizer, Run, Training
from qformer_jax.presets import OPT_2_7B, QFORMER_G, VIT_G
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    return Run(
        stage='stage2',
        model=Blip2Config(vit=VIT_G, qformer=QFORMER_G, lm=OPT_2_7B),
        data=Data(crop_scale=(0.5, 1.0), flip=True, max_lm_text=32),
        objective=Objective(token_mean='per_shard'),
        optimizer=Optimizer(
            peak_rate=1e-4,
            final_rate=1e-5,
            warmup_start=1e-6,
            warmup_steps=2000,
            schedule='lavis',
            steps_per_epoch=4498,
            beta2=0.999,
            weight_decay=0.05,
            rate_rules=(('(vit|lm)/.*', None), (TEXT_SIDE, None), ('.*', 1.0)),
        ),
        training=Training(steps=44_980, batch_size=1024, dtype='bfloat16', checkpoint_every=4498),
    )
