"""Questions about the digits: only the language model, which stays frozen, reads the question.

    qformer train digits_instruct --run runs/digits/instruct

Result (397 test digits, one seed): 94.3 % of 794 questions, 30.0 % blind baseline.
See experiments/datasets/digits/README.md.
"""

from dataclasses import replace

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Start, Training
from qformer_jax.presets import TINY_OPT, TINY_QFORMER
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    return Run(
        stage='instruct',
        model=Blip2Config(vit=None, qformer=replace(TINY_QFORMER, num_queries=8), lm=TINY_OPT),
        data=Data(
            path='runs/digits/data',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            max_text=8,
            max_lm_text=16,
            question_prompt=('{question}',),
            caption_fraction=0.2,
        ),
        optimizer=Optimizer(
            peak_rate=1e-3,
            final_rate=5e-5,
            warmup_steps=25,
            clip_norm=1.0,
            rate_rules=(('lm/.*', None), (TEXT_SIDE, None), ('qformer/.*', 1.0), ('lm_projection/.*', 1.0)),
        ),
        training=Training(steps=300, batch_size=64, checkpoint_every=150, validation_batches=2),
        start=Start(checkpoint='runs/digits/stage2'),
    )
