"""The connectors of the study: each is a model over the same frozen features and the same frozen language model.

Widths, depths and the number of queries are alike wherever a kind has them. A connector with a text side goes through
stage 1 first, unless it says that it does not.
"""

from dataclasses import dataclass, field, replace

from experiments.connectors.prepare import LM
from qformer_jax import config
from qformer_jax.config import ConnectorConfig, QformerConfig

TOKENS = 16
"""Queries, latents, averages: what the language model reads, where a connector compresses."""
QFORMER = QformerConfig(
    feature_width=0, num_queries=TOKENS, width=192, depth=4, heads=6, mlp_width=768, vocab_size=0, max_positions=32,
    embed_width=64, dropout=0.0,
)  # fmt: skip
OTHER = ConnectorConfig(tokens=TOKENS, width=192, depth=4, heads=6, mlp_width=768)


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    name: str
    model: config.Blip2Config
    stage1: bool = True
    """Whether the Q-Former learns to align pictures and texts first; others have no text side for it."""
    objective: config.Objective = field(default_factory=config.Objective)
    rate_rules: config.Rules = ()
    """Before those that all share."""
    features: str = 'features'
    """Folder, beside the packed pictures, of what the tower makes of them."""
    begins: str = ''
    """Finished run, beside those of the study, whose Q-Former stage 1 begins as."""

    @property
    def reads(self) -> bool:
        """Whether the Q-Former reads the question."""
        return self.objective.instruction_aware


def qformer(name: str, stage1: bool = True, **changes: object) -> Variant:
    """Return the Q-Former with some of its fields changed; without stage 1 it has no text side."""
    side = {} if stage1 else {'text_side': 'none'}
    return Variant(name, config.Blip2Config(vit=None, qformer=replace(QFORMER, **changes | side), lm=LM), stage1)


def other(name: str, **changes: object) -> Variant:
    """Return a connector without a text side."""
    connector = replace(OTHER, **changes)
    return Variant(name, config.Blip2Config(vit=None, qformer=None, connector=connector, lm=LM), stage1=False)


def gated(variant: Variant) -> Variant:
    """Return the variant with gated layers in the language model in the place of a soft prefix."""
    return replace(variant, model=replace(variant.model, gates=config.GatesConfig(every=1, heads=4, mlp_width=512)))


BASELINE = qformer('Q-Former')
VARIANTS = (
    BASELINE,
    qformer('Q-Former, no stage 1', stage1=False),
    qformer('QFormer-Lite (8 queries, 2 layers)', num_queries=8, depth=2),
    replace(BASELINE, name='Q-Former, reads the question', objective=config.Objective(instruction_aware=True)),
    replace(
        qformer('dynamic queries (a bank of 4)', query_bank=4),
        objective=config.Objective(static_queries=1.0),
    ),
    replace(
        BASELINE,
        name='nested queries (1, 2, 4, 8, 16)',
        objective=config.Objective(nested_queries=True),
    ),
    qformer('QFormer++ (gated residual)', gated_residual=True),
    qformer('multi-granularity (12 global, 4 local)', local_queries=4),
    replace(
        BASELINE,
        name='Q-Former beside patches (BLIVA)',
        model=replace(BASELINE.model, connector=replace(OTHER, kind='mlp')),
    ),
    other('linear (LLaVA)', kind='linear'),
    other('MLP (LLaVA-1.5)', kind='mlp'),
    other('average pool + MLP (DeCo)', kind='average_pool'),
    other('C-Abstractor (Honeybee)', kind='c_abstractor', depth=2),
    other('Perceiver resampler (Flamingo)', kind='resampler'),
    other('windowed Q-Former (SALMONN)', kind='windowed', tokens=4, window=17),
    gated(other('resampler read by gated layers (Flamingo)', kind='resampler')),
)
