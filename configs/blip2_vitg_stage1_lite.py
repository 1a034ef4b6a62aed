"""QFormer-Lite: stage 1 with 16 nested queries and 6 layers over EVA ViT-g; not run here.

    qformer train blip2_vitg_stage1_lite --run runs/vitg_lite --data.path DATA --start.vit VIT_RUN

Our name and our choice of sizes: half of BLIP-2's queries and layers (Li et al. 2023, section 3.4), everything else as
in `blip2_vitg_stage1`. Of its queries any first m serve alone (Matryoshka Query Transformer, Hu et al. 2024):
`qformer evaluate RUN --task retrieval --queries 4`, `qformer convert RUN DEST --queries 4`. Checked by shapes:
985,894,528 frozen, 105,781,310 trained parameters; what it loses against 32 queries and 12 layers is not known.
"""

from dataclasses import replace

from qformer_jax.config import Blip2Config, Data, Objective, Optimizer, Run, Training
from qformer_jax.presets import QFORMER_G, VIT_G


def config() -> Run:
    return Run(
        stage='stage1',
        model=Blip2Config(vit=VIT_G, qformer=replace(QFORMER_G, num_queries=16, depth=6), lm=None),
        data=Data(crop_scale=(0.5, 1.0), flip=True, max_text=32),
        objective=Objective(nested_queries=True),
        optimizer=Optimizer(
            peak_rate=1e-4,
            warmup_steps=2000,
            beta2=0.98,
            weight_decay=0.05,
            rate_rules=(('vit/.*', None), ('qformer/.*', 1.0)),
        ),
        training=Training(steps=250_000, batch_size=1680, dtype='bfloat16', checkpoint_every=5000),
    )
