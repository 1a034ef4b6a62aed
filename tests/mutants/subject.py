"""What a mutant is judged by: somebody else's tensors, and what their code made of them."""

from dataclasses import dataclass

import numpy as np

from qformer_jax.verify.recorded.comparison import Work


@dataclass(frozen=True, eq=False)
class Subject:
    """A recorded case, or a model of Hugging Face's."""

    state: dict[str, np.ndarray]
    """Their weights by their names; nothing where a case has none."""
    work: Work
    """Our computation from the same weights, and what theirs gave."""
