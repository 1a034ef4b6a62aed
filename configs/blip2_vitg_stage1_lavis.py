"""BLIP-2 stage 1 with EVA ViT-g, as the released LAVIS code runs it where it differs from the paper; not run here.

    qformer train blip2_vitg_stage1_lavis --run runs/vitg_stage1 --data.path DATA --start.vit VIT_RUN

LAVIS: COCO + VG, 10 epochs of 1,600, AdamW (0.9, 0.999), 5,000 steps of warm-up from 1e-6 to 1e-4 inside epoch 0, a
cosine that moves once an epoch towards 1e-5, losses averaged a device at a time, plain diagonal as positives.
`steps_per_epoch` here is for 4.6 million pairs / 1,600; set it, and `training.steps`, to your data's.
"""

from qformer_jax.config import Blip2Config, Data, Objective, Optimizer, Run, Training
from qformer_jax.presets import QFORMER_G, VIT_G


def config() -> Run:
    return Run(
        stage='stage1',
        model=Blip2Config(vit=VIT_G, qformer=QFORMER_G, lm=None),
        data=Data(crop_scale=(0.5, 1.0), flip=True, max_text=32),
        objective=Objective(positives='diagonal', token_mean='per_shard', gather_grad='local'),
        optimizer=Optimizer(
            peak_rate=1e-4,
            final_rate=1e-5,
            warmup_start=1e-6,
            warmup_steps=5000,
            schedule='lavis',
            steps_per_epoch=2879,
            beta2=0.999,
            weight_decay=0.05,
            rate_rules=(('vit/.*', None), ('qformer/.*', 1.0)),
        ),
        training=Training(steps=28_790, batch_size=1600, dtype='bfloat16', checkpoint_every=2879),
    )
