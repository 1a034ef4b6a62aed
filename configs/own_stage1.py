"""Stage 1 on pictures of your own: ITC + ITM + ITG over DINOv2 ViT-S, from MiniLM on.

    qformer parts dinov2-s minilm smollm2 --out runs/parts
    qformer data pack folder data/mine --path PICTURES --text-tokenizer runs/parts/minilm/wordpiece.json
    qformer data encode data/mine data/mine_features --vit runs/parts/dinov2-s
    qformer train own_stage1 --run runs/own/stage1

DINOv2 ViT-S looks at every picture once, the Q-Former begins as MiniLM, and texts are as long as the longest of the
data set. 200 pictures take minutes on two cores and teach little: judge a run by the losses on held-out pictures.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Start, Training
from qformer_jax.presets import DINOV2_S_224, MINILM_QFORMER


def config() -> Run:
    return Run(
        stage='stage1',
        model=Blip2Config(vit=DINOV2_S_224, qformer=MINILM_QFORMER, lm=None),
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
            rate_rules=(('vit/.*', None), ('.*', 1.0)),
        ),
        training=Training(steps=100, batch_size=16, checkpoint_every=50, validation_batches=1),
        start=Start(checkpoint='runs/parts/minilm', vit='runs/parts/dinov2-s'),
    )
