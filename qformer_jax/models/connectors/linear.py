"""LLaVA's first connector (Liu et al. 2023, section 4.1): the features as they are, for one linear projection."""

import flax.linen as nn
from jax.typing import DTypeLike

from ... import config
from ...typing import Bool, Float


class Connector(nn.Module):
    """One token a feature; all that learns is the projection to the language model. Reads no field."""

    config: config.ConnectorConfig
    dtype: DTypeLike

    def __call__(self, features: Float['B P V'], mask: Bool['B P']) -> tuple[Float['B P V'], Bool['B P']]:
        return features, mask
