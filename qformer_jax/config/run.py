"""A training run, complete: the network, what it reads, what it minimises, how long, and from where it starts."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..errors import UserError
from .connectors import ConnectorConfig, QformerConfig, TimeConfig
from .ranges import Decay, FromZero, Range, Rate, Seed, Share
from .towers import GatesConfig, GroundingConfig, LmConfig, LoraConfig, OptConfig, VitConfig

Stage = Literal['vision', 'language', 'stage1', 'stage2', 'instruct']
Rules = tuple[tuple[str, float | None], ...]

BETWEEN = ('time', 'qformer', 'lm_projection', 'connector', 'connector_norm', 'connector_projection')
"""The components of parameters between the frozen ends."""


@dataclass(frozen=True)
class Blip2Config:
    """What the network is made of; a part that is None is absent."""

    vit: VitConfig | None = field(default_factory=VitConfig)
    """Vision tower; None where a run reads feature arrays."""
    qformer: QformerConfig | None = field(default_factory=QformerConfig)
    """The Q-Former between the frozen towers."""
    lm: LmConfig | None = field(default_factory=OptConfig)
    """Language model; None in stage 1."""
    lora: LoraConfig | None = None
    """What learns of a frozen language model, in `stage2` and `instruct`; None: nothing does."""
    grounding: GroundingConfig | None = None
    """Words for boxes beside the language model's own, in `stage2` and `instruct`; None: there are none."""
    connector: ConnectorConfig | None = None
    """Another connector in place of the Q-Former (None), or beside it: its tokens follow the queries (BLIVA)."""
    time: TimeConfig | None = None
    """When each frame of a video is; None: both read a video's features as a set, without order."""
    gates: GatesConfig | None = None
    """Layers inside a decoder that read pictures, in `stage2` and `instruct`; None: it reads them before the text."""
    word_head: FromZero = 0
    """Outputs of the bag-of-words head; the `vision` stage sets it to the tokenizer's size, 0 elsewhere: none."""

    @property
    def feature_width(self) -> int:
        """Width of the features (V) that the Q-Former and the connector read; 0 where there is neither."""
        return next((part.feature_width for part in (self.qformer, self.connector) if part), 0)


@dataclass(frozen=True)
class Data:
    """What a run reads, and how records become arrays."""

    path: str = ''
    """Folder written by `qformer data pack`."""
    mixed_with: tuple[str, ...] = ()
    """More such folders: every row is drawn from one of them all, by the square root of their sizes."""
    train_split: str = 'train'
    """Split to train on, in tensorflow_datasets' notation: `train`, `train[10%:]`. A part is by position: where like
    records lie together, it is no fair sample."""
    validation_split: str = ''
    """Split for validation losses; empty: no validation."""
    max_text: FromZero = 32
    """Q-Former text tokens a row (T), [CLS] and [SEP] included; longer texts are cut; 0: the data set's longest."""
    max_lm_text: FromZero = 32
    """Language-model tokens a row, prompt and answer together; longer rows are cut at the right; 0: the longest."""
    cut_texts: Share = field(default=0.05, metadata={'later': True})
    """Largest share of the texts that may be longer than `max_text` or `max_lm_text`, and so are cut: 0 to 1."""
    max_patches: FromZero = 0
    """Feature rows (P) to pad to when the data set holds feature arrays; 0: the longest one in the data set."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Random resized crop: smallest and largest share of the picture's area, above 0 and at most 1; (1, 1): no crop."""
    flip: bool = True
    """Mirror half of the pictures left to right."""
    question_prompt: tuple[str, ...] = ('Question: {question} Answer:',)
    """Prompts of the language model for a question: training draws one a row, anything else takes the first."""
    caption_prompt: tuple[str, ...] = ('',)
    """Prompts of the language model for a caption, drawn and taken as those for a question."""
    caption_fraction: Share = 0.0
    """Share of the rows of `language` and `instruct` that ask for the caption instead of an answer."""
    phrase_prompt: tuple[str, ...] = ('<grounding><phrase>{phrase}</phrase>',)
    """Prompts of the language model for the boxes of a phrase, as those for a question; the default is KOSMOS-2's."""
    phrase_fraction: Share = 0.0
    """Share of the rows of `stage2` and `instruct` that ask where a phrase is, of records that say so; the picture is
    then neither cropped nor mirrored."""

    def __post_init__(self):
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:  # NaN is not
            raise UserError(f'data.crop-scale is {low} {high}; expected two shares, 0 < smallest <= largest <= 1')
        for name in ('question_prompt', 'caption_prompt', 'phrase_prompt'):
            if isinstance(text := getattr(self, name), str):  # or each letter would be a prompt
                raise UserError(f"data.{name} is one text, and a tuple of them is expected: write ('{text}',)")


