"""Hugging Face's models, tiny and with every weight random, as cases: their layers, and ours from the same file.

llama.cpp's names are those of the same Llama, by the list and the order of rows of the `gguf` package.
"""

import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import flax.linen as nn
import gguf
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax.typing import DTypeLike

from qformer_jax.convert import huggingface_config, llama
from qformer_jax.convert.lazy_tensors import read_all
from qformer_jax.convert.recognise import CheckpointSource, recognise
from qformer_jax.convert.table import Table
from qformer_jax.models.blip2 import Blip2Module
from qformer_jax.rules import unflatten
from qformer_jax.runs import import_export
from qformer_jax.typing import Params
from qformer_jax.verify.huggingface import compare, inputs, layerwise, reference
from qformer_jax.verify.recorded.comparison import Arrays, Work

from .subject import Subject

WIDTHS = {'hidden_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 3}
GGUF = 'gguf'
QUERIES = np.random.default_rng(0).normal(size=(1, 3, 24)).astype(np.float32)


def retrieval() -> torch.nn.Module:
    """Return BLIP-2 with the heads of ITM and ITC; EVA has no bias of keys."""
    c = transformers.Blip2Config(
        vision_config={'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 40}
        | {'image_size': 28, 'patch_size': 14},
        qformer_config=WIDTHS
        | {'vocab_size': 50, 'intermediate_size': 36, 'max_position_embeddings': 20, 'encoder_hidden_size': 32}
        | {'use_qformer_text_input': True},
        num_query_tokens=4,
        image_token_index=None,
    )
    c.image_text_hidden_size = 16
    model = transformers.Blip2ForImageTextRetrieval(c)
    _randomise(model)
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data[32:64] = 0
    return model


def _alone(kind: str, **sizes: object) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        name = {'Bert': 'BertModel', 'Dinov2': 'Dinov2Model', 'T5': 'T5ForConditionalGeneration'}
        model = getattr(transformers, name.get(kind, f'{kind}ForCausalLM'))(
            getattr(transformers, f'{kind}Config')(**sizes)
        )
        if kind == 'T5':  # they tie its output table, which Flan-T5 does not
            model.lm_head.weight = torch.nn.Parameter(torch.zeros(56, 24))
        return _randomise(model)

    return make


def _randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Make every weight random: ones and zeros would hide an exchange."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


LM = {'vocab_size': 56, 'max_position_embeddings': 40}
MODELS = {
    'blip-2': retrieval,
    'opt': _alone('OPT', ffn_dim=40, word_embed_proj_dim=24, **WIDTHS, **LM),
    'llama': _alone('Llama', intermediate_size=40, num_key_value_heads=3, **WIDTHS, **LM),
    't5': _alone(
        'T5',
        **{'vocab_size': 56, 'd_model': 24, 'd_kv': 8, 'd_ff': 40, 'num_layers': 2, 'num_heads': 3},
        **{'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 20},
        **{'feed_forward_proj': 'gated-gelu', 'decoder_start_token_id': 0, 'tie_word_embeddings': False},
    ),
    'bert': _alone('Bert', vocab_size=60, intermediate_size=40, **WIDTHS),
    'dinov2': _alone('Dinov2', image_size=28, mlp_ratio=2, **WIDTHS),
}


@cache
def _read(kind: str) -> tuple[Subject, CheckpointSource]:
    """Return a model as a case, and what its folder is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        MODELS[kind]().save_pretrained(folder)
        kind = huggingface_config.read(folder / 'config.json')['model_type']
        source, model = recognise(folder, compare.READER), import_export.read([folder], compare.READER)
        c, state, params = model.run.model, read_all(source.tensors), unflatten(read_all(model.tensors))
        probe = inputs.make(c)
        network = reference.load(folder, c, kind)[0]
    recorded = reference.compute(network, c, kind, probe)
    if kind == 'bert':
        chunks = [layer.feed_forward_chunk(torch.tensor(QUERIES)) for layer in network.encoder.layer]
        recorded |= {f'queries of layer_{i}': x.detach().numpy() for i, x in enumerate(chunks)}
    real = {name: compare.existing(name, c, probe) for name in recorded}

    def function(params: Params, _: Arrays, dtype: DTypeLike, gradients: bool) -> Arrays:
        found = {}
        for parts, stage in layerwise.stages(c):
            mine = {part: params[part] for part in parts if part in params}
            found |= nn.apply(stage, Blip2Module(c, dtype))({'params': mine}, probe, found)
        if kind == 'bert':
            found |= nn.apply(_feed_forward, Blip2Module(c, dtype))({'params': params})
        return {name: x if real.get(name) is None else x[real[name]] for name, x in found.items()}

    expected = {name: x if real[name] is None else x[real[name]] for name, x in recorded.items()}
    return Subject(state, Work(params, {}, function, expected, {}, (), {}, frozenset())), source


def _feed_forward(model: Blip2Module) -> Arrays:
    """Return what the queries' network, which begins as the words', makes of fixed queries in each layer."""
    x = jnp.asarray(QUERIES, model.dtype)
    layers = enumerate(model.qformer.layer)
    return {f'queries of layer_{i}': layer.query_mlp_norm(x + layer.query_mlp(x)) for i, layer in layers}


def table(kind: str) -> Table:
    """Return the conversion table of a model."""
    source = _read('llama' if kind == GGUF else kind)[1]
    return llama.gguf(source.model.lm) if kind == GGUF else source.table


def read(kind: str) -> Subject:
    """Return their model, its tensors by their names."""
    if kind != GGUF:
        return _read(kind)[0]
    subject, source = _read('llama')
    names, state = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.model.lm.depth), {}
    for key, value in subject.state.items():
        name = names.get_name(key, try_suffixes=('.weight',))
        state[name] = _paired(value, source.model.lm.heads) if re.search(r'attn_[qk]\.', name) else value
    return Subject(state, subject.work)


def _paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return a weight whose rows are llama.cpp's: of a head's two halves, in turn."""
    half = len(weight) // heads // 2
    return weight[[h * 2 * half + s * half + j for h in range(heads) for j in range(half) for s in (0, 1)]]
