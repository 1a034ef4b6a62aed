"""BLIP-2 fine-tuned on COCO captions at 364 px, with OPT-2.7B, as LAVIS runs it (caption_coco_ft.yaml); not run here.

    qformer train blip2_vitg_opt2_7b_caption_coco --run RUN --data.path COCO --start.checkpoint STAGE2

Vision encoder and Q-Former learn, the language model stays frozen (Li et al. 2023, section 4.2). LAVIS: 5 epochs, rate
1e-5 after 1,000 steps of warm-up from 1e-8, the cosine down to 0, the prompt "a photo of", 16 rows a GPU; the paper's
256 a step are 16 GPUs. `steps_per_epoch` is for Karpathy's split, 566,747 captions. STAGE2 is a run at 364 px: qformer
convert with --recipe blip2_vitg_opt2_7b_caption_coco resizes the position table. The search: --num-beams 5, 8 to 30
tokens. Checked by shapes: 1,093,619,584 trained parameters.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Run
from qformer_jax.presets import VIT_G_364
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    base, _ = recipes.load('blip2_vitg_opt2_7b_stage2_lavis')
    return replace(
        base,
        model=replace(base.model, vit=VIT_G_364),
        data=replace(base.data, caption_prompt=('a photo of',)),
        optimizer=replace(
            base.optimizer,
            peak_rate=1e-5,
            final_rate=0.0,
            warmup_start=1e-8,
            warmup_steps=1000,
            steps_per_epoch=2214,
            rate_rules=(('lm/.*', None), (TEXT_SIDE, None), ('.*', 1.0)),
        ),
        training=replace(base.training, steps=11_070, batch_size=256, checkpoint_every=2214),
    )
