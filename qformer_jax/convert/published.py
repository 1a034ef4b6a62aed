"""Which class of LAVIS's or Hugging Face's a model of ours is, and what that class has no place for.

Ours keeps the text side of stage 1 in later stages; the published classes of stage 2 do not have it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .. import config, presets
from ..errors import UserError
from ..models import blip2
from ..rules import flatten
from . import bert, huggingface, lavis
from .families import published_family
from .lazy_tensors import State, Tensor
from .table import Table, check_complete, to_torch

_OURS = {'vit': ('taps',), 'qformer': ('query_bank', 'local_queries', 'gated_residual')}
"""Part -> fields with which it computes what no class of theirs does."""
_FIXED_VIT = ('pre_norm', 'layer_scale', 'final_norm', 'attention_bias', 'patch_bias', 'activation', 'norm_eps')
_FIXED_VIT += ('position_resize',)
"""Fields of a tower that are no sizes, and that their classes have no option for."""
_FIXED_QFORMER = ('feature_norm_eps',)


@dataclass(frozen=True)
class Target:
    """A class of theirs: its name, the model of ours that fills it exactly, and the rows."""

    name: str
    model: config.Blip2Config
    table: Table


def for_lavis(model: config.Blip2Config, reads: bool) -> Target:
    """Return LAVIS's class for a model; `reads`: its Q-Former reads the question. Raises UserError if there is none."""
    _check_plain(model, 'LAVIS')
    if model.vit:
        clip = model.vit.pre_norm
        _check_fixed('LAVIS', 'vit', model.vit, presets.VIT_L if clip else presets.VIT_G, _FIXED_VIT)
    if model.qformer:
        _check_fixed('LAVIS', 'qformer', model.qformer, presets.QFORMER_G, (*_FIXED_QFORMER, 'norm_eps'))
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
    for part in ('vit', 'qformer'):
        if not getattr(model, part):
            raise UserError(f"Hugging Face's BLIP-2 classes have a tower and a Q-Former; here model.{part} is None")
    free = ('norm_eps', 'activation', 'attention_bias')
    fixed = [name for name in _FIXED_VIT if name not in free]
    _check_fixed('Hugging Face', 'vit', model.vit, presets.VIT_G, fixed)
    _check_fixed('Hugging Face', 'qformer', model.qformer, presets.QFORMER_G, _FIXED_QFORMER)
    target = replace(model, word_head=0, qformer=_kept(model, reads, 'retrieval'))
    if not model.lm and target.qformer.text_side == 'none':
        raise UserError("Hugging Face's Blip2ForConditionalGeneration has a language model: name its checkpoint too")
    name = {'none': 'Blip2ForConditionalGeneration', 'retrieval': 'Blip2ForImageTextRetrieval'}
    return Target(
        name.get(target.qformer.text_side, 'InstructBlipForConditionalGeneration'), target, huggingface.blip2(target)
    )


def _check_fixed(whose: str, part: str, c: object, published: object, names: Sequence[str]) -> None:
    """Raise UserError for a field in which a part differs from that of their class."""
    for name in names:
        found, value = getattr(c, name), getattr(published, name)
        if found != value:
            field = f'model.{part}.{name.replace("_", "-")}'
            raise UserError(f"no class of {whose}'s computes what {field} {found} does: theirs has {value}")


def _check_plain(model: config.Blip2Config, whose: str) -> None:
    plain = config.Blip2Config()
    for part, name in [(part, name) for part, names in _OURS.items() for name in names if getattr(model, part)]:
        value = getattr(getattr(model, part), name)
        if value != getattr(getattr(plain, part), name):
            raise UserError(f"no class of {whose}'s computes what model.{part}.{name.replace('_', '-')} {value} does")
    if model.qformer and model.qformer.vocab_size == bert.WORDS - 1:
        raise UserError(
            f'model.qformer.vocab-size {bert.WORDS - 1} and [DEC] are as many rows as BERT has without it: in a file '
            f"of {whose}'s its last row would be a word"
        )
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
