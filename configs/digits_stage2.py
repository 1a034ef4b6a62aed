"""Stage 2 on the digits: the frozen language model reads the queries and writes the caption.

    qformer train digits_stage2 --run runs/digits/stage2

The Q-Former's text side rests; it is kept as stage 1 left it.
"""

from dataclasses import replace

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Start, Training
from qformer_jax.presets import TINY_OPT, TINY_QFORMER
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    return Run(
        stage='stage2',
        model=Blip2Config(vit=None, qformer=replace(TINY_QFORMER, num_queries=8), lm=TINY_OPT),
        data=Data(
            path='runs/digits/data',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            max_lm_text=8,
            question_prompt=('{question}',),
        ),
        optimizer=Optimizer(
            peak_rate=1e-3,
            final_rate=5e-5,
            warmup_steps=25,
            clip_norm=1.0,
            rate_rules=(('lm/.*', None), (TEXT_SIDE, None), ('qformer/.*', 1.0), ('lm_projection/.*', 1.0)),
        ),
        training=Training(steps=200, batch_size=64, checkpoint_every=100, validation_batches=2),
        start=Start(checkpoint='runs/digits/stage1', lm='runs/digits/language'),
    )
