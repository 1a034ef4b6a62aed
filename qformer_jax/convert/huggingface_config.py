"""Hugging Face's `config.json` <-> our configuration; a language model's part of it is its family's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .. import config, json_file
from ..errors import UserError, nearest
from . import bert
from .config_fields import Fields, Json, read_fields, require, section, value, write_fields
from .families import FAMILIES, published_family

Part = TypeVar('Part')

_VIT: Fields = (
    ('image_size', 'image_size', 224),
    ('patch_size', 'patch_size', 14),
    ('width', 'hidden_size', 1408),
    ('depth', 'num_hidden_layers', 39),
    ('heads', 'num_attention_heads', 16),
    ('mlp_width', 'intermediate_size', 6144),
    ('norm_eps', 'layer_norm_eps', 1e-6),
    ('activation', 'hidden_act', 'gelu'),
)
_BERT: Fields = (
    ('width', 'hidden_size', 768),
    ('depth', 'num_hidden_layers', 12),
    ('heads', 'num_attention_heads', 12),
    ('mlp_width', 'intermediate_size', 3072),
    ('max_positions', 'max_position_embeddings', 512),
    ('norm_eps', 'layer_norm_eps', 1e-12),
)
_QFORMER: Fields = (
    *_BERT,
    ('cross_attention_freq', 'cross_attention_frequency', 2),
    ('feature_width', 'encoder_hidden_size', 1408),
    ('dropout', 'hidden_dropout_prob', 0.1),
)
_KEY_BIAS = 'key_bias'
"""Field of our own in `vision_config`: true where a tower has a bias on keys, which may be zero. Theirs always has."""
_DINOV2: Fields = (
    ('image_size', 'image_size', 224),
    ('patch_size', 'patch_size', 14),
    ('width', 'hidden_size', 768),
    ('depth', 'num_hidden_layers', 12),
    ('heads', 'num_attention_heads', 12),
    ('norm_eps', 'layer_norm_eps', 1e-6),
)


def read(path: Path) -> Json:
    """Return a `config.json`; raises UserError when it is none."""
    found = json_file.read(path, dict[str, Any], 'fetch it again')
    if 'model_type' not in found:
        raise UserError(f"{path} names no 'model_type': is it a model of Hugging Face?")
    value(found, 'model_type', str, '')
    return found


def model_of(hf_config: Json) -> config.Blip2Config:
    """Return our configuration of a `config.json`; raises UserError for a kind of model that has no place here."""
    kind = hf_config['model_type']
    alone = {'vit': None, 'qformer': None, 'lm': None}
    if kind in ('blip-2', 'instructblip'):
        return _blip2(hf_config, kind)
    if kind in FAMILIES:
        return config.Blip2Config(**alone | {'lm': language_model_of(hf_config)})
    if kind == 'bert':
        return config.Blip2Config(**alone | {'qformer': _bert_of(hf_config)})
    if kind == 'dinov2':
        return config.Blip2Config(**alone | {'vit': _dinov2_of(hf_config)})
    known = ('blip-2', 'instructblip', *FAMILIES, 'bert', 'dinov2')
    raise UserError(f"no table for models of type '{kind}'{nearest(kind, known)}; known: {', '.join(known)}")


def _blip2(hf_config: Json, kind: str) -> config.Blip2Config:
    retrieves = 'Blip2ForImageTextRetrieval' in (value(hf_config, 'architectures', list[str] | None, None) or ())
    text_side = 'reads' if kind == 'instructblip' else 'retrieval' if retrieves else 'none'
    c = replace(
        _part(hf_config, 'qformer_config', _qformer_of),
        num_queries=value(hf_config, 'num_query_tokens', int, 32),
        embed_width=value(hf_config, 'image_text_hidden_size', int, 256),
        text_side=text_side,
    )
    lm = None if retrieves else _part(hf_config, 'text_config', language_model_of)
    return config.Blip2Config(_part(hf_config, 'vision_config', _eva_of), c, lm)


def _part(hf_config: Json, name: str, read: Callable[[Json], Part]) -> Part:
    """Return what `read` makes of a part; raises UserError that names it."""
    found = section(hf_config, name)
    try:
        return read(found)
    except UserError as error:
        raise UserError(f'{name}: {error}') from None


def _eva_of(hf_config: Json) -> config.VitConfig:
    require(hf_config, 'qkv_bias', True)
    biased = 'all' if value(hf_config, _KEY_BIAS, bool, False) else 'query_value'
    return read_fields(_VIT, hf_config, config.VitConfig, attention_bias=biased)


def _qformer_of(hf_config: Json) -> config.QformerConfig:
    require(hf_config, 'hidden_act', 'gelu')
    words = value(hf_config, 'vocab_size', int, bert.WORDS)  # [DEC] is one of them, unless they are BERT's own number
    rows = words if words == bert.WORDS else words - 1
    return read_fields(_QFORMER, hf_config, config.QformerConfig, vocab_size=rows)


def language_model_of(hf_config: Json) -> config.LmConfig:
    """Return our configuration of a language model's; raises UserError for a variant that has no place here."""
    kind = value(hf_config, 'model_type', str, 'opt')
    if kind not in FAMILIES:
        raise UserError(f"no table for a language model of type '{kind}'; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind].read_config(hf_config)


def _bert_of(hf_config: Json) -> config.QformerConfig:
    require(hf_config, 'hidden_act', 'gelu')
    words = value(hf_config, 'vocab_size', int, bert.WORDS)
    return read_fields(_BERT, hf_config, config.QformerConfig, vocab_size=words)


def _dinov2_of(hf_config: Json) -> config.VitConfig:
    require(hf_config, 'hidden_act', 'gelu')
    require(hf_config, 'use_swiglu_ffn', False)
    vit = read_fields(_DINOV2, hf_config, config.VitConfig, attention_bias='all', layer_scale=True, final_norm=True)
    return replace(vit, mlp_width=vit.width * value(hf_config, 'mlp_ratio', int, 4))


def of_model(c: config.Blip2Config) -> Json:
    """Return the `config.json` of what `huggingface.blip2` writes for `c`."""
    if c.vit is None and c.qformer is None:
        return of_language_model(c.lm)
    q = c.qformer
    head = {'none': 'Blip2ForConditionalGeneration', 'retrieval': 'Blip2ForImageTextRetrieval'}
    qformer = write_fields(_QFORMER, q) | {'vocab_size': q.vocab_size + 1, 'attention_probs_dropout_prob': q.dropout}
    key_bias = {_KEY_BIAS: True} if c.vit.attention_bias == 'all' else {}
    found = {
        'architectures': [head.get(q.text_side, 'InstructBlipForConditionalGeneration')],
        'model_type': 'instructblip' if q.text_side == 'reads' else 'blip-2',
        'num_query_tokens': q.num_queries,
        'image_text_hidden_size': q.embed_width,
        'vision_config': write_fields(_VIT, c.vit) | {'qkv_bias': True} | key_bias,
        'qformer_config': qformer | {'use_qformer_text_input': q.text_side == 'retrieval'},
    }
    if q.text_side == 'reads':
        del found['qformer_config']['use_qformer_text_input']
    if c.lm:
        found['text_config'] = of_language_model(c.lm)
        found['use_decoder_only_language_model'] = not c.lm.encoder_decoder
    return found


def of_language_model(c: config.LmConfig) -> Json:
    """Return the `config.json` of a language model alone, or the `text_config` of a whole one."""
    family = published_family(c)
    return {'architectures': [family.huggingface_class], 'model_type': c.family} | family.write_config(c)
