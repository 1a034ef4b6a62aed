"""Every choice a run makes, as frozen dataclasses; imports no JAX.

The defaults are BLIP-2's published sizes (Li et al. 2023, section 3.4; ViT-g/14, BERT-base Q-Former, OPT-2.7B).
`configs/NAME.py` returns a `Run`; the command line is generated from these classes and their field docstrings.
"""

from .canonical import digest, digest_of_tree, from_json, from_tree, part_of, to_json, to_tree
from .connectors import Connector, Qformer, Time
from .run import BETWEEN, Blip2, Data, Objective, Optimizer, Rules, Run, Stage, Start, Training
from .towers import T5, Gates, Grounding, Llama, Lora, Opt, Vit

__all__ = [
    'BETWEEN', 'T5', 'Blip2', 'Connector', 'Data', 'Gates', 'Grounding', 'Llama', 'Lora', 'Objective', 'Opt',
    'Optimizer', 'Qformer', 'Rules', 'Run', 'Stage', 'Start', 'Time', 'Training', 'Vit', 'digest', 'digest_of_tree',
    'from_json', 'from_tree', 'part_of', 'to_json', 'to_tree',
]  # fmt: skip
