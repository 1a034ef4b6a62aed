"""Stage 2 on easy-VQA: the frozen language model reads the queries and writes the caption.

    qformer train easy_vqa_stage2 --run runs/easy_vqa/stage2

The Q-Former's text side rests; it is kept as stage 1 left it, for instruction tuning.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Start, Training
from qformer_jax.presets import TINY_OPT, TINY_QFORMER, TINY_VIT
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    return Run(
        stage='stage2',
        model=Blip2Config(vit=TINY_VIT, qformer=TINY_QFORMER, lm=TINY_OPT),
        data=Data(
            path='data/easy_vqa',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            crop_scale=(0.8, 1.0),
            max_lm_text=8,
            question_prompt=('{question}',),
        ),
        optimizer=Optimizer(
            peak_rate=1e-3,
            final_rate=5e-5,
            warmup_steps=25,
            clip_norm=1.0,
            rate_rules=(('(vit|lm)/.*', None), (TEXT_SIDE, None), ('qformer/.*', 1.0), ('lm_projection/.*', 1.0)),
        ),
        training=Training(steps=150, batch_size=128, checkpoint_every=75, validation_batches=2),
        start=Start(checkpoint='runs/easy_vqa/stage1', lm='runs/easy_vqa/language'),
    )
