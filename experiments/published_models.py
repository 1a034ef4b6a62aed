"""The published checkpoints that `qformer convert` reads, with their sizes: the model table of the README.

    python -m experiments.published_models          (prints the table; no weights are made or read)

Every number comes from `jax.eval_shape`. Bytes are those of the weights as `Blip2.load(RUN, weights=...)` holds them:
vision encoder and language model in bfloat16 or int8, the Q-Former and its projections in float32. Activations and
caches come on top.
"""

import functools
from dataclasses import dataclass, replace

import jax

from qformer_jax import config, presets
from qformer_jax.inference import quantize
from qformer_jax.models import blip2
from qformer_jax.presets import FLAN_T5_XL, FLAN_T5_XXL, OPT_2_7B, OPT_6_7B, VICUNA_7B, VICUNA_13B
from qformer_jax.rules import flatten, match

Lm = config.OptConfig | config.LlamaConfig | config.T5Config
GRADE = '*full-size shapes checked*'


@dataclass(frozen=True)
class Published:
    """A published checkpoint: its class, our configuration of it, and what to name to `qformer convert`."""

    name: str
    model: config.Blip2Config
    sources: str


def _blip2(vit: config.VitConfig, side: str, lm: Lm | None = None) -> config.Blip2Config:
    return config.Blip2Config(vit, config.QformerConfig(feature_width=vit.width, text_side=side), lm)


def _lavis(name: str, sources: str, lm: Lm | None = None, vit: config.VitConfig = presets.VIT_G) -> Published:
    return Published(f'LAVIS {name}', _blip2(vit, 'none' if lm else 'full', lm), sources)


def _huggingface(name: str, side: str, lm: Lm | None = None) -> Published:
    if isinstance(lm, config.OptConfig):
        lm = replace(lm, vocab_size=50304)  # a row for the image token, and rows up to a multiple of 64
    return Published(f'Hugging Face {name}', _blip2(presets.VIT_G, side, lm), f'{name}/')


MODELS = {
    'lavis_blip2_pretrain': _lavis('pretrain', 'blip2_pretrained.pth eva_vit_g.pth'),
    'lavis_blip2_pretrain_vitL': _lavis('pretrain_vitL', 'blip2_pretrained_vitL.pth clip_vit_L.pth', vit=presets.VIT_L),
    'lavis_blip2_coco': _lavis('coco', 'blip2_finetune_coco.pth', vit=presets.VIT_G_364),
    'lavis_blip2_pretrain_opt2.7b': _lavis(
        'pretrain_opt2.7b', 'blip2_pretrained_opt2.7b.pth eva_vit_g.pth opt-2.7b/', OPT_2_7B
    ),
    'lavis_blip2_pretrain_opt6.7b': _lavis(
        'pretrain_opt6.7b', 'blip2_pretrained_opt6.7b.pth eva_vit_g.pth opt-6.7b/', OPT_6_7B
    ),
    'lavis_blip2_pretrain_flant5xl': _lavis(
        'pretrain_flant5xl', 'blip2_pretrained_flant5xl.pth eva_vit_g.pth flan-t5-xl/', FLAN_T5_XL
    ),
    'lavis_blip2_pretrain_flant5xxl': _lavis(
        'pretrain_flant5xxl', 'blip2_pretrained_flant5xxl.pth eva_vit_g.pth flan-t5-xxl/', FLAN_T5_XXL
    ),
    'hf_blip2-itm-vit-g': _huggingface('blip2-itm-vit-g', 'retrieval'),
    'hf_blip2-opt-2.7b': _huggingface('blip2-opt-2.7b', 'none', OPT_2_7B),
    'hf_blip2-opt-6.7b': _huggingface('blip2-opt-6.7b', 'none', OPT_6_7B),
    'hf_blip2-flan-t5-xl': _huggingface('blip2-flan-t5-xl', 'none', FLAN_T5_XL),
    'hf_blip2-flan-t5-xxl': _huggingface('blip2-flan-t5-xxl', 'none', FLAN_T5_XXL),
    'hf_instructblip-flan-t5-xl': _huggingface('instructblip-flan-t5-xl', 'reads', FLAN_T5_XL),
    'hf_instructblip-flan-t5-xxl': _huggingface('instructblip-flan-t5-xxl', 'reads', FLAN_T5_XXL),
    'hf_instructblip-vicuna-7b': _huggingface('instructblip-vicuna-7b', 'reads', VICUNA_7B),
    'hf_instructblip-vicuna-13b': _huggingface('instructblip-vicuna-13b', 'reads', VICUNA_13B),
}
"""Name of the list of keys and shapes in `tests/goldens/manifests` -> what it is."""


def counted(c: config.Blip2Config) -> list[tuple[str, jax.ShapeDtypeStruct, int]]:
    """Return path, shape and number of copies of each parameter.

    Layers repeat: those of an encoder or a decoder are alike, and the Q-Former's alternate (with cross-attention,
    without). So one period is traced, and its parameters are counted as often as it stands in the full model.
    """
    vit, qformer, lm = c.vit, c.qformer, c.lm
    period = qformer.cross_attention_freq
    copies = {'vit': vit.depth, 'qformer': qformer.depth // period}
    if lm and lm.encoder_decoder:
        copies |= {'lm/encoder': lm.depth, 'lm/decoder': lm.decoder_depth}
        lm = replace(lm, depth=1, decoder_depth=1)
    elif lm:
        copies |= {'lm': lm.depth}
        lm = replace(lm, depth=1)
    parts = _traced(config.Blip2Config(replace(vit, depth=1), None, None))
    parts = parts | _traced(config.Blip2Config(None, replace(qformer, depth=period), lm))
    return [(path, x, copies[path.partition('/layer_')[0]] if '/layer_' in path else 1) for path, x in parts.items()]


@functools.cache
def _traced(c: config.Blip2Config) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten(blip2.shapes(c))


@functools.cache
def _bytes(shape: tuple[int, ...], dtype: str, kind: str | None, transposed: bool) -> int:
    array = jax.ShapeDtypeStruct(shape, dtype)
    if kind:
        array = jax.eval_shape(functools.partial(quantize.smaller, kind=kind, transposed=transposed), array)
    return quantize.size({'array': array})


def gibibytes(c: config.Blip2Config, weights: quantize.Weights) -> float:
    """Return the size of a model's weights in memory."""
    parts = counted(c)
    kinds = match(quantize.RULES[weights], [path for path, _, _ in parts])
    total = sum(n * _bytes(x.shape, x.dtype.name, kinds[path], quantize.is_kernel(path)) for path, x, n in parts)
    return total / 2**30


def row(published: Published) -> str:
    """Return a model's row of the table."""
    count = sum(copies * x.size for _, x, copies in counted(published.model))
    size = [f'{gibibytes(published.model, weights):.1f}' for weights in ('bfloat16', 'int8')]
    command = f'`qformer convert {published.sources} RUN`'
    return f'| {" | ".join([published.name, command, f"{count:,}", *size, GRADE])} |'


def table() -> str:
    """Return the table, in Markdown."""
    head = '| checkpoint | command | parameters | GiB, bfloat16 | GiB, int8 | grade |\n|---|---|---:|---:|---:|---|'
    return '\n'.join([head, *map(row, MODELS.values())])


if __name__ == '__main__':
    print(table())
