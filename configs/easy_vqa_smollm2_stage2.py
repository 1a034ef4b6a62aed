"""Stage 2 on easy-VQA over a real language model: frozen SmolLM2-135M-Instruct reads 3 queries, writes the caption.

    qformer convert SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2 --dtype bfloat16
    qformer train easy_vqa_smollm2_stage2 --run runs/easy_vqa/smollm2_stage2

The language model (Allal et al. 2025) knows nothing of pictures, and only captions teach the Q-Former to speak to it:
what it answers to questions after this stage is zero-shot. `experiments/easy_vqa/smollm2.py` runs and evaluates it.
"""

from qformer_jax.config import Blip2Config, Data, Optimizer, Run, Start, Training
from qformer_jax.presets import SMOLLM2_135M, TINY_QFORMER, TINY_VIT
from qformer_jax.rules import TEXT_SIDE


def config() -> Run:
    return Run(
        stage='stage2',
        model=Blip2Config(vit=TINY_VIT, qformer=TINY_QFORMER, lm=SMOLLM2_135M),
        data=Data(
            path='data/easy_vqa',
            train_split='train[10%:]',
            validation_split='train[:10%]',
            crop_scale=(0.8, 1.0),
            max_lm_text=8,
            question_prompt=('Question: {question} Short answer:',),
        ),
        optimizer=Optimizer(
            peak_rate=1e-3,
            final_rate=5e-5,
            warmup_steps=50,
            clip_norm=1.0,
            rate_rules=(('(vit|lm)/.*', None), (TEXT_SIDE, None), ('qformer/.*', 1.0), ('lm_projection/.*', 1.0)),
        ),
        training=Training(steps=400, batch_size=128, dtype='bfloat16', checkpoint_every=200, validation_batches=2),
        start=Start(checkpoint='runs/easy_vqa/stage1', lm='runs/smollm2'),
    )
