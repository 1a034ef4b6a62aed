"""BLIP-2 fine-tuned for retrieval on COCO at 364 px, as LAVIS runs it (retrieval_coco_ft.yaml); not run here.

    qformer train blip2_vitg_retrieval_coco --run RUN --data.path COCO --start.checkpoint STAGE1
    qformer evaluate RUN --task retrieval
    qformer evaluate RUN --task retrieval --data FLICKR30K

Stage 1 goes on with the vision encoder learning too (Li et al. 2023, section 4.4). LAVIS: 5 epochs, rate 1e-5 after
1,000 steps of warm-up from 1e-8, the cosine down to 0, each block of the tower at 0.95 of the rate of the one above it,
14 rows a GPU, 224 a step on 16; the 128 best are ranked again. `steps_per_epoch` is for Karpathy's split, 566,747
captions. The paper's numbers on Flickr30k are zero-shot, of this very model; LAVIS has no recipe that trains on it.
STAGE1 is a run at 364 px, as of `qformer convert` with --recipe blip2_vitg_retrieval_coco. Checked by shapes:
1,173,191,358 trained parameters.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Run
from qformer_jax.presets import VIT_G_364
from qformer_jax.rules import vit_layer_decay


def config() -> Run:
    base, _ = recipes.load('blip2_vitg_stage1_lavis')
    return replace(
        base,
        model=replace(base.model, vit=VIT_G_364),
        optimizer=replace(
            base.optimizer,
            peak_rate=1e-5,
            final_rate=0.0,
            warmup_start=1e-8,
            warmup_steps=1000,
            steps_per_epoch=2530,
            rate_rules=(*vit_layer_decay(VIT_G_364.depth, 0.95), ('qformer/.*', 1.0)),
        ),
        training=replace(base.training, steps=12_650, batch_size=224, checkpoint_every=2530),
    )
