"""Visual question answering on easy-VQA with plain BLIP-2 queries: only the language model reads the question.

    qformer train easy_vqa_instruct --run runs/easy_vqa/instruct

The vision tower and the language model stay frozen.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Start, Training
from qformer_jax.presets import TINY_OPT, TINY_QFORMER, TINY_VIT
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    return Run(
        stage='instruct',
        model=Blip2Config(vit=TINY_VIT, qformer=TINY_QFORMER, lm=TINY_OPT),
        data=Data(
            path='data/easy_vqa',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            crop_scale=(0.8, 1.0),
            max_text=16,
            max_lm_text=16,
            question_prompt=('{question}',),
            caption_fraction=0.2,
        ),
        optimizer=Optimizer(
            peak_rate=1e-3,
            final_rate=5e-5,
            warmup_steps=50,
            clip_norm=1.0,
            rate_rules=(('(vit|lm)/.*', None), (TEXT_SIDE, None), ('qformer/.*', 1.0), ('lm_projection/.*', 1.0)),
        ),
        training=Training(steps=500, batch_size=128, checkpoint_every=250, validation_batches=2),
        start=Start(checkpoint='runs/easy_vqa/stage2'),
    )
