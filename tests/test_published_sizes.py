"""The published models, by shape alone, and the parameter paths that files and rules rely on."""

import dataclasses
import math
import re

import pytest
import reference

from qformer_jax import config, presets
from qformer_jax.models import blip2
from qformer_jax.rules import TEXT_SIDE, flatten

GOLDEN = reference.GOLDENS / 'parameter_paths.txt'
VIT_L = config.VitConfig(
    width=1024, depth=22, heads=16, mlp_width=4096, attention_bias='all', patch_bias=False, pre_norm=True
)


def counts(c: config.Blip2Config) -> dict[str, int]:
    return {
        part: sum(math.prod(leaf.shape) for leaf in flatten(tree).values()) for part, tree in blip2.shapes(c).items()
    }


@pytest.mark.parametrize(
    'vit, tower, trained', [(config.VitConfig(), 985_894_528, 186_705_470), (VIT_L, 277_985_280, 183_165_758)]
)
def test_stage1_has_the_published_number_of_parameters(vit, tower, trained):
    c = config.Blip2Config(vit, config.QformerConfig(feature_width=vit.width), lm=None)
    assert counts(c) == {'vit': tower, 'qformer': trained}


def test_stage2_has_the_published_number_of_trained_parameters():
    """LAVIS deletes the text side for OPT-2.7B and then trains 107,133,696 parameters; ours may keep it, untouched."""
    found = counts(config.Blip2Config(qformer=config.QformerConfig(text_side='none')))
    assert found['qformer'] + found['lm_projection'] == 107_133_696
    shapes = blip2.shapes(config.Blip2Config())
    flat = flatten({'qformer': shapes['qformer'], 'lm_projection': shapes['lm_projection']})
    kept = [leaf for path, leaf in flat.items() if not re.fullmatch(TEXT_SIDE, path)]
    assert sum(math.prod(leaf.shape) for leaf in kept) == 107_133_696


@pytest.mark.parametrize(
    'lm, size, trained',
    [(presets.FLAN_T5_XL, 2_849_757_184, 106_739_968), (presets.FLAN_T5_XXL, 11_135_332_352, 108_314_880)],
)
def test_flan_t5_has_the_published_number_of_parameters(lm, size, trained):
    found = counts(config.Blip2Config(vit=None, qformer=config.QformerConfig(text_side='none'), lm=lm))
    assert found['lm'] == size
    assert found['qformer'] + found['lm_projection'] == trained


@pytest.mark.parametrize(
    'lm, size',
    [
        (presets.OPT_125M, 125_239_296),
        (presets.OPT_350M, 331_196_416),
        (presets.OPT_1_3B, 1_315_758_080),
        (presets.OPT_2_7B, 2_651_596_800),
        (presets.OPT_6_7B, 6_658_473_984),
        (presets.OPT_13B, 12_853_473_280),
        (presets.OPT_30B, 29_974_540_288),
        (presets.OPT_66B, 65_719_701_504),
        (presets.VICUNA_7B, 6_738_423_808),
        (presets.VICUNA_13B, 13_015_874_560),
        (presets.SMOLLM2_135M, 134_515_008),
    ],
)
def test_decoders_have_the_published_number_of_parameters(lm, size):
    assert counts(config.Blip2Config(vit=None, qformer=None, lm=lm))['lm'] == size


def test_parameter_paths_are_public():
    vit = dataclasses.replace(reference.EVA, attention_bias='all', pre_norm=True, layer_scale=True, final_norm=True)
    variant = dataclasses.replace(reference.QUERIES, depth=1, query_bank=3, gated_residual=True)
    models = [
        config.Blip2Config(vit, reference.QFORMER, reference.OPT, config.LoraConfig(rank=4), word_head=10),
        config.Blip2Config(vit=None, qformer=None, lm=reference.T5, lora=config.LoraConfig(rank=4)),
        config.Blip2Config(vit=None, qformer=None, lm=reference.LLAMA, grounding=config.GroundingConfig(grid=2)),
        config.Blip2Config(vit=None, qformer=variant, lm=None),
    ]
    shapes = [leaf for c in models for leaf in flatten(blip2.shapes(c)).items()]
    text = ''.join(f'{path} {list(leaf.shape)}\n' for path, leaf in shapes)
    if not GOLDEN.exists():
        GOLDEN.write_text(text)
        pytest.fail(f'{GOLDEN.name} did not exist and was written: read it and commit it')
    assert text == GOLDEN.read_text(), (
        'parameter paths or shapes changed: checkpoints, rules and conversion tables refer to them. If that is meant, '
        f'adapt those, delete tests/goldens/{GOLDEN.name}, run this test once, and say so in the changelog'
    )
