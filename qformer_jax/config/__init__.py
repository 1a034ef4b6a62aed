"""Every choice a run makes, as frozen dataclasses; imports no JAX.

The defaults are BLIP-2's published sizes (Li et al. 2023, section 3.4; ViT-g/14, BERT-base Q-Former, OPT-2.7B).
`configs/NAME.py` returns a `Run`; the command line is generated from these classes and their field docstrings.
"""

from .canonical import digest, digest_of_tree, from_json, from_tree, part_of, to_json, to_tree
from .connectors import ConnectorConfig, QformerConfig, TimeConfig
from .run import BETWEEN, Blip2Config, Data, Objective, Optimizer, Rules, Run, Stage, Start, Training
from .towers import GatesConfig, GroundingConfig, LlamaConfig, LmConfig, LoraConfig, OptConfig, T5Config, VitConfig

__all__ = [
    'BETWEEN',
    'Blip2Config',
    'ConnectorConfig',
    'Data',
    'GatesConfig',
    'GroundingConfig',
    'LlamaConfig',
    'LmConfig',
    'LoraConfig',
    'Objective',
    'OptConfig',
    'Optimizer',
    'QformerConfig',
    'Rules',
    'Run',
    'Stage',
    'Start',
    'T5Config',
    'TimeConfig',
    'Training',
    'VitConfig',
    'digest',
    'digest_of_tree',
    'from_json',
    'from_tree',
    'part_of',
    'to_json',
    'to_tree',
]

# The names of one release ago, which users' recipes import; they go with the next one.
Blip2, Connector, Gates, Grounding, Llama, Lora = (
    Blip2Config, ConnectorConfig, GatesConfig, GroundingConfig, LlamaConfig, LoraConfig
)  # fmt: skip
Opt, Qformer, T5, Time, Vit = OptConfig, QformerConfig, T5Config, TimeConfig, VitConfig
