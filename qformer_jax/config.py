"""Every choice a run makes, as frozen dataclasses; imports no JAX.

The defaults are BLIP-2's published sizes (Li et al. 2023, section 3.4; ViT-g/14, BERT-base Q-Former, OPT-2.7B).
`configs/NAME.py` returns a `Run`; the command line is generated from these classes and their field docstrings.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

from .errors import UserError

Stage = Literal['vision', 'language', 'stage1', 'stage2', 'instruct']
Rules = tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class Vit:
    """A vision transformer; the defaults are EVA ViT-g/14 as BLIP-2 uses it (39 blocks, no final norm)."""

    image_size: int = 224
    """Height and width of the picture, pixels; another size than in pretraining resizes the position table."""
    patch_size: int = 14
    """Height and width of a patch, pixels."""
    width: int = 1408
    """Features a token (V)."""
    depth: int = 39
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


@dataclass(frozen=True)
class Opt:
    """An OPT decoder (Zhang et al. 2022); the defaults are OPT-2.7B."""

    family: Literal['opt'] = 'opt'
    """Kind of language model."""
    vocab_size: int = 50272
    """Rows of the token table (N); 0: the tokenizer's."""
    width: int = 2560
    """Hidden width (L)."""
    depth: int = 32
    """Number of layers."""
    heads: int = 32
    """Attention heads."""
    mlp_width: int = 10240
    """Hidden width of the MLP."""
    max_positions: int = 2048
    """Longest sequence, queries included."""
    embed_width: int = 0
    """Width of token vectors, projected to the hidden width and back (OPT-350M: 512); 0: the hidden width."""
    norm_first: bool = True
    """LayerNorm before each branch and after the last block; False: after each branch only (OPT-350M)."""

    @property
    def input_width(self) -> int:
        """Width of what the model reads: token vectors and the soft prefix."""
        return self.embed_width or self.width


@dataclass(frozen=True)
class Llama:
    """A Llama decoder (Touvron et al. 2023); the defaults are Vicuna-7B v1.1 as InstructBLIP uses it."""

    family: Literal['llama'] = 'llama'
    """Kind of language model."""
    vocab_size: int = 32001
    """Rows of the token table (N), Vicuna's with one for padding; 0: the tokenizer's."""
    width: int = 4096
    """Hidden width (L)."""
    depth: int = 32
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


@dataclass(frozen=True)
class T5:
    """A T5 encoder-decoder (Raffel et al. 2020) in the form of Flan-T5; the defaults are Flan-T5-XL."""

    family: Literal['t5'] = 't5'
    """Kind of language model."""
    vocab_size: int = 32128
    """Rows of the token table (N), and of the output table, its own; 0: the tokenizer's."""
    width: int = 2048
    """Hidden width (L)."""
    depth: int = 24
    """Layers of the encoder."""
    decoder_depth: int = 24
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

    @property
    def input_width(self) -> int:
        """Width of what the model reads: token vectors and the soft prefix."""
        return self.width


@dataclass(frozen=True)
class Lora:
    """Steps of low rank beside frozen products of the language model (Hu et al. 2021); `lora/.*` are their paths."""

    rank: int = 8
    """Width of a step (R)."""
    alpha: float = 16.0
    """A step counts alpha / rank times, so that another rank needs no other learning rate."""
    targets: str = r'.*attention/(query|value)'
    """Regex over the language model's dense layers (`layer_0/mlp/up`); default: queries and values, as in the paper."""


@dataclass(frozen=True)
class Blip2:
    """What the network is made of; a part that is None is absent."""

    vit: Vit | None = field(default_factory=Vit)
    """Vision tower; None where a run reads feature arrays."""
    qformer: Qformer | None = field(default_factory=Qformer)
    """Connector between the frozen towers."""
    lm: Opt | Llama | T5 | None = field(default_factory=Opt)
    """Language model; None in stage 1."""
    lora: Lora | None = None
    """What learns of a frozen language model, in `stage2` and `instruct`; None: nothing does."""
    word_head: int = 0
    """Outputs of the bag-of-words head; the `vision` stage sets it to the tokenizer's size, 0 elsewhere: none."""


@dataclass(frozen=True)
class Data:
    """What a run reads, and how records become arrays."""

    path: str = ''
    """Folder written by `qformer data pack`."""
    mixed_with: tuple[str, ...] = ()
    """More such folders: every row is drawn from one of them all, by the square root of their sizes."""
    train_split: str = 'train'
    """Split to train on, in tensorflow_datasets' notation: `train`, `train[10%:]`."""
    validation_split: str = ''
    """Split for validation losses; empty: no validation."""
    max_text: int = 32
    """Q-Former text tokens a row (T), [CLS] and [SEP] included; longer texts are cut."""
    max_lm_text: int = 32
    """Language-model tokens a row, prompt and answer together; longer rows are cut at the right."""
    max_patches: int = 0
    """Feature rows (P) to pad to when the data set holds feature arrays; 0: the longest one in the data set."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Random resized crop: smallest and largest share of the picture's area; (1, 1): no crop."""
    flip: bool = True
    """Mirror half of the pictures left to right."""
    question_prompt: tuple[str, ...] = ('Question: {question} Answer:',)
    """Prompts of the language model for a question: training draws one a row, anything else takes the first."""
    caption_prompt: tuple[str, ...] = ('',)
    """Prompts of the language model for a caption, drawn and taken alike."""
    caption_fraction: float = 0.0
    """Share of the rows of `language` and `instruct` that ask for the caption instead of an answer."""

    def __post_init__(self):
        for name in ('question_prompt', 'caption_prompt'):
            if isinstance(text := getattr(self, name), str):  # or each letter would be a prompt
                raise UserError(f"data.{name} is one text, and a tuple of them is expected: write ('{text}',)")


