"""Questions on easy-VQA where LoRA on the language model alone learns: the queries stay as captions taught them.

    qformer train easy_vqa_instruct_lora --run runs/easy_vqa/instruct_lora

Hu et al. 2021: rank 8 beside the queries and values, 6,144 numbers. Result (9,673 official test questions, one seed,
two CPU cores): 96.8 %, 61.6 % with shuffled pictures; 78.4 % before this stage, 67.0 % blind baseline. With
`--model.lora.targets '.*'`, beside every product, 27,648 numbers: 99.5 %.
"""

from qformer_jax.config import Blip2Config, Data, LoraConfig, Optimizer, Run, Start, Training
from qformer_jax.presets import TINY_OPT, TINY_QFORMER, TINY_VIT


def config() -> Run:
    return Run(
        stage='instruct',
        model=Blip2Config(vit=TINY_VIT, qformer=TINY_QFORMER, lm=TINY_OPT, lora=LoraConfig(rank=8, alpha=16.0)),
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
            rate_rules=(('lora/.*', 1.0), ('(vit|lm|qformer|lm_projection)/.*', None)),
        ),
        training=Training(steps=500, batch_size=128, checkpoint_every=250, validation_batches=2),
        start=Start(checkpoint='runs/easy_vqa/stage2'),
    )
