"""The configuration of a LAVIS state dict, whose files say nothing about it: shapes tell the sizes.

Numbers of heads, which shapes do not tell, are those of the published model of the same width, or of a recipe.
"""

from dataclasses import replace

from .. import config, presets
from .families import FAMILIES
from .lazy_tensors import State
from .sizes import count_layers, heads_of, shape_of


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
    width, _, patch_size, _ = shape_of(state, patch, 4)
    *_, positions, _ = shape_of(state, table, 2 if table == 'positional_embedding' else 3)
    grid = max(round((positions - 1) ** 0.5), 1)
    return replace(
        published,
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=width,
        depth=count_layers(state, block),
        heads=heads_of('vit', width, {published.width: published.heads}, like),
        mlp_width=shape_of(state, f'{block}0.{up}', 2)[0],
    )


def published_depth(found: config.VitConfig) -> int:
    """Return how many blocks BLIP-2 uses of a tower in a file of its own.

    The published files hold more than BLIP-2 reads: 40 blocks of EVA ViT-g (it uses 39), 24 of CLIP ViT-L (22).
    """
    known = {tower.width: tower.depth for tower in (presets.VIT_G, presets.VIT_L)}
    return min(found.depth, known.get(found.width, found.depth))


def _qformer_of(state: State, like: config.QformerConfig | None) -> config.QformerConfig:
    bert, published = inside(state, 'Qformer.bert.'), presets.QFORMER_G
    _, queries, width = shape_of(state, 'query_tokens', 3)
    layer = 'encoder.layer.'
    reads = [i for i in range(count_layers(bert, layer)) if f'{layer}{i}.crossattention.self.key.weight' in bert]
    projects = 'vision_proj.weight' in state
    embed_width = shape_of(state, 'vision_proj.weight', 2)[0] if projects else published.embed_width
    words, text_side, rows = 'embeddings.word_embeddings.weight', 'none', published.vocab_size
    if words in bert:
        text_side, rows = 'full' if 'temp' in state else 'reads', shape_of(bert, words, 2)[0] - 1
    return replace(
        published,
        feature_width=shape_of(bert, f'{layer}0.crossattention.self.key.weight', 2)[1],
        num_queries=queries,
        width=width,
        depth=count_layers(bert, layer),
        heads=heads_of('qformer', width, {published.width: published.heads}, like),
        mlp_width=shape_of(bert, f'{layer}0.intermediate_query.dense.weight', 2)[0],
        cross_attention_freq=reads[1] if len(reads) > 1 else count_layers(bert, layer),
        vocab_size=rows,
        max_positions=_positions(bert, published),
        embed_width=embed_width,
        text_side=text_side,
    )


def _positions(bert: State, published: config.QformerConfig) -> int:
    """Return the rows of the position table, of which stage 2 keeps only the buffer that counts them."""
    if 'embeddings.position_embeddings.weight' in bert:
        return shape_of(bert, 'embeddings.position_embeddings.weight', 2)[0]
    if 'embeddings.position_ids' in bert:
        return shape_of(bert, 'embeddings.position_ids', 2)[1]
    return published.max_positions


def _language_model_of(state: State, like: config.LmConfig | None) -> config.LmConfig | None:
    for family in FAMILIES.values():
        if found := inside(state, f'{family.lavis_prefix}_model.'):
            return family.read_lavis(found, like)
    return None