@dataclass(frozen=True)
class Objective:
    """The choices inside the losses (BLIP-2, section 3.2 and 3.3); the first seven weigh the terms of stage 1."""

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
    static_queries: float = 0.0
    """Weight of ITC, ITM and ITG once more, from the mean of each query's bank (Cui et al. 2023: 1)."""
    label_smoothing: Decay = 0.1
    """Label smoothing of ITC and ITG; ITM and the language-model loss of stages 2 and 3 have none."""
    gather_grad: Literal['local', 'global'] = 'local'
    """ITC gradient: `local` stops it on the gathered side, as LAVIS's `concat_all_gather` does; `global` keeps both."""
    positives: Literal['shared', 'diagonal'] = 'shared'
    """`shared`: pairs with the same caption or picture are positives of each other; `diagonal`: only the own pair."""
    token_mean: Literal['global', 'per_shard'] = 'global'
    """Mean over all tokens of the batch, or over each device's tokens and then over devices (LAVIS)."""
    nested_queries: bool = False
    """Draw in each step (or micro-batch) how many queries exist, the first 1, 2, 4, ... or all, so that a run's first m
    serve alone (`models/nested.py`); validation has all."""
    instruction_aware: bool = False
    """In `instruct`: whether the Q-Former reads the question too (InstructBLIP, section 2.3)."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up and cosine (BLIP-2, section 3.4)."""

    peak_rate: Rate = 1e-4
    """Learning rate after the warm-up."""
    final_rate: Rate = 0.0
    """Learning rate at the last step."""
    warmup_start: Rate = 0.0
    """Learning rate at step 0."""
    warmup_steps: Annotated[int, Range()] = 2000
    """Steps of the linear warm-up."""
    schedule: Literal['cosine', 'lavis'] = 'cosine'
    """`cosine`: every step, as in the paper; `lavis`: constant within an epoch, warm-up only in the first one."""
    steps_per_epoch: Annotated[int, Range()] = 0
    """Length of an epoch for the `lavis` schedule."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.98
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

    steps: Annotated[int, Range(1, 100_000_000)] = 250_000
    """Optimizer steps, at most 100 million."""
    batch_size: int = 1680
    """Pairs a step, over all devices."""
    accumulate: int = 1
    """Micro-batches a step (stages 2 and 3, and the towers); in stage 1 it would shrink the negatives: refused."""
    seed: Seed = 0
    """Seed of weights, dropout, negatives and data order."""
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    """Compute dtype, and the dtype in which frozen weights are held; trained weights and losses stay float32."""
    checkpoint_every: Annotated[int, Range(1)] = 1000
    """Steps between checkpoints; each computes the validation losses first."""
    validation_batches: int = 8
    """Batches of the validation split that a validation loss averages."""
    max_skipped: Annotated[int, Range()] = 20
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
    scratch: tuple[str, ...] = field(default=(), metadata={'later': True})
    """Frozen components, such as `vit lm`, that may begin from the initialisers: to try or to time something."""


@dataclass(frozen=True)
class Run:
    """One training run, complete: its canonical JSON is hashed into the fingerprint."""

    stage: Stage
    """What is trained: a tower (`vision`, `language`), `stage1`, `stage2` or `instruct`."""
    model: Blip2Config = field(default_factory=Blip2Config)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    start: Start = field(default_factory=Start)
