"""Stage 1 on the digits: ITC + ITM + ITG align 8 queries with the captions, over columns of pixels as features.

    qformer train digits_stage1 --run runs/digits/stage1

There are ten different captions, so pairs that share one are positives of each other.

Result (397 test digits, one seed): R@1 93.2 % among ten captions, ITM 91.8 %.
See experiments/datasets/digits/README.md.
"""

from dataclasses import replace

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Training
from qformer_jax.presets import TINY_QFORMER


def config() -> Run:
    return Run(
        stage='stage1',
        model=Blip2Config(vit=None, qformer=replace(TINY_QFORMER, num_queries=8), lm=None),
        data=Data(path='runs/digits/data', train_split='train[10%:]', validation_split='train[:10%]', max_text=8),
        optimizer=Optimizer(peak_rate=1e-3, final_rate=5e-5, warmup_steps=40, clip_norm=1.0),
        training=Training(steps=400, batch_size=64, checkpoint_every=200, validation_batches=2),
    )
