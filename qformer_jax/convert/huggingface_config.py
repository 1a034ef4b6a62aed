"""Hugging Face's `config.json` <-> our configuration.

A published `config.json` leaves out what equals the default of its class, so each row has that default too.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from .. import config
from ..errors import UserError, nearest
from . import bert

Json = dict[str, Any]
Fields = tuple[tuple[str, str, Any], ...]  # our field, theirs, their default

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
_OPT: Fields = (
    ('vocab_size', 'vocab_size', 50272),
    ('width', 'hidden_size', 768),
    ('depth', 'num_hidden_layers', 12),
    ('heads', 'num_attention_heads', 12),
    ('mlp_width', 'ffn_dim', 3072),
    ('max_positions', 'max_position_embeddings', 2048),
    ('embed_width', 'word_embed_proj_dim', 0),
    ('norm_first', 'do_layer_norm_before', True),
)
_T5: Fields = (
    ('vocab_size', 'vocab_size', 32128),
    ('width', 'd_model', 512),
    ('depth', 'num_layers', 6),
    ('heads', 'num_heads', 8),
    ('head_width', 'd_kv', 64),
    ('mlp_width', 'd_ff', 2048),
    ('buckets', 'relative_attention_num_buckets', 32),
    ('max_distance', 'relative_attention_max_distance', 128),
    ('norm_eps', 'layer_norm_epsilon', 1e-6),
)
_LLAMA: Fields = (
    ('vocab_size', 'vocab_size', 32000),
    ('width', 'hidden_size', 4096),
    ('depth', 'num_hidden_layers', 32),
    ('heads', 'num_attention_heads', 32),
    ('mlp_width', 'intermediate_size', 11008),
    ('max_positions', 'max_position_embeddings', 2048),
    ('norm_eps', 'rms_norm_eps', 1e-6),
    ('tied', 'tie_word_embeddings', False),
)
_DINOV2: Fields = (
    ('image_size', 'image_size', 224),
    ('patch_size', 'patch_size', 14),
    ('width', 'hidden_size', 768),
    ('depth', 'num_hidden_layers', 12),
    ('heads', 'num_attention_heads', 12),
    ('norm_eps', 'layer_norm_eps', 1e-6),
)
_T5_ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh'}


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
    match kind:
        case 'blip-2' | 'instructblip':
            return _blip2(hf_config, kind)
        case 'opt' | 't5' | 'llama':
            return config.Blip2Config(**alone | {'lm': language_model_of(hf_config)})
        case 'bert':
            return config.Blip2Config(**alone | {'qformer': _bert_of(hf_config)})
        case 'dinov2':
            return config.Blip2Config(**alone | {'vit': _dinov2_of(hf_config)})
    known = ('blip-2', 'instructblip', 'opt', 't5', 'llama', 'bert', 'dinov2')
    raise UserError(f"no table for models of type '{kind}'{nearest(kind, known)}; known: {', '.join(known)}")


def _blip2(hf_config: Json, kind: str) -> config.Blip2Config:
    vision, qformer = hf_config.get('vision_config', {}), hf_config.get('qformer_config', {})
    _require(vision, 'hidden_act', 'gelu')
    _require(vision, 'qkv_bias', True)
    words = qformer.get('vocab_size', bert.WORDS)  # [DEC] is one of them, unless they are BERT's own number
    retrieves = 'Blip2ForImageTextRetrieval' in (hf_config.get('architectures') or ())
    text_side = 'reads' if kind == 'instructblip' else 'retrieval' if retrieves else 'none'
    c = config.QformerConfig(
        **_fields(_QFORMER, qformer),
        num_queries=hf_config.get('num_query_tokens', 32),
        embed_width=hf_config.get('image_text_hidden_size', 256),
        vocab_size=words if words == bert.WORDS else words - 1,
        text_side=text_side,
    )
    vit = config.VitConfig(**_fields(_VIT, vision))
    return config.Blip2Config(vit, c, None if retrieves else language_model_of(hf_config.get('text_config', {})))


def language_model_of(hf_config: Json) -> config.OptConfig | config.LlamaConfig | config.T5Config:
    """Return our configuration of a language model's; raises UserError for a variant that has no place here."""
    kind = hf_config.get('model_type', 'opt')
    if kind == 'opt':
        _require(hf_config, 'activation_function', 'relu')
        _require(hf_config, '_remove_final_layer_norm', False)
        fields = _fields(_OPT, hf_config)
        projects = fields['embed_width'] not in (None, fields['width'])
        return config.OptConfig(**fields | {'embed_width': fields['embed_width'] if projects else 0})
    if kind == 't5':
        _require({'feed_forward_proj': 'relu'} | hf_config, 'feed_forward_proj', 'gated-gelu')
        activation = hf_config.get('dense_act_fn', 'gelu_new')
        if activation not in _T5_ACTIVATIONS:
            raise UserError(f"dense_act_fn is '{activation}', but T5 here has {' or '.join(_T5_ACTIVATIONS)}")
        fields = _fields(_T5, hf_config)
        decoder_depth = hf_config.get('num_decoder_layers', fields['depth'])
        return config.T5Config(**fields, decoder_depth=decoder_depth, activation=_T5_ACTIVATIONS[activation])
    if kind == 'llama':
        return _llama_of(hf_config)
    raise UserError(f"no table for a language model of type '{kind}'; known: opt, t5, llama")


