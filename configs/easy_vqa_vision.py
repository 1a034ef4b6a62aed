"""Vision tower for easy-VQA: a 4-layer ViT that names the words of a picture's caption (Joulin et al. 2016).

    qformer train easy_vqa_vision --run runs/easy_vqa/vision

It stands in for EVA ViT-g, so that the whole line can be tried without pretrained weights.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Training
from qformer_jax.presets import TINY_VIT


def config() -> Run:
    return Run(
        stage='vision',
        model=Blip2Config(vit=TINY_VIT, qformer=None, lm=None),
        data=Data(
            path='data/easy_vqa',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            crop_scale=(0.8, 1.0),
            max_text=8,
        ),
        optimizer=Optimizer(peak_rate=2e-3, final_rate=1e-4, warmup_steps=80, clip_norm=1.0),
        training=Training(steps=800, batch_size=64, checkpoint_every=200, validation_batches=4),
    )