@dataclass(frozen=True)
class Objective:
    """The choices inside the losses (BLIP-2, section 3.2 and 3.3); the first six weigh the terms of stage 1."""

    itc: float = 1.0
    """Weight of image-text contrast; a term of weight 0 is not computed (but ITC's similarities choose negatives)."""
    itm: float = 1.0
    """Weight of image-text matching."""
    itg: float = 1.0
    """Weight of image-grounded text generation."""
    cross_modal: float = 0.0
    """Weight of CyCLIP's cross-modal consistency (Goel et al. 2022: 0.25)."""
    in_modal: float = 0.0
    """Weight of CyCLIP's in-modal consistency (0.25)."""
    intra_modal: float = 0.0
    """Weight of contrast between two views of a picture, and of a text, by dropout (Gao et al. 2021); needs dropout."""
    label_smoothing: float = 0.1
    """Of ITC and ITG; ITM and the language-model loss of stages 2 and 3 have none."""
    gather_grad: Literal['local', 'global'] = 'local'
    """ITC gradient: `local` stops it on the gathered side, as LAVIS's `concat_all_gather` does; `global` keeps both."""
    positives: Literal['shared', 'diagonal'] = 'shared'
    """`shared`: pairs with the same caption or picture are positives of each other; `diagonal`: only the own pair."""
    token_mean: Literal['global', 'per_shard'] = 'global'
    """Mean over all tokens of the batch, or over each device's tokens and then over devices (LAVIS)."""
    instruction_aware: bool = False
    """In `instruct`: whether the Q-Former reads the question too (InstructBLIP, section 2.3)."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up and cosine (BLIP-2, section 3.4)."""

    peak_rate: float = 1e-4
    """Learning rate after the warm-up."""
    final_rate: float = 0.0
    """Learning rate at the last step."""
    warmup_start: float = 0.0
    """Learning rate at step 0."""
    warmup_steps: int = 2000
    """Steps of the linear warm-up."""
    schedule: Literal['cosine', 'lavis'] = 'cosine'
    """`cosine`: every step, as in the paper; `lavis`: constant within an epoch, warm-up only in the first one."""
    steps_per_epoch: int = 0
    """Length of an epoch for the `lavis` schedule."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment (LAVIS: 0.999)."""
    weight_decay: float = 0.05
    """Decoupled weight decay; matrices, tables and query tokens only."""
    clip_norm: float = 0.0
    """Largest global gradient norm; 0: no clipping, as in the paper."""
    rate_rules: Rules = (('.*', 1.0),)
    """(regex over the parameter path, multiple of the learning rate), first match wins; None freezes."""


@dataclass(frozen=True)
class Training:
    """How long, how much at a time, and what is kept."""

    steps: int = 250_000
    """Optimizer steps."""
    batch_size: int = 1680
    """Pairs a step, over all devices."""
    accumulate: int = 1
    """Micro-batches a step (stages 2 and 3, and the towers); in stage 1 it would shrink the negatives: refused."""
    seed: int = 0
    """Seed of weights, dropout, negatives and data order."""
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    """Compute dtype, and the dtype in which frozen weights are held; trained weights and losses stay float32."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; each computes the validation losses first."""
    validation_batches: int = 8
    """Batches of the validation split that a validation loss averages."""
    max_skipped: int = 20
    """Steps with non-finite gradients that are skipped before the run stops."""


@dataclass(frozen=True)
class Start:
    """Where parameters come from: resume > checkpoint > pretrained > scratch, a component at a time."""

    checkpoint: str = ''
    """Finished run of the stage before: every component that it holds is taken from it."""
    vit: str = ''
    """Finished run that pretrained the vision tower."""
    lm: str = ''
    """Finished run that pretrained the language model."""


@dataclass(frozen=True)
class Run:
    """One training run, complete: its canonical JSON is hashed into the fingerprint."""

    stage: Stage
    """What is trained: a tower (`vision`, `language`), `stage1`, `stage2` or `instruct`."""
    model: Blip2 = field(default_factory=Blip2)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    start: Start = field(default_factory=Start)


def to_json(run: Run) -> str:
    """Return the canonical JSON of a run: every field, sorted keys."""
    return json.dumps(dataclasses.asdict(run), sort_keys=True, indent=1)


def digest(run: Run, inputs: dict[str, str]) -> str:
    """Return 12 hex digits that name a configuration and the content it reads (SHA-256 of canonical JSON)."""
    text = to_json(run) + json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def from_json(text: str) -> Run:
    """Return the run whose `to_json` is `text`; raises KeyError or TypeError when it is another version's."""
    tree = json.loads(text)
    model = tree['model']
    parts = {'vit': Vit, 'qformer': Qformer, 'lora': Lora}
    if model['lm']:
        parts['lm'] = {'opt': Opt, 'llama': Llama, 't5': T5}[model['lm'].get('family', 'opt')]
    model |= {name: part(**model[name]) for name, part in parts.items() if model.get(name)}
    for name in ('question_prompt', 'caption_prompt'):
        prompts = tree['data'][name]
        tree['data'][name] = (prompts,) if isinstance(prompts, str) else tuple(prompts)  # older runs: one text
    tree['data']['mixed_with'] = tuple(tree['data'].get('mixed_with', ()))  # runs before it had one data set
    tree['data']['crop_scale'] = tuple(tree['data']['crop_scale'])
    tree['optimizer']['rate_rules'] = tuple(map(tuple, tree['optimizer']['rate_rules']))
    return Run(
        stage=tree['stage'],
        model=Blip2(**model),
        data=Data(**tree['data']),
        objective=Objective(**tree['objective']),
        optimizer=Optimizer(**tree['optimizer']),
        training=Training(**tree['training']),
        start=Start(**tree['start']),
    )
