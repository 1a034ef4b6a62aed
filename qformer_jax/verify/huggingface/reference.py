"""A Hugging Face model at work: what leaves each of its layers, under the names of our parameters."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ... import config
from ...convert.families import FAMILIES
from ...errors import UserError
from .inputs import Probe, after_layers, image_token, lm_modules

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Point:
    """One place in their network: our name for it, and the module that it enters or leaves."""

    name: str
    module: str
    enters: bool = False
    call: int = 0
    """Which of the module's calls, counted over all passes."""


def points(c: config.Blip2Config, kind: str) -> list[Point]:
    """Return where to look, in the order in which data flows; `kind` is their `model_type`."""
    if kind == 'dinov2':
        return [*_stack('vit', 'encoder.layer', c.vit.depth), Point('vit/norm', 'layernorm')]
    if kind == 'bert':
        return _stack('qformer', 'encoder.layer', c.qformer.depth)
    if c.qformer is None:
        return _language_model(c.lm, '')
    found = _stack('vit', 'vision_model.encoder.layers', c.vit.depth)
    found.append(Point('qformer/feature_norm', 'vision_model.post_layernorm'))
    found += _stack('qformer', 'qformer.encoder.layer', c.qformer.depth)
    if c.lm:
        return [*found, Point('lm_projection', 'language_projection'), *_language_model(c.lm, 'language_model.')]
    for call, what in enumerate(('queries alone: ', 'text alone: '), 1):
        found += _stack(f'{what}qformer', 'qformer.encoder.layer', c.qformer.depth, call)
    return found


def _stack(name: str, module: str, depth: int, call: int = 0) -> list[Point]:
    layers = [Point(f'{name}/layer_{i}', f'{module}.{i}', call=call) for i in range(depth)]
    return [Point(f'{name}/embedding', f'{module}.0', enters=True, call=call), *layers]


def _language_model(c: config.LmConfig, at: str) -> list[Point]:
    stacks = {'lm/encoder': c.depth, 'lm/decoder': c.decoder_depth} if c.encoder_decoder else {'lm': c.depth}
    modules, found = lm_modules(c), []
    for stack, depth in stacks.items():
        inside = next(name for path, name in modules.items() if path.startswith(f'{stack}/layer_'))
        found += _stack(stack, at + inside.partition('.{i}')[0], depth)
        found += [Point(name, at + modules[name]) for name in after_layers(c, stack)]
    return [*found, Point('logits', f'{at}lm_head')]


def load(source: Path, c: config.Blip2Config, kind: str) -> tuple['torch.nn.Module', list[str]]:
    """Return their model in float32, and what was changed in it because we differ from it on purpose.

    Raises UserError without PyTorch and transformers, or when they cannot read the folder.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError("--against huggingface needs PyTorch: pip install 'qformer_jax[torch]'") from None
    name = _class_name(c, kind)
    try:
        model = getattr(transformers, name).from_pretrained(
            str(source), dtype=torch.float32, attn_implementation='eager', local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: transformers' {name} cannot load it: {' '.join(str(error).split())}") from error
    return model.eval(), _align(model, c, kind)


def _class_name(c: config.Blip2Config, kind: str) -> str:
    if kind == 'blip-2' and c.lm is None:
        return 'Blip2ForImageTextRetrieval'
    names = {
        'blip-2': 'Blip2ForConditionalGeneration',
        'instructblip': 'InstructBlipForConditionalGeneration',
        'bert': 'BertModel',
        'dinov2': 'Dinov2Model',
    }
    return names[kind] if kind in names else FAMILIES[kind].huggingface_class


def _align(model: 'torch.nn.Module', c: config.Blip2Config, kind: str) -> list[str]:
    """Undo where they differ from LAVIS by design, and return one sentence a change."""
    if kind == 'bert':
        model.embeddings.token_type_embeddings.weight.data.zero_()
        return ['their token types were set to zero: a Q-Former has none']
    if kind not in ('blip-2', 'instructblip'):
        return []
    model.config.image_token_index = image_token(c.lm) if c.lm else None
    norm, jax_eps = model.vision_model.post_layernorm, c.qformer.feature_norm_eps
    torch_eps, norm.eps = norm.eps, jax_eps
    if torch_eps == jax_eps:
        return []
    return [
        f'their vision_model.post_layernorm has eps {torch_eps:g}, LAVIS and we {jax_eps:g}: theirs was set to ours'
    ]


def compute(model: 'torch.nn.Module', c: config.Blip2Config, kind: str, probe: Probe) -> dict[str, np.ndarray]:
    """Return what their model gives at every point, and its results, in the order in which data flows."""
    import torch

    where, recorded = points(c, kind), defaultdict(list)
    for name, enters in {(point.module, point.enters) for point in where}:
        _listen(model.get_submodule(name), enters, recorded[name, enters])
    with torch.no_grad():
        results = [model(**arguments) for arguments in _passes(c, kind, probe)]
    found = {point.name: recorded[point.module, point.enters][point.call] for point in where}
    if c.lm:
        return found | {'loss': results[0].loss.numpy()}
    if kind == 'blip-2':
        return found | {
            'itm_logits': results[0].logits_per_image.numpy(),
            'itc_similarity': results[1].logits_per_image.numpy(),
        }
    return found


def _listen(module: 'torch.nn.Module', enters: bool, heard: list[np.ndarray]) -> None:
    def keep(_, positional, named, out) -> None:
        given = positional[0] if positional else named['hidden_states']
        left = out[0] if isinstance(out, tuple) else out
        heard.append((given if enters else left).numpy().copy())

    module.register_forward_hook(keep, with_kwargs=True)


def _passes(c: config.Blip2Config, kind: str, probe: Probe) -> list[dict[str, 'torch.Tensor | bool']]:
    """Return the arguments of each call: one, or ITM and ITC."""
    import torch

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array if array.dtype == np.float32 else array.astype(np.int64))

    picture = {'pixel_values': tensor(probe.pixels.transpose(0, 3, 1, 2))} if c.vit else {}
    words = {'input_ids': tensor(probe.words), 'attention_mask': tensor(probe.words_exist)}
    if kind == 'dinov2':
        return [picture]
    if kind == 'bert':
        return [words]
    if c.lm is None:
        both = picture | words
        return [both | {'use_image_text_matching_head': True}, both | {'use_image_text_matching_head': False}]
    read = {f'qformer_{name}': value for name, value in words.items()} if kind == 'instructblip' else {}
    text = {name: tensor(array) for name, array in probe.for_language_model(c).items()}
    return [picture | read | text]
