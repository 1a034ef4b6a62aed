"""Language model for easy-VQA: a 3-layer OPT that learns the captions, questions and answers as plain text.

    qformer train easy_vqa_language --run runs/easy_vqa/language

A row is `caption </s> question answer`, and a quarter of the rows restate the caption: the shape that stage 2 gives it
later with the soft prefix in place of the first caption.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Training
from qformer_jax.presets import TINY_OPT


def config() -> Run:
    return Run(
        stage='language',
        model=Blip2Config(vit=None, qformer=None, lm=TINY_OPT),
        data=Data(
            path='data/easy_vqa',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            max_lm_text=20,
            question_prompt=('{question}',),
            caption_fraction=0.25,
        ),
        optimizer=Optimizer(peak_rate=2e-3, final_rate=1e-4, warmup_steps=100, clip_norm=1.0),
        training=Training(steps=1200, batch_size=64, checkpoint_every=400, validation_batches=2),
    )
