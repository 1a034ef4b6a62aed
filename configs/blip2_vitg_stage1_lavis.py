"""BLIP-2 stage 1 with EVA ViT-g, as the released LAVIS code runs it where it differs from the paper; not run here.

    qformer train blip2_vitg_stage1_lavis --run runs/vitg_stage1 --data.path DATA --start.vit VIT_RUN

LAVIS: COCO + VG, 10 epochs of 1,600, AdamW (0.9, 0.999), 5,000 steps of warm-up from 1e-6 to 1e-4 inside epoch 0, a
cosine that moves once an epoch towards 1e-5, losses averaged a device at a time, plain diagonal as positives.
`steps_per_epoch` here is for 4.6 million pairs / 1,600; set it, and `training.steps`, to your data's.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Objective, Run


def config() -> Run:
    paper, _ = recipes.load('blip2_vitg_stage1')
    return replace(
        paper,
        objective=Objective(positives='diagonal', token_mean='per_shard', gather_grad='local'),
        optimizer=replace(
            paper.optimizer,
            final_rate=1e-5,
            warmup_start=1e-6,
            warmup_steps=5000,
            schedule='lavis',
            steps_per_epoch=2879,
            beta2=0.999,
        ),
        training=replace(paper.training, steps=28_790, batch_size=1600, checkpoint_every=2879),
    )
