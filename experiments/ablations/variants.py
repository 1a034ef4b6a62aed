"""The baseline Q-Former with one choice changed."""

from dataclasses import replace

from experiments.ablations import minilm
from experiments.ablations.prepare import BLOCKS, MINILM
from experiments.connectors.variants import BASELINE, Variant, qformer
from qformer_jax.config import Objective, Rules

OBJECTIVES = {
    'ITC alone': Objective(itm=0.0, itg=0.0),
    'ITG alone': Objective(itc=0.0, itm=0.0),
    'ITC, ITM': Objective(itg=0.0),
    'ITC, ITG': Objective(itm=0.0),
    'ITM, ITG': Objective(itc=0.0),
    "with CyCLIP's consistencies": Objective(cross_modal=0.25, in_modal=0.25),
}


def layer_decay(depth: int, decay: float) -> Rules:
    """Return rates that fade towards the features: layer i of `depth` learns at decay ** (depth - 1 - i)."""
    return tuple((rf'qformer/layer_{i}/.*', decay ** (depth - 1 - i)) for i in range(depth))


VARIANTS: tuple[Variant, ...] = (
    *(qformer(f'{count} queries', num_queries=count) for count in (4, 8, 32, 64)),
    *(qformer(f'6 layers, every {freq} reads', depth=6, cross_attention_freq=freq) for freq in (1, 2, 3, 6)),
    *(replace(BASELINE, name=name, objective=objective) for name, objective in OBJECTIVES.items()),
    replace(
        qformer('with contrast of two views', dropout=0.1), objective=Objective(intra_modal=0.25)
    ),
    qformer('dropout 0.1', dropout=0.1),
    replace(BASELINE, name='layer-wise rates', rate_rules=layer_decay(BASELINE.model.qformer.depth, 0.7)),
    *(replace(BASELINE, name=name, features=folder) for folder, (name, _) in BLOCKS.items()),
    replace(qformer("MiniLM's size and words, random", **minilm.SIZE), features=f'features_{MINILM}'),
    replace(qformer('begins as MiniLM', **minilm.SIZE), features=f'features_{MINILM}', begins=MINILM),
)  # fmt: skip
