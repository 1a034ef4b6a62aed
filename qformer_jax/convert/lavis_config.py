"""The configuration of a LAVIS state dict, whose files say nothing about it: shapes tell the sizes.

Numbers of heads, which shapes do not tell, are those of the published model of the same width, or of a recipe.
"""

import re
from dataclasses import replace

from .. import config, presets
from ..errors import UserError
from .lazy_tensors import State

Lm = config.OptConfig | config.LlamaConfig | config.T5Config
Part = config.VitConfig | config.QformerConfig | Lm

_OPT_HEADS = {768: 12, 1024: 16, 2048: 32, 2560: 32, 4096: 32, 5120: 40, 7168: 56, 9216: 72}
"""Width -> attention heads (Zhang et al. 2022, table 1)."""


def model_of(state: State, like: config.Blip2Config) -> config.Blip2Config:
    """Return the configuration of one of LAVIS's BLIP-2 classes; parts whose tensors are absent are None.

    Raises UserError when heads are unknown and `like` does not give them.
    """
    vit = inside(state, 'visual_encoder.')
    return config.Blip2Config(
        vit=vit_of(vit, like.vit) if vit else None,
        qformer=_qformer_of(state, like.qformer),
        lm=_language_model_of(state, like.lm),
    )


def inside(state: State, prefix: str) -> State:
    """Return the tensors of a module inside the whole, by their names in it."""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def vit_of(state: State, like: config.VitConfig | None) -> config.VitConfig:
    """Return the configuration of a tower; a published tower file's surplus blocks count, see `published_depth`."""
    if 'conv1.weight' in state:
        published, patch, table, up = presets.VIT_L, 'conv1.weight', 'positional_embedding', 'mlp.c_fc.weight'
        block = 'transformer.resblocks.'
    else:
        published, patch, table, up = presets.VIT_G, 'patch_embed.proj.weight', 'pos_embed', 'mlp.fc1.weight'
        block = 'blocks.'
    width, _, patch_size, _ = state[patch].shape
    grid = round((state[table].shape[-2] - 1) ** 0.5)
    return replace(
        published,
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=width,
        depth=_count(state, block),
        heads=_heads('vit', width, {published.width: published.heads}, like),
        mlp_width=state[f'{block}0.{up}'].shape[0],
    )


def published_depth(found: config.VitConfig) -> int:
    """Return how many blocks BLIP-2 uses of a tower in a file of its own.

    The published files hold more than BLIP-2 reads: 40 blocks of EVA ViT-g (it uses 39), 24 of CLIP ViT-L (22).
    """
    known = {tower.width: tower.depth for tower in (presets.VIT_G, presets.VIT_L)}
    return min(found.depth, known.get(found.width, found.depth))


def _qformer_of(state: State, like: config.QformerConfig | None) -> config.QformerConfig:
    bert = inside(state, 'Qformer.bert.')
    _, queries, width = state['query_tokens'].shape
    layer = 'encoder.layer.'
    reads = [i for i in range(_count(bert, layer)) if f'{layer}{i}.crossattention.self.key.weight' in bert]
    words, text_side = bert.get('embeddings.word_embeddings.weight'), 'none'
    if words is not None:
        text_side = 'full' if 'temp' in state else 'reads'
    published = presets.QFORMER_G
    return replace(
        published,
        feature_width=bert[f'{layer}0.crossattention.self.key.weight'].shape[1],
        num_queries=queries,
        width=width,
        depth=_count(bert, layer),
        heads=_heads('qformer', width, {published.width: published.heads}, like),
        mlp_width=bert[f'{layer}0.intermediate_query.dense.weight'].shape[0],
        cross_attention_freq=reads[1] if len(reads) > 1 else _count(bert, layer),
        vocab_size=words.shape[0] - 1 if words is not None else published.vocab_size,
        max_positions=_positions(bert, published),
        embed_width=state['vision_proj.weight'].shape[0] if 'vision_proj.weight' in state else published.embed_width,
        text_side=text_side,
    )


def _positions(bert: State, published: config.QformerConfig) -> int:
    """Return the rows of the position table, of which stage 2 keeps only the buffer that counts them."""
    for key in ('embeddings.position_embeddings.weight', 'embeddings.position_ids'):
        if key in bert:
            return max(bert[key].shape[0], bert[key].shape[-1] if key.endswith('ids') else 0)
    return published.max_positions


def _language_model_of(state: State, like: Lm | None) -> Lm | None:
    opt, t5, llama = (inside(state, f'{name}_model.') for name in ('opt', 't5', 'llm'))
    if opt:
        table = opt['model.decoder.embed_tokens.weight'].shape
        return config.OptConfig(
            vocab_size=table[0],
            width=table[1],
            depth=_count(opt, 'model.decoder.layers.'),
            heads=_heads('lm', table[1], _OPT_HEADS, like),
            mlp_width=opt['model.decoder.layers.0.fc1.weight'].shape[0],
            max_positions=opt['model.decoder.embed_positions.weight'].shape[0] - 2,
        )
    if t5:
        bias = t5['encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'].shape
        query = t5['encoder.block.0.layer.0.SelfAttention.q.weight'].shape
        return config.T5Config(
            vocab_size=t5['shared.weight'].shape[0],
            width=query[1],
            depth=_count(t5, 'encoder.block.'),
            decoder_depth=_count(t5, 'decoder.block.'),
            heads=bias[1],
            head_width=query[0] // bias[1],
            mlp_width=t5['encoder.block.0.layer.1.DenseReluDense.wi_0.weight'].shape[0],
            buckets=bias[0],
            max_distance=like.max_distance if isinstance(like, config.T5Config) else config.T5Config().max_distance,
        )
    if llama:
        return _llama_of(llama, like)
    return None


def _llama_of(state: State, like: Lm | None) -> config.LlamaConfig:
    """Return a Llama as LAVIS reads it, Vicuna: as many heads of keys as of queries, and Vicuna's constants."""
    rows, width = state['model.embed_tokens.weight'].shape
    heads = _heads('lm', width, {x.width: x.heads for x in (presets.VICUNA_7B, presets.VICUNA_13B)}, like)
    head_width = state['model.layers.0.self_attn.q_proj.weight'].shape[0] // heads
    return replace(
        like if isinstance(like, config.LlamaConfig) else presets.VICUNA_7B,
        vocab_size=rows,
        width=width,
        depth=_count(state, 'model.layers.'),
        heads=heads,
        kv_heads=state['model.layers.0.self_attn.k_proj.weight'].shape[0] // head_width,
        head_width=head_width,
        mlp_width=state['model.layers.0.mlp.gate_proj.weight'].shape[0],
    )


def _count(state: State, prefix: str) -> int:
    """Return the number of layers: one more than the largest number after the prefix."""
    numbers = [re.match(re.escape(prefix) + r'(\d+)\.', key) for key in state]
    return 1 + max((int(found.group(1)) for found in numbers if found), default=-1)


def _heads(part: str, width: int, published: dict[int, int], like: Part | None) -> int:
    if like is not None and like.width == width:
        return like.heads
    if width not in published:
        raise UserError(
            f'the file does not tell the number of attention heads of its {part}, and no published one has the width '
            f'{width}: name a recipe of that width with --recipe'
        )
    return published[width]