def _llama_of(hf_config: Json) -> config.LlamaConfig:
    _require(hf_config, 'hidden_act', 'silu')
    _require(hf_config, 'attention_bias', False)
    _require(hf_config, 'mlp_bias', False)
    _require(hf_config, 'rope_scaling', None)
    rope = hf_config.get('rope_parameters') or {}  # where transformers 5 keeps what was rope_theta
    _require(rope, 'rope_type', 'default')
    fields = _fields(_LLAMA, hf_config)
    return config.LlamaConfig(
        **fields,
        kv_heads=hf_config.get('num_key_value_heads') or fields['heads'],
        head_width=hf_config.get('head_dim') or fields['width'] // fields['heads'],
        rope_base=rope.get('rope_theta', hf_config.get('rope_theta', 10000.0)),
    )


def _bert_of(hf_config: Json) -> config.QformerConfig:
    _require(hf_config, 'hidden_act', 'gelu')
    return config.QformerConfig(**_fields(_BERT, hf_config), vocab_size=hf_config.get('vocab_size', bert.WORDS))


def _dinov2_of(hf_config: Json) -> config.VitConfig:
    _require(hf_config, 'hidden_act', 'gelu')
    _require(hf_config, 'use_swiglu_ffn', False)
    fields = _fields(_DINOV2, hf_config)
    mlp_width = int(fields['width'] * hf_config.get('mlp_ratio', 4))
    return config.VitConfig(**fields, mlp_width=mlp_width, attention_bias='all', layer_scale=True, final_norm=True)


def _fields(rows: Fields, hf_config: Json) -> Json:
    return {field: hf_config.get(name, default) for field, name, default in rows}


def _require(hf_config: Json, name: str, value: object) -> None:
    """Raise UserError when a field that we do not vary is there and has another value."""
    if hf_config.get(name, value) != value:
        raise UserError(f'config.json has {name} {hf_config[name]!r}, but this model here has {value!r} only')


def of_model(c: config.Blip2Config) -> Json:
    """Return the `config.json` of what `huggingface.blip2` writes for `c`."""
    if c.vit is None and c.qformer is None:
        return of_language_model(c.lm)
    q = c.qformer
    head = {'none': 'Blip2ForConditionalGeneration', 'retrieval': 'Blip2ForImageTextRetrieval'}
    qformer = _their_fields(_QFORMER, q) | {'vocab_size': q.vocab_size + 1}
    found = {
        'architectures': [head.get(q.text_side, 'InstructBlipForConditionalGeneration')],
        'model_type': 'instructblip' if q.text_side == 'reads' else 'blip-2',
        'num_query_tokens': q.num_queries,
        'image_text_hidden_size': q.embed_width,
        'vision_config': _their_fields(_VIT, c.vit) | {'qkv_bias': True, 'hidden_act': 'gelu'},
        'qformer_config': qformer | {'use_qformer_text_input': q.text_side == 'retrieval'},
    }
    if q.text_side == 'reads':
        del found['qformer_config']['use_qformer_text_input']
    if c.lm:
        decoder_only = c.lm.family != 't5'
        found |= {'text_config': of_language_model(c.lm), 'use_decoder_only_language_model': decoder_only}
    return found


def of_language_model(c: config.OptConfig | config.LlamaConfig | config.T5Config) -> Json:
    """Return the `config.json` of a language model alone, or the `text_config` of a whole one."""
    if c.family == 'opt':
        name = 'OPTForCausalLM'
        found = _their_fields(_OPT, c) | {'word_embed_proj_dim': c.input_width}
    elif c.family == 'llama':
        name = 'LlamaForCausalLM'
        found = _their_fields(_LLAMA, c) | {
            'num_key_value_heads': c.kv_heads,
            'head_dim': c.head_width,
            'hidden_act': 'silu',
            'rope_theta': c.rope_base,
        }
    else:
        name = 'T5ForConditionalGeneration'
        names = {field: hf_name for hf_name, field in _T5_ACTIVATIONS.items()}
        found = _their_fields(_T5, c) | {
            'num_decoder_layers': c.decoder_depth,
            'feed_forward_proj': 'gated-gelu',
            'dense_act_fn': names[c.activation],
            'tie_word_embeddings': False,
        }
    return {'architectures': [name], 'model_type': c.family} | found


def _their_fields(rows: Fields, c: object) -> Json:
    values = dataclasses.asdict(c)
    return {name: values[field] for field, name, _ in rows}
