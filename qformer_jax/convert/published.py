"""Which class of LAVIS's or Hugging Face's a model of ours is, and what that class has no place for.

Ours keeps the text side of stage 1 in later stages; the published classes of stage 2 do not have it.
"""

from dataclasses import dataclass, replace

from .. import config
from ..errors import UserError
from ..models import blip2
from ..rules import flatten
from . import huggingface, lavis
from .families import published_family
from .lazy_tensors import State, Tensor
from .table import Table, check_complete, to_torch

_OURS = {'vit': ('taps',), 'qformer': ('query_bank', 'local_queries', 'gated_residual')}
"""Part -> fields with which it computes what no class of theirs does."""


@dataclass(frozen=True)
class Target:
    """A class of theirs: its name, the model of ours that fills it exactly, and the rows."""

    name: str
    model: config.Blip2Config
    table: Table


def for_lavis(model: config.Blip2Config, reads: bool) -> Target:
    """Return LAVIS's class for a model; `reads`: its Q-Former reads the question. Raises UserError if there is none."""
    if model.vit and (model.vit.layer_scale or (model.vit.attention_bias == 'all' and not model.vit.pre_norm)):
        raise UserError(f'LAVIS has EVA and CLIP towers only, and this one is neither: {model.vit}')
    _check_plain(model, 'LAVIS')
    if not model.qformer:
        if model.lm:
            raise UserError("a language model alone is Hugging Face's to name: --to huggingface")
        return Target('a tower', model, lavis.vit(model.vit))
    target = replace(model, word_head=0, qformer=_kept(model, reads, 'full'))
    name = published_family(model.lm).lavis_class if model.lm else 'Blip2Qformer'
    return Target(name + ('Instruct' if reads else ''), target, lavis.blip2(target))


def for_huggingface(model: config.Blip2Config, reads: bool) -> Target:
    """Return Hugging Face's class for a model, as `for_lavis`; raises UserError if there is none."""
    _check_plain(model, 'Hugging Face')
    if model.lm and not model.qformer:
        alone = replace(model, vit=None, word_head=0)
        return Target(f'{model.lm.family} alone', alone, huggingface.language_model_alone(model.lm))
    if not model.vit or not model.qformer or model.vit.pre_norm or model.vit.layer_scale or model.vit.final_norm:
        raise UserError(
            "Hugging Face's BLIP-2 classes have an EVA tower and a Q-Former; this model has "
            f'{"another tower" if model.vit else "no tower"} and {"a" if model.qformer else "no"} Q-Former'
        )
    target = replace(model, word_head=0, qformer=_kept(model, reads, 'retrieval'))
    if not model.lm and target.qformer.text_side == 'none':
        raise UserError("Hugging Face's Blip2ForConditionalGeneration has a language model: name its checkpoint too")
    name = {'none': 'Blip2ForConditionalGeneration', 'retrieval': 'Blip2ForImageTextRetrieval'}
    return Target(
        name.get(target.qformer.text_side, 'InstructBlipForConditionalGeneration'), target, huggingface.blip2(target)
    )


def _check_plain(model: config.Blip2Config, whose: str) -> None:
    plain = config.Blip2Config()
    for part, name in [(part, name) for part, names in _OURS.items() for name in names if getattr(model, part)]:
        value = getattr(getattr(model, part), name)
        if value != getattr(getattr(plain, part), name):
            raise UserError(f"no class of {whose}'s computes what model.{part}.{name.replace('_', '-')} {value} does")
    extra = [f'model.{name}' for name in ('connector', 'time', 'gates') if getattr(model, name)]
    if extra:
        raise UserError(
            f"{whose}'s BLIP-2 has no place for {' and '.join(extra)}: it can only stay a run of this package "
            '(qformer export serves it without)'
        )


def _kept(model: config.Blip2Config, reads: bool, of_stage1: str) -> config.QformerConfig:
    """Return the Q-Former of their class: what its heads are without a language model, and what it reads with one."""
    order = ('none', 'reads', 'retrieval', 'full')
    wanted = ('reads' if reads else 'none') if model.lm else of_stage1
    has = model.qformer.text_side
    if model.lm and order.index(has) < order.index(wanted):
        raise UserError(f"the Q-Former must read the question, but its text side is '{has}'")
    return replace(model.qformer, text_side=min(wanted, has, key=order.index))


def state_dict(tensors: State, target: Target) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under their names, and the parameters of ours that their class has no place for."""
    shapes = blip2.shapes(target.model)
    wanted = flatten(shapes)
    kept = {path: tensor for path, tensor in tensors.items() if path in wanted}
    check_complete(kept, shapes)
    return to_torch(target.table, kept), [path for path in tensors if path not in wanted]
