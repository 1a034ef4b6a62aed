"""One choice that a study compares: a model, how it is trained, and what it reads."""

from dataclasses import dataclass, field

from qformer_jax import config


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
