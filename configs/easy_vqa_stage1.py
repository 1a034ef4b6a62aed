"""Stage 1 on easy-VQA: ITC + ITM + ITG align 3 queries with the captions, over the frozen tower.

    qformer train easy_vqa_stage1 --run runs/easy_vqa/stage1

There are only 24 different captions, so pairs that share one are positives of each other.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Start, Training
from qformer_jax.presets import TINY_QFORMER, TINY_VIT


def config() -> Run:
    return Run(
        stage='stage1',
        model=Blip2Config(vit=TINY_VIT, qformer=TINY_QFORMER, lm=None),
        data=Data(
            path='data/easy_vqa',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            crop_scale=(0.8, 1.0),
            max_text=8,
        ),
        optimizer=Optimizer(
            peak_rate=1e-3,
            final_rate=5e-5,
            warmup_steps=25,
            clip_norm=1.0,
            rate_rules=(('vit/.*', None), ('qformer/.*', 1.0)),
        ),
        training=Training(steps=200, batch_size=64, checkpoint_every=100, validation_batches=4),
        start=Start(vit='runs/easy_vqa/vision'),
    )
