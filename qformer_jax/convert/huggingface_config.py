"""Hugging Face's `config.json` <-> our configuration; a language model's part of it is its family's."""

import json
from pathlib import Path

from .. import config
from ..errors import UserError, nearest
from . import bert
from .config_fields import Fields, Json, read_fields, require, write_fields
from .families import FAMILIES, published_family

_VIT: Fields = (
    ('image_size', 'image_size', 224),
    ('patch_size', 'patch_size', 14),
    ('width', 'hidden_size', 1408),
    ('depth', 'num_hidden_layers', 39),
    ('heads', 'num_attention_heads', 16),
    ('mlp_width', 'intermediate_size', 6144),
    ('norm_eps', 'layer_norm_eps', 1e-6),
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
)
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
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'{path} is not JSON ({error}): fetch it again') from error
    if 'model_type' not in found:
        raise UserError(f"{path} names no 'model_type': is it a model of Hugging Face?")
    return found


def model_of(hf_config: Json) -> config.Blip2Config:
    """Return our configuration of a `config.json`; raises UserError for a kind of model that has no place here."""
    kind = hf_config['model_type']
    alone = {'vit': None, 'qformer': None, 'lm': None}
    if kind in ('blip-2', 'instructblip'):
        return _blip2(hf_config, kind)
    if kind in [*FAMILIES]:  # it may be no text
        return config.Blip2Config(**alone | {'lm': language_model_of(hf_config)})
    if kind == 'bert':
        return config.Blip2Config(**alone | {'qformer': _bert_of(hf_config)})
    if kind == 'dinov2':
        return config.Blip2Config(**alone | {'vit': _dinov2_of(hf_config)})
    known = ('blip-2', 'instructblip', *FAMILIES, 'bert', 'dinov2')
    raise UserError(f"no table for models of type '{kind}'{nearest(kind, known)}; known: {', '.join(known)}")


def _blip2(hf_config: Json, kind: str) -> config.Blip2Config:
    vision, qformer = hf_config.get('vision_config', {}), hf_config.get('qformer_config', {})
    require(vision, 'hidden_act', 'gelu')
    require(vision, 'qkv_bias', True)
    words = qformer.get('vocab_size', bert.WORDS)  # [DEC] is one of them, unless they are BERT's own number
    retrieves = 'Blip2ForImageTextRetrieval' in (hf_config.get('architectures') or ())
    text_side = 'reads' if kind == 'instructblip' else 'retrieval' if retrieves else 'none'
    c = config.QformerConfig(
        **read_fields(_QFORMER, qformer),
        num_queries=hf_config.get('num_query_tokens', 32),
        embed_width=hf_config.get('image_text_hidden_size', 256),
        vocab_size=words if words == bert.WORDS else words - 1,
        text_side=text_side,
    )
    vit = config.VitConfig(**read_fields(_VIT, vision))
    return config.Blip2Config(vit, c, None if retrieves else language_model_of(hf_config.get('text_config', {})))


def language_model_of(hf_config: Json) -> config.LmConfig:
    """Return our configuration of a language model's; raises UserError for a variant that has no place here."""
    kind = hf_config.get('model_type', 'opt')
    if kind not in [*FAMILIES]:
        raise UserError(f"no table for a language model of type '{kind}'; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind].read_config(hf_config)


def _bert_of(hf_config: Json) -> config.QformerConfig:
    require(hf_config, 'hidden_act', 'gelu')
    return config.QformerConfig(**read_fields(_BERT, hf_config), vocab_size=hf_config.get('vocab_size', bert.WORDS))


def _dinov2_of(hf_config: Json) -> config.VitConfig:
    require(hf_config, 'hidden_act', 'gelu')
    require(hf_config, 'use_swiglu_ffn', False)
    fields = read_fields(_DINOV2, hf_config)
    mlp_width = int(fields['width'] * hf_config.get('mlp_ratio', 4))
    return config.VitConfig(**fields, mlp_width=mlp_width, attention_bias='all', layer_scale=True, final_norm=True)


def of_model(c: config.Blip2Config) -> Json:
    """Return the `config.json` of what `huggingface.blip2` writes for `c`."""
    if c.vit is None and c.qformer is None:
        return of_language_model(c.lm)
    q = c.qformer
    head = {'none': 'Blip2ForConditionalGeneration', 'retrieval': 'Blip2ForImageTextRetrieval'}
    qformer = write_fields(_QFORMER, q) | {'vocab_size': q.vocab_size + 1}
    found = {
        'architectures': [head.get(q.text_side, 'InstructBlipForConditionalGeneration')],
        'model_type': 'instructblip' if q.text_side == 'reads' else 'blip-2',
        'num_query_tokens': q.num_queries,
        'image_text_hidden_size': q.embed_width,
        'vision_config': write_fields(_VIT, c.vit) | {'qkv_bias': True, 'hidden_act': 'gelu'},
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
