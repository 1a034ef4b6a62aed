"""`qformer verify`: our numbers beside recorded ones, or beside Hugging Face's."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import UserError
from .options import several


@dataclass(frozen=True)
class Verify:
    """Compare our numbers with those that Salesforce's PyTorch code (LAVIS) gave for the same weights and inputs.

    A case is a folder: meta.json (sizes, texts, what each array means), arrays.npz (inputs and results) and
    state_dict.safetensors (weights by LAVIS's names). The weights go through our conversion tables, the inputs through
    our networks, losses and decoding, and every recorded array gets a row: the largest difference, the same relative to
    the array's largest entry, how much is allowed, pass or FAIL. Allowed is ten times what float32 itself does to the
    array, measured against float64, but never more than 1e-5 of its scale; for a gradient 1e-5 of its largest entry;
    token ids must be equal. The exit code is 1 if a row fails.

    With --against huggingface the folder is a model of Hugging Face instead (BLIP-2, its ITM model, InstructBLIP; OPT,
    Llama, T5, BERT or DINOv2 alone), and transformers computes the other side here and now: a row for each layer, and
    the first layer that disagrees. Allowed is ten times what float32 does to that layer in our code. This needs PyTorch
    and memory for the model in float32, one side after the other, with a few GB to spare: 4 bytes a parameter, 16 GB
    for BLIP-2 with OPT-2.7B.
    """

    cases: Annotated[tyro.conf.Positional[tuple[Path, ...]], several('CASE')]
    """Folders, each a case, of any sizes. With --against: the folder of one model."""
    against: Literal['huggingface'] | None = None
    """Whose code computes the other side now; default: none does, its numbers were recorded."""
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    """Compute dtype of our side; in bfloat16 the rows say what that costs, and the tolerance is as coarse."""


def verify(options: Verify) -> None:
    """Print a table a case."""
    if not options.cases:
        raise UserError('no case given: qformer verify CASE...')
    if options.against:
        from ..verify.huggingface import compare

        if len(options.cases) > 1 or options.dtype != 'float32':
            raise UserError('--against huggingface takes one folder, and compares in float32')
        good = compare.verify(options.cases[0])
    else:
        from ..verify.recorded import registry

        good = registry.verify(options.cases, options.dtype)
    if not good:
        sys.exit(1)
