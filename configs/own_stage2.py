"""Stage 2 on pictures of your own: frozen SmolLM2-135M-Instruct reads 8 queries and writes the caption.

    qformer train own_stage2 --run runs/own/stage2

After own_stage1. Only the Q-Former and the projection learn; SmolLM2 keeps every weight.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Start, Training
from qformer_jax.presets import DINOV2_S_224, MINILM_QFORMER, SMOLLM2_135M
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    return Run(
        stage='stage2',
        model=Blip2Config(vit=DINOV2_S_224, qformer=MINILM_QFORMER, lm=SMOLLM2_135M),
        data=Data(
            path='data/mine_features',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            crop_scale=(1.0, 1.0),
            flip=False,
            max_text=0,
            max_lm_text=0,
        ),
        optimizer=Optimizer(
            peak_rate=3e-4,
            final_rate=1e-6,
            warmup_steps=10,
            clip_norm=1.0,
            rate_rules=(('(vit|lm)/.*', None), (TEXT_SIDE, None), ('.*', 1.0)),
        ),
        training=Training(steps=100, batch_size=16, checkpoint_every=50, validation_batches=1),
        start=Start(checkpoint='runs/own/stage1', lm='runs/parts/smollm2'),
    )
