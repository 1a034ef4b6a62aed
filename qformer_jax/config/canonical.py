"""A run as canonical JSON, back again, and its digest."""

import dataclasses
import hashlib
import json
from typing import Any

from .connectors import Connector, Qformer, Time
from .run import Blip2, Data, Objective, Optimizer, Run, Start, Training
from .towers import T5, Gates, Grounding, Llama, Lora, Opt, Vit


def to_json(run: Run) -> str:
    """Return the canonical JSON of a run: every field, sorted keys."""
    return json.dumps(dataclasses.asdict(run), sort_keys=True, indent=1)


def digest(run: Run, inputs: dict[str, str]) -> str:
    """Return 12 hex digits that name a configuration and the content it reads (SHA-256 of canonical JSON)."""
    text = to_json(run) + json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def vit_of(tree: dict[str, Any]) -> Vit:
    """Return the vision tower whose canonical JSON is read as `tree`."""
    return Vit(**tree | {'taps': tuple(tree.get('taps', ()))})  # runs before it had none


def from_json(text: str) -> Run:
    """Return the run whose `to_json` is `text`; raises KeyError or TypeError when it is another version's."""
    tree = json.loads(text)
    model = tree['model']
    parts = {'qformer': Qformer, 'connector': Connector, 'time': Time, 'gates': Gates}
    parts |= {'lora': Lora, 'grounding': Grounding}
    if model['lm']:
        parts['lm'] = {'opt': Opt, 'llama': Llama, 't5': T5}[model['lm'].get('family', 'opt')]
    model |= {name: part(**model[name]) for name, part in parts.items() if model.get(name)}
    if model['vit']:
        model['vit'] = vit_of(model['vit'])
    for name in {'question_prompt', 'caption_prompt', 'phrase_prompt'} & tree['data'].keys():
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
