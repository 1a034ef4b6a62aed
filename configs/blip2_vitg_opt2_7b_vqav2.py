"""BLIP-2 fine-tuned on VQAv2 at 490 px, with OPT-2.7B, after the paper (Li et al. 2023, section 4.3); not run here.

    qformer train blip2_vitg_opt2_7b_vqav2 --run RUN --data.path VQA --data.mixed-with VG --start.checkpoint STAGE2

Vision encoder and Q-Former learn, the Q-Former reads the question too, the language model stays frozen. Paper: 5 epochs
of 128, rate 1e-5 after 1,000 steps of warm-up, each block of the tower at 0.95 of the rate of the one above it, the
prompt "Question: {} Answer:"; questions of VQAv2's train and val and of Visual Genome. LAVIS has no recipe for it, and
the numbers are written from memory of the paper's appendix: compare them before you rely on them. Steps are for VQAv2's
658,111 questions. The answers: --num-beams 5. Checked by shapes: 1,174,914,304 trained parameters.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Objective, Run
from qformer_jax.presets import VIT_G_490
from qformer_jax.rules import STAGE1_ONLY, vit_layer_decay


def config() -> Run:
    base, _ = recipes.load('blip2_vitg_opt2_7b_stage2')
    tower = vit_layer_decay(VIT_G_490.depth, 0.95)
    return replace(
        base,
        stage='instruct',
        model=replace(base.model, vit=VIT_G_490),
        data=replace(base.data, question_prompt=('Question: {question} Answer:',)),
        objective=Objective(instruction_aware=True),
        optimizer=replace(
            base.optimizer,
            peak_rate=1e-5,
            final_rate=0.0,
            warmup_steps=1000,
            beta2=0.999,
            rate_rules=(*tower, ('lm/.*', None), (STAGE1_ONLY, None), ('.*', 1.0)),
        ),
        training=replace(base.training, steps=25_710, batch_size=128, checkpoint_every=5142),
    )
