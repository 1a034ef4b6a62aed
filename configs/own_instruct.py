"""Questions about pictures of your own, answered by frozen SmolLM2-135M-Instruct.

    qformer train own_instruct --run runs/own/instruct

After own_stage2, on a data set with questions. Only the language model reads the question.
"""

from dataclasses import replace

from qformer_jax import recipes
from qformer_jax.config import Run, Start


def config() -> Run:
    base, _ = recipes.load('own_stage2')
    return replace(
        base,
        stage='instruct',
        data=replace(base.data, question_prompt=('Question: {question} Short answer:',), caption_fraction=0.2),
        optimizer=replace(base.optimizer, peak_rate=1e-4),
        start=Start(checkpoint='runs/own/stage2'),
    )
