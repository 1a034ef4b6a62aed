"""Visual question answering on easy-VQA with instruction-aware queries (InstructBLIP): the Q-Former reads it too.

    qformer train easy_vqa_instruct_aware --run runs/easy_vqa/instruct_aware

The vision tower and the language model stay frozen.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Objective, Run


def config() -> Run:
    plain, _ = recipes.load('easy_vqa_instruct')
    rules = ('(vit|lm)/.*', None), ('qformer/.*', 1.0), ('lm_projection/.*', 1.0)
    return replace(
        plain,
        data=replace(plain.data, caption_fraction=0.0),
        objective=Objective(instruction_aware=True),
        optimizer=replace(plain.optimizer, rate_rules=rules),
    )
