"""Questions on easy-VQA where LoRA on the language model alone learns: the queries stay as captions taught them.

    qformer train easy_vqa_instruct_lora --run runs/easy_vqa/instruct_lora

Hu et al. 2021: rank 8 beside the queries and values, 6,144 numbers. Result (9,673 official test questions, one seed,
two CPU cores): 96.8 %, 61.6 % with shuffled pictures; 78.4 % before this stage, 67.0 % blind baseline. With
`--model.lora.targets '.*'`, beside every product, 27,648 numbers: 99.5 %.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import LoraConfig, Run


def config() -> Run:
    queries, _ = recipes.load('easy_vqa_instruct')
    rules = ('lora/.*', 1.0), ('(vit|lm|qformer|lm_projection)/.*', None)
    return replace(
        queries,
        model=replace(queries.model, lora=LoraConfig(rank=8, alpha=16.0)),
        optimizer=replace(queries.optimizer, rate_rules=rules),
    )
