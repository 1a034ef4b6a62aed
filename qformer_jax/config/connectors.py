"""What stands between the frozen ends: the Q-Former, connectors without a text side, and the times of a video."""

from dataclasses import dataclass, field
from math import isqrt
from typing import Literal

from ..errors import UserError
from .ranges import Decay, Few, FromZero


@dataclass(frozen=True)
class QformerConfig:
    """The Q-Former (BLIP-2, section 3.1); the defaults are BERT-base with 32 queries."""

    feature_width: FromZero = 1408
    """Width of the frozen features (V); 0: the tower's, or the data set's."""
    num_queries: int = 32
    """Learned queries (Q)."""
    width: int = 768
    """Hidden width (D)."""
    depth: Few = 12
    """Number of layers."""
    heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Hidden width of both feed-forward networks (queries' and text's)."""
    cross_attention_freq: int = 2
    """Every how many layers there is cross-attention, from layer 0; 2: in every other one."""
    vocab_size: FromZero = 30522
    """Rows of the text vocabulary as pretrained (N), without `[DEC]`, a parameter of its own; 0: the tokenizer's."""
    max_positions: int = 512
    """Rows of the text position table."""
    embed_width: int = 256
    """Width of the shared image-text embedding of ITC (E)."""
    dropout: Decay = 0.1
    """Dropout on embeddings, attention weights and branch outputs, in training only."""
    norm_eps: float = 1e-12
    """Epsilon of BERT's LayerNorms."""
    feature_norm_eps: float = 1e-5
    """Epsilon of the LayerNorm on the features."""
    text_side: Literal['full', 'retrieval', 'reads', 'none'] = 'full'
    """Which text parameters exist: `full`: all that stage 1 trains; `retrieval`: without language-model head and
    temperature (Hugging Face's ITM model); `reads`: the text branch without heads (InstructBLIP); `none` (BLIP-2 after
    stage 1, as published)."""
    query_bank: int = 1
    """Learned vectors that each query mixes by what the picture is (dynamic queries; Cui et al. 2023: 4); 1: none."""
    local_queries: FromZero = 0
    """How many queries, the last ones, each see only one window of a square grid of patches (a square number)."""
    gated_residual: bool = False
    """Add the pooled features to the queries' output behind a gate that begins shut (our name: QFormer++)."""

    def __post_init__(self):
        if self.query_bank < 1:
            raise UserError(f'model.qformer.query-bank is {self.query_bank}, it must be at least 1 (1: no mixture)')
        root = isqrt(max(self.local_queries, 0))
        if self.local_queries != root**2:
            raise UserError(
                f'model.qformer.local-queries is {self.local_queries}, but their windows tile a square: '
                f'it must be a square number, such as {root**2} or {(root + 1) ** 2}'
            )
        if self.local_queries > self.num_queries:
            raise UserError(
                f'model.qformer.local-queries is {self.local_queries}, of {self.num_queries} queries in all '
                '(model.qformer.num-queries)'
            )


@dataclass(frozen=True)
class ConnectorConfig:
    """A connector without a text side: features to tokens for the language model, in the Q-Former's place or beside it.

    A kind reads the fields that it has a use for; its docstring says which.
    """

    kind: str = 'mlp'
    """Which one: a file of `qformer_jax/models/connectors/`, or the name that you give to one of your own."""
    feature_width: FromZero = 0
    """Width of the frozen features (V); 0: the tower's, or the data set's."""
    tokens: int = 32
    """Tokens that the language model reads (Q), where they are not as many as the features; `windowed`: of a window."""
    window: int = 17
    """Features that `windowed` reads at a time (SALMONN: 17, for one token)."""
    width: int = 768
    """Hidden width (D)."""
    depth: Few = 2
    """Number of layers."""
    heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Hidden width of feed-forward networks."""
    module: type | None = field(default=None, metadata={'json': False})
    """Of your own kind: its class. A recipe file gives it; no run keeps it, so `--connector FILE` names it in use."""

    def __post_init__(self):
        if self.window < 1:
            raise UserError(f'model.connector.window is {self.window}, it must be at least 1')


@dataclass(frozen=True)
class TimeConfig:
    """A learned vector for the time of each frame of a video (Flamingo, section 3.1.1), added to all its features.

    Without it a video is the set of all features of its frames: cross-attention sees no order.
    """

    frames: int = 8
    """Rows of the table (F), for so many frames; a longer video's frames lie between them."""
    patches: FromZero = 0
    """Features of a frame; 0: the tower's."""
