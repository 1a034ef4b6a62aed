"""BLIP-2 stage 2 with EVA ViT-g and OPT-2.7B, as the released LAVIS code runs it; not run here.

    qformer train blip2_vitg_opt2_7b_stage2_lavis --run RUN --data.path DATA --start.checkpoint STAGE1 --start.lm LM

LAVIS: 10 epochs of 1,024, AdamW (0.9, 0.999), 2,000 steps of warm-up from 1e-6 inside epoch 0, a cosine that moves once
an epoch towards 1e-5, one rate for Q-Former and projection. `steps_per_epoch` is for 4.6 million pairs; set yours.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Objective, Run
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    paper, _ = recipes.load('blip2_vitg_opt2_7b_stage2')
    return replace(
        paper,
        objective=Objective(token_mean='per_shard'),
        optimizer=replace(
            paper.optimizer,
            final_rate=1e-5,
            warmup_start=1e-6,
            schedule='lavis',
            steps_per_epoch=4498,
            beta2=0.999,
            rate_rules=(('(vit|lm)/.*', None), (TEXT_SIDE, None), ('.*', 1.0)),
        ),
        training=replace(paper.training, steps=44_980, batch_size=1024, checkpoint_every=4498),
    )
