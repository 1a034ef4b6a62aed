"""Language model for the digits: a 3-layer OPT that learns captions, questions and answers as plain text.

    qformer train digits_language --run runs/digits/language

Feature arrays need no vision tower: this is the only part to train before stage 1 and 2.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Training
from qformer_jax.presets import TINY_OPT


def config() -> Run:
    return Run(
        stage='language',
        model=Blip2Config(vit=None, qformer=None, lm=TINY_OPT),
        data=Data(
            path='runs/digits/data',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            max_lm_text=20,
            question_prompt=('{question}',),
            caption_fraction=0.25,
        ),
        optimizer=Optimizer(peak_rate=2e-3, final_rate=1e-4, warmup_steps=40, clip_norm=1.0),
        training=Training(steps=400, batch_size=64, checkpoint_every=200, validation_batches=2),
    )
