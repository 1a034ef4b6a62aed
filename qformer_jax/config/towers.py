"""The frozen ends: vision tower and language models, and what learns of the latter, or beside it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import UserError
from .ranges import MILLION, Few, FromZero


@dataclass(frozen=True)
class VitConfig:
    """A vision transformer; the defaults are EVA ViT-g/14 as BLIP-2 uses it (39 blocks, no final norm)."""

    image_size: int = 224
    """Height and width of the picture, pixels; another size than in pretraining resizes the position table."""
    patch_size: int = 14
    """Height and width of a patch, pixels."""
    width: int = 1408
    """Hidden width."""
    depth: Few = 39
    """Number of blocks."""
    heads: int = 16
    """Attention heads."""
    mlp_width: int = 6144
    """Hidden width of the MLP."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    activation: Literal['gelu', 'quick_gelu'] = 'gelu'
    """Exact (erf) GELU, or CLIP's x * sigmoid(1.702 x)."""
    attention_bias: Literal['all', 'query_value'] = 'query_value'
    """Which attention projections have a bias: EVA has none on keys."""
    patch_bias: bool = True
    """Whether the patch projection has a bias (CLIP: no)."""
    pre_norm: bool = False
    """CLIP's LayerNorm before the first block (`ln_pre`)."""
    layer_scale: bool = False
    """DINOv2's learned gain on both branches of a block."""
    final_norm: bool = False
    """DINOv2's LayerNorm after the last block (BLIP-2 normalises on the Q-Former's side instead)."""
    position_resize: Literal['half_pixel', 'align_corners'] = 'half_pixel'
    """Grid of the bicubic position resize: EVA and DINOv2 use half-pixel centres, LAVIS's CLIP aligned corners."""
    positions: Literal['noise', 'waves'] = 'noise'
    """How a fresh position table begins: as noise of deviation 0.02, or as slow cosines over the grid, as large as what
    patches hold, with which a small tower learns far sooner where things are."""
    taps: tuple[int, ...] = ()
    """Blocks, from 0, whose outputs side by side are the features (Yao et al. 2024); empty: the last one alone."""

    def __post_init__(self):
        wrong = [tap for tap in self.taps if not 0 <= tap < self.depth]
        if wrong:
            raise UserError(f'model.vit.taps has {wrong[0]}, but the blocks are numbered 0 to {self.depth - 1}')
        if not 1 <= self.patch_size <= MILLION:
            raise UserError(f'model.vit.patch-size is {self.patch_size}, it must be at least 1 and at most {MILLION:,}')
        fits = max(self.image_size // self.patch_size, 1) * self.patch_size
        if self.image_size != fits:
            raise UserError(
                f'model.vit.image_size is {self.image_size}, which patches of {self.patch_size} pixels do not fill: '
                f'take {fits} or {fits + self.patch_size}'
            )

    @property
    def feature_width(self) -> int:
        """Width of what leaves the tower (V): its own, for each tap."""
        return self.width * max(1, len(self.taps))


@dataclass(frozen=True)
class OptConfig:
    """An OPT decoder (Zhang et al. 2022); the defaults are OPT-2.7B."""

    family: Literal['opt'] = 'opt'
    """Kind of language model."""
    encoder_decoder: ClassVar[bool] = False
    """Whether an encoder reads what comes before the answer, not the decoder itself."""
    vocab_size: FromZero = 50272
    """Rows of the token table (N); 0: the tokenizer's."""
    width: int = 2560
    """Hidden width (L)."""
    depth: Few = 32
    """Number of layers."""
    heads: int = 32
    """Attention heads."""
    mlp_width: int = 10240
    """Hidden width of the MLP."""
    max_positions: int = 2048
    """Longest sequence, queries included."""
    embed_width: FromZero = 0
    """Width of token vectors, projected to the hidden width and back (OPT-350M: 512); 0: the hidden width."""
    norm_first: bool = True
    """LayerNorm before each branch and after the last block; False: after each branch only (OPT-350M)."""

    @property
    def input_width(self) -> int:
        """Width of what the model reads: token vectors and the soft prefix."""
        return self.embed_width or self.width

    @property
    def position_limit(self) -> int | None:
        """Longest sequence that it can read, queries included; None: any."""
        return self.max_positions

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and width of a head of what its decoder keeps: keys and values."""
        return self.depth, self.heads, self.width // self.heads


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama decoder (Touvron et al. 2023); the defaults are Vicuna-7B v1.1 as InstructBLIP uses it."""

    family: Literal['llama'] = 'llama'
    """Kind of language model."""
    encoder_decoder: ClassVar[bool] = False
    """Whether an encoder reads what comes before the answer, not the decoder itself."""
    vocab_size: FromZero = 32001
    """Rows of the token table (N), Vicuna's with one for padding; 0: the tokenizer's."""
    width: int = 4096
    """Hidden width (L)."""
    depth: Few = 32
    """Number of layers."""
    heads: int = 32
    """Attention heads."""
    kv_heads: int = 32
    """Heads of keys and values, each read by the same number of attention heads."""
    head_width: int = 128
    """Width of one head (K)."""
    mlp_width: int = 11008
    """Hidden width of the gated MLP."""
    max_positions: int = 2048
    """Longest sequence, queries included."""
    rope_base: float = 10000.0
    """Base of the wavelengths of rotary positions."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    tied: bool = False
    """Whether the token table is the output table too."""

    @property
    def input_width(self) -> int:
        """Width of what the model reads: token vectors and the soft prefix."""
        return self.width

    @property
    def position_limit(self) -> int | None:
        """Longest sequence that it can read, queries included; None: any."""
        return self.max_positions

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and width of a head of what its decoder keeps: keys and values."""
        return self.depth, self.kv_heads, self.head_width


@dataclass(frozen=True)
class T5Config:
    """A T5 encoder-decoder (Raffel et al. 2020) in the form of Flan-T5; the defaults are Flan-T5-XL."""

    family: Literal['t5'] = 't5'
    """Kind of language model."""
    encoder_decoder: ClassVar[bool] = True
    """Whether an encoder reads what comes before the answer, not the decoder itself."""
    vocab_size: FromZero = 32128
    """Rows of the token table (N), and of the output table, its own; 0: the tokenizer's."""
    width: int = 2048
    """Hidden width (L)."""
    depth: Few = 24
    """Layers of the encoder."""
    decoder_depth: Few = 24
    """Layers of the decoder."""
    heads: int = 32
    """Attention heads."""
    head_width: int = 64
    """Width of one head (K)."""
    mlp_width: int = 5120
    """Hidden width of the gated MLP."""
    activation: Literal['gelu', 'gelu_tanh'] = 'gelu'
    """Of the gated MLP: exact GELU as in LAVIS, or the tanh form, with which Flan-T5 was trained (`gelu_new`)."""
    buckets: int = 32
    """Buckets of relative positions."""
    max_distance: int = 128
    """Positions further apart share the last bucket."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""

    def __post_init__(self):
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise UserError(
                f'model.lm.buckets is {self.buckets} and max-distance {self.max_distance}: there must be at least 4, '
                'and the distance more than half as many'
            )

    @property
    def input_width(self) -> int:
        """Width of what the model reads: token vectors and the soft prefix."""
        return self.width

    @property
    def position_limit(self) -> int | None:
        """Longest sequence that it can read, queries included; None: any."""
        return None  # positions are relative

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and width of a head of what its decoder keeps: keys and values."""
        return self.decoder_depth, self.heads, self.head_width


LmConfig = OptConfig | LlamaConfig | T5Config
"""A language model of any family."""


@dataclass(frozen=True)
class LoraConfig:
    """Steps of low rank beside frozen products of the language model (Hu et al. 2021); `lora/.*` are their paths."""

    rank: int = 8
    """Width of a step (R)."""
    alpha: float = 16.0
    """A step counts alpha / rank times, so that another rank needs no other learning rate."""
    targets: str = r'.*attention/(query|value)'
    """Regex over the language model's dense layers (`layer_0/mlp/up`); default: queries and values, as in the paper."""


@dataclass(frozen=True)
class GroundingConfig:
    """Words for boxes, added to the language model's vocabulary (KOSMOS-2, Peng et al. 2023); they learn in rows of
    their own, whose paths are `grounding/.*`."""

    grid: int = 32
    """Cells along a side of a picture (G); G * G of the words are places."""
    in_table: bool = False
    """Whether the rows stand at the end of the language model's table, as `qformer convert` writes them, and are frozen
    with it; False: they are a component of their own."""


@dataclass(frozen=True)
class GatesConfig:
    """Gated cross-attention between the blocks of a frozen decoder (Flamingo, Alayrac et al. 2022, section 3.1.2).

    The decoder reads text only; what stands between the towers is read here instead of in front of the text.
    """

    every: int = 4
    """Before every such block of the language model, from block 0."""
    heads: int = 32
    """Attention heads."""
    mlp_width: int = 10240
    """Hidden width of the MLP (Flamingo: four times the language model's)."""
