"""The families of language models in files of others, an entry each: names, tables, configurations.

`models/families.py` has what they compute. An entry's functions stand in the family's own file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import Data, LmConfig
from . import llama, opt, t5
from .config_fields import Json
from .lazy_tensors import State
from .table import Table


@dataclass(frozen=True)
class PublishedFamily:
    """What Hugging Face and LAVIS call a family, and how their files become ours; keys of the table: `model_type`."""

    huggingface_class: str
    """Its class in transformers, a language model alone; LAVIS embeds the same one."""
    table: Callable[[Any], Table]
    """Configuration -> the rows of that class."""
    read_config: Callable[[Json], LmConfig]
    """`config.json` -> configuration; raises UserError for a variant that has no place here."""
    write_config: Callable[[Any], Json]
    """Configuration -> what its `config.json` says beside the class."""
    lavis_class: str
    """The class of LAVIS with such a language model."""
    lavis_prefix: str
    """What its `PREFIX_model` and `PREFIX_proj` begin with in that class."""
    read_lavis: Callable[[State, LmConfig | None], LmConfig]
    """(its tensors in a file of LAVIS, the model that the user wants) -> configuration."""
    question_prompt: tuple[str, ...] = Data.question_prompt
    """How BLIP-2 asks it (Li et al. 2023, section 4.1)."""
    plain: Callable[[State, Json], State] = lambda state, hf_config: state
    """(tensors as some files name them, their `config.json`) -> as the class does."""


FAMILIES = {
    'opt': PublishedFamily(
        'OPTForCausalLM',
        opt.opt,
        opt.read_config,
        opt.write_config,
        lavis_class='Blip2OPT',
        lavis_prefix='opt',
        read_lavis=opt.read_lavis,
        plain=opt.plain,
    ),
    't5': PublishedFamily(
        'T5ForConditionalGeneration',
        t5.t5,
        t5.read_config,
        t5.write_config,
        lavis_class='Blip2T5',
        lavis_prefix='t5',
        read_lavis=t5.read_lavis,
        question_prompt=('Question: {question} Short answer:',),
        plain=t5.plain,
    ),
    'llama': PublishedFamily(
        'LlamaForCausalLM',
        llama.llama,
        llama.read_config,
        llama.write_config,
        lavis_class='Blip2Vicuna',
        lavis_prefix='llm',
        read_lavis=llama.read_lavis,
    ),
}


def published_family(c: LmConfig) -> PublishedFamily:
    """Return the entry of a language model's family."""
    return FAMILIES[c.family]
