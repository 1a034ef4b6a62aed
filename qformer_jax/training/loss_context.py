"""What every loss is given beside the bound model and the batch."""

from flax import struct

from .. import config
from ..objectives.matching import Negatives
from ..typing import Array, Bool


@struct.dataclass
class LossContext:
    """The key, the objective, and how a step is computed; a stage reads what it needs of these."""

    key: Array
    """Of what is drawn beside dropout: negatives."""
    objective: config.Objective = struct.field(pytree_node=False)
    train: bool = struct.field(default=False, pytree_node=False)
    """Whether there is dropout."""
    shards: int = struct.field(default=1, pytree_node=False)
    """Parts of the batch that have a mean over tokens of their own."""
    share_image_keys: bool = struct.field(default=True, pytree_node=False)
    """Whether wrong pictures take the keys of the batch; projecting their features again moves less data when they
    live on other devices."""
    query_mask: Bool['Q'] | None = None
    """Which queries exist; None: all."""
    negatives: Negatives | None = None
    """A recorded draw to replay; None: negatives are drawn."""
    static_queries: bool = struct.field(default=False, pytree_node=False)
    """Whether queries that have a bank start from the same vectors for every picture."""
