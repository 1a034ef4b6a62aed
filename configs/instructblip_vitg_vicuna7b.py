"""InstructBLIP with EVA ViT-g and Vicuna-7B, after the paper (Dai et al. 2023, section 2.6); not run here.

    qformer train instructblip_vitg_vicuna7b --run RUN --data.path A --data.mixed-with B C --start.checkpoint STAGE2

Paper: 60,000 steps of 128 rows, AdamW, cosine from 1e-5 to 0 after 1,000 steps of warm-up from 1e-8, 13 data sets mixed
by the square root of their sizes, a prompt drawn for every row; 16 A100 (40 GB), at most 1.5 days. STAGE2 is a run of
BLIP-2's second stage over the same Vicuna. The numbers are written from memory of the paper: compare them before you
rely on them. Checked by shapes: 188,836,608 trained parameters.
"""

from qformer_jax.config import Blip2Config, Data, Objective, Optimizer, Run, Training
from qformer_jax.presets import QFORMER_G, VICUNA_7B, VIT_G
from qformer_jax.prompts import INSTRUCTBLIP_CAPTIONS, INSTRUCTBLIP_QUESTIONS
from qformer_jax.rules import STAGE1_ONLY


def config() -> Run:
    return Run(
        stage='instruct',
        model=Blip2Config(vit=VIT_G, qformer=QFORMER_G, lm=VICUNA_7B),
        data=Data(
            crop_scale=(0.5, 1.0),
            flip=True,
            max_text=128,
            max_lm_text=128,
            question_prompt=INSTRUCTBLIP_QUESTIONS,
            caption_prompt=INSTRUCTBLIP_CAPTIONS,
        ),
        objective=Objective(instruction_aware=True),
        optimizer=Optimizer(
            peak_rate=1e-5,
            final_rate=0.0,
            warmup_start=1e-8,
            warmup_steps=1000,
            beta2=0.999,
            weight_decay=0.05,
            rate_rules=(
                ('(vit|lm)/.*', None),
                (STAGE1_ONLY, None),
                ('qformer/.*', 1.0),
                ('lm_projection/.*', 1.0),
            ),
        ),
        training=Training(steps=60_000, batch_size=128, dtype='bfloat16', checkpoint_every=3000),
    )
