"""Questions on easy-VQA over frozen SmolLM2-135M-Instruct: the Q-Former reads them too (InstructBLIP, section 2.3).

    qformer train easy_vqa_smollm2_instruct --run runs/easy_vqa/smollm2_instruct

A tenth of the rows ask for the caption. `--objective.no-instruction-aware` gives BLIP-2's plain queries, which carry
the same to every question.
"""

from qformer_jax.config import Blip2Config, Data, Objective, Optimizer, Run, Start, Training
from qformer_jax.presets import SMOLLM2_135M, TINY_QFORMER, TINY_VIT


def config() -> Run:
    return Run(
        stage='instruct',
        model=Blip2Config(vit=TINY_VIT, qformer=TINY_QFORMER, lm=SMOLLM2_135M),
        data=Data(
            path='data/easy_vqa',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            crop_scale=(0.8, 1.0),
            max_text=16,
            max_lm_text=20,
            question_prompt=('Question: {question} Short answer:',),
            caption_fraction=0.1,
        ),
        objective=Objective(instruction_aware=True),
        optimizer=Optimizer(
            peak_rate=1e-3,
            final_rate=5e-5,
            warmup_steps=50,
            clip_norm=1.0,
            rate_rules=(('(vit|lm)/.*', None), ('qformer/.*', 1.0), ('lm_projection/.*', 1.0)),
        ),
        training=Training(steps=1200, batch_size=128, dtype='bfloat16', checkpoint_every=400, validation_batches=2),
        start=Start(checkpoint='runs/easy_vqa/smollm2_stage2'),
    )
