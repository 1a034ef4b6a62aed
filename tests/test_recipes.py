"""The recipes: each loads, says what it is, gives every parameter a rule, and changes only when somebody means it."""

import dataclasses
import functools
import math
from pathlib import Path

import pytest

from qformer_jax import config, recipes
from qformer_jax.errors import UserError
from qformer_jax.models import blip2
from qformer_jax.rules import flatten, match, split
from qformer_jax.training import loop

GOLDENS = Path(__file__).parent / 'goldens' / 'configs'
NAMES = recipes.names()
TRAINED = {
    'blip2_vitg_stage1': 186_705_470,
    'blip2_vitg_stage1_lavis': 186_705_470,
    'blip2_vitl_stage1': 183_165_758,
    'blip2_vitg_stage1_lite': 105_781_310,
    'blip2_vitg_opt2_7b_stage2': 107_133_696,
    'blip2_vitg_opt2_7b_stage2_lavis': 107_133_696,
    'instructblip_vitg_vicuna7b': 188_836_608,
    'instructblip_vitg_vicuna13b': 189_624_064,
    'instructblip_vitg_flant5xl': 187_261_696,
    'instructblip_vitg_flant5xxl': 188_836_608,
    'blip2_vitg_opt6_7b_stage2': 108_314_880,
    'blip2_vitg_flant5xl_stage2': 106_739_968,
    'blip2_vitg_flant5xxl_stage2': 108_314_880,
    'blip2_vitg_opt2_7b_caption_coco': 1_093_619_584,
    'blip2_vitg_opt2_7b_vqav2': 1_174_914_304,
    'blip2_vitg_retrieval_coco': 1_173_191_358,
}
FINE_TUNED = 'blip2_vitg_opt2_7b_caption_coco', 'blip2_vitg_opt2_7b_vqav2', 'blip2_vitg_retrieval_coco'
"""Recipes whose vision encoder learns too (BLIP-2, sections 4.2 to 4.4)."""
FROZEN_TOWER = {
    'blip2_vitg_stage1': 985_894_528,
    'blip2_vitg_stage1_lite': 985_894_528,
    'blip2_vitl_stage1': 277_985_280,
}


def sized(c: config.Blip2Config) -> config.Blip2Config:
    """Return the model with the sizes that a data set would fill in."""
    fill = {
        'qformer': {'feature_width': c.vit.feature_width if c.vit else 8, 'vocab_size': 100},
        'lm': {'vocab_size': 300},
    }
    parts = {}
    for name, sizes in fill.items():
        part = getattr(c, name)
        if part:
            missing = {field: size for field, size in sizes.items() if getattr(part, field) == 0}
            parts[name] = dataclasses.replace(part, **missing)
    return dataclasses.replace(c, **parts)


@functools.cache
def shapes(c: config.Blip2Config) -> dict:
    """Return the shapes of all parameters; recipes share models, and tracing a large one takes seconds."""
    return blip2.shapes(sized(c))


def count(params) -> int:
    return sum(math.prod(leaf.shape) for leaf in flatten(params).values())


@pytest.mark.parametrize('name', NAMES)
def test_the_card_says_what_it_is_and_how_to_run_it(name):
    card = recipes.load(name)[1]
    first = card.splitlines()[0]
    assert first.endswith('.') or '; ' in first or ': ' in first, 'the first line is one sentence'
    assert card.splitlines()[1] == '', 'a blank line after the first sentence'
    assert f'\n    qformer train {name} --run ' in card


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_is_its_golden_text(name):
    golden = GOLDENS / f'{name}.json'
    text = config.to_json(recipes.load(name)[0]) + '\n'
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
        pytest.fail(f'{golden.name} did not exist and was written: read it and commit it')
    assert text == golden.read_text(), (
        f'recipe {name} changed, or a default that it relies on: results in its card were made with the old one. If '
        f'that is meant, delete tests/goldens/configs/{golden.name}, run this test once, read the difference, commit it'
    )


def test_every_golden_text_has_its_recipe():
    assert {path.stem for path in GOLDENS.glob('*.json')} == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_survives_its_json(name):
    run = recipes.load(name)[0]
    assert config.from_json(config.to_json(run)) == run


@pytest.mark.parametrize('name', NAMES)
def test_every_parameter_has_a_rule_and_something_learns(name):
    run = recipes.load(name)[0]
    loop.check(run)
    rates = match(run.optimizer.rate_rules, flatten(shapes(run.model)))
    assert any(rate for rate in rates.values())


@pytest.mark.parametrize('name', NAMES)
def test_every_rule_is_of_use(name):
    """A rule that decides for no parameter is a typing error, or left over."""
    rules = recipes.load(name)[0].optimizer.rate_rules
    paths = list(flatten(shapes(recipes.load(name)[0].model)))
    for position, (pattern, _) in enumerate(rules):
        numbered = tuple((p, n) for n, (p, _) in enumerate(rules))
        assert position in match(numbered, paths).values(), pattern


@pytest.mark.parametrize('name', TRAINED)
def test_the_published_numbers_of_parameters(name):
    run = recipes.load(name)[0]
    trainable, frozen = split(shapes(run.model), run.optimizer.rate_rules)
    assert count(trainable) == TRAINED[name]
    if name not in FINE_TUNED:
        assert count(frozen['vit']) == FROZEN_TOWER.get(name, count(frozen['vit']))
    assert f'{TRAINED[name]:,}' in recipes.load(name)[1] or name.endswith('_lavis')


def test_frozen_towers_are_frozen_in_every_stage_after_their_own_but_for_fine_tuning():
    for name in NAMES:
        run = recipes.load(name)[0]
        towers = {'vision': {'vit'}, 'language': {'lm'}}.get(run.stage, {'vit'} if name in FINE_TUNED else set())
        rates = match(run.optimizer.rate_rules, flatten(shapes(run.model)))
        learning = {path.split('/')[0] for path, rate in rates.items() if rate is not None}
        assert learning & {'vit', 'lm'} == towers, name


def test_a_file_without_config_is_refused(tmp_path):
    (tmp_path / 'empty.py').write_text('"""Nothing."""\n')
    with pytest.raises(UserError, match=r'defines no function config\(\)'):
        recipes.load(str(tmp_path / 'empty.py'))
