"""What stands between the frozen ends."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Qformer:
    """The Q-Former (BLIP-2, section 3.1); the defaults are BERT-base with 32 queries."""

    feature_width: int = 1408
    """Width of the frozen features (V); 0: the tower's, or the data set's."""
    num_queries: int = 32
    """Learned queries (Q)."""
    width: int = 768
    """Hidden width (D)."""
    depth: int = 12
    """Number of layers."""
    heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Hidden width of both feed-forward networks (queries' and text's)."""
    cross_attention_freq: int = 2
    """Cross-attention sits in every such layer, from layer 0."""
    vocab_size: int = 30522
    """Rows of the text vocabulary as pretrained (N), without `[DEC]`, a parameter of its own; 0: the tokenizer's."""
    max_positions: int = 512
    """Rows of the text position table."""
    embed_width: int = 256
    """Width of the shared image-text embedding of ITC (E)."""
    dropout: float = 0.1
    """Dropout on embeddings, attention weights and branch outputs, in training only."""
    norm_eps: float = 1e-12
    """Epsilon of BERT's LayerNorms."""
    feature_norm_eps: float = 1e-5
    """Epsilon of the LayerNorm on the features."""
    text_side: Literal['full', 'retrieval', 'reads', 'none'] = 'full'
    """Which text parameters exist: `full`: all that stage 1 trains; `retrieval`: without language-model head and
    temperature (Hugging Face's ITM model); `reads`: the text branch without heads (InstructBLIP); `none` (BLIP-2 after
    stage 1, as published)."""
