"""LLaVA-1.5's connector (Liu et al. 2023, 2310.03744, section 3.2): linear, GELU, and the projection as the second."""

import flax.linen as nn
from jax.typing import DTypeLike

from ... import config
from ...typing import Bool, Float
from ..layers import dense, gelu


class Connector(nn.Module):
    """One token a feature, each on its own. Reads `width`."""

    config: config.ConnectorConfig
    dtype: DTypeLike

    def setup(self):
        self.up = dense(self.config.width, self.dtype)

    def __call__(self, features: Float['B P V'], mask: Bool['B P']) -> tuple[Float['B P D'], Bool['B P']]:
        return gelu(self.up(features)), mask
