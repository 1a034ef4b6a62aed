"""QFormer-Lite: stage 1 with 16 nested queries and 6 layers over EVA ViT-g; not run here.

    qformer train blip2_vitg_stage1_lite --run runs/vitg_lite --data.path DATA --start.vit VIT_RUN

Our name and our choice of sizes: half of BLIP-2's queries and layers (Li et al. 2023, section 3.4), everything else as
in `blip2_vitg_stage1`. Of its queries any first m serve alone (Matryoshka Query Transformer, Hu et al. 2024):
`qformer evaluate RUN --task retrieval --queries 4`, `qformer convert RUN DEST --queries 4`. Checked by shapes:
985,894,528 frozen, 105,781,310 trained parameters; what it loses against 32 queries and 12 layers is not known.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Objective, Run


def config() -> Run:
    whole, _ = recipes.load('blip2_vitg_stage1')
    qformer = replace(whole.model.qformer, num_queries=16, depth=6)
    return replace(whole, model=replace(whole.model, qformer=qformer), objective=Objective(nested_queries=True))
