"""The README's tables are those that its scripts print, and its recipes are those that there are."""

import re
from pathlib import Path

from experiments import published_models
from experiments.easy_vqa import summary
from qformer_jax import recipes

README = (Path(__file__).parents[1] / 'README.md').read_text()


def section(title: str) -> str:
    """Return the text of a section of the README."""
    return re.search(rf'^## {title}$(.*?)(?=^## |\Z)', README, re.MULTILINE | re.DOTALL)[1]


def test_the_model_table_is_what_shapes_say():
    assert published_models.table() in section('Models')


def test_layers_are_counted_as_often_as_they_stand():
    """EVA ViT-g, the Q-Former without its text side, a projection and OPT-2.7B, as published."""
    opt = published_models.MODELS['lavis_blip2_pretrain_opt2.7b'].model
    total = sum(copies * x.size for _, x, copies in published_models.counted(opt))
    assert total == 985_894_528 + 107_133_696 + 2_651_596_800


def test_the_results_are_those_of_the_study():
    results = section('Results')
    assert summary.table() in results
    low, high = min(summary.seconds()), max(summary.seconds())
    assert f'took {low:.0f} to {high:.0f} s a seed' in results.replace('\n', ' ')


def test_every_recipe_has_a_row():
    named = re.findall(r'`(\w+)`', ' '.join(re.findall(r'^\| (.*?) \|', section('Recipes'), re.MULTILINE)))
    assert sorted(named) == recipes.names()
