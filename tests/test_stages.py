"""The tables of stages and of loss terms hold what others rely on."""

import dataclasses
from typing import get_args

import pytest

from qformer_jax import config
from qformer_jax.evaluation.task import TASKS
from qformer_jax.training.stage1_terms import TERMS
from qformer_jax.training.stages import STAGES, generating

NEXT = {
    'vision': ('train the next stage from it (qformer train)',
               'train over it: qformer train RECIPE --start.vit runs/a --run RUN'),
    'language': ('train the next stage from it (qformer train)',
                 'train over it: qformer train RECIPE --start.lm runs/a --run RUN'),
    'stage1': ('qformer evaluate runs/a --task retrieval', 'qformer evaluate runs/a --task retrieval --data DATA'),
    'stage2': ('qformer caption runs/a PICTURE', 'qformer caption runs/a PICTURE'),
    'instruct': ('qformer caption runs/a PICTURE', 'qformer caption runs/a PICTURE'),
}  # fmt: skip


def test_every_stage_has_an_entry():
    assert tuple(STAGES) == get_args(config.Stage)


@pytest.mark.parametrize('stage', STAGES)
def test_a_run_is_followed_by_its_command(stage):
    entry = STAGES[stage]
    assert tuple(step.format(run='runs/a') for step in (entry.next_step, entry.next_step_converted)) == NEXT[stage]


def test_a_stage_is_judged_by_a_task_that_exists():
    assert {entry.task for entry in STAGES.values()} - {''} <= TASKS.keys()
    assert [name for name, entry in STAGES.items() if not entry.task] == ['vision', 'language']


def test_what_a_stage_needs_is_a_part_of_the_model():
    parts = {field.name for field in dataclasses.fields(config.Blip2Config)}
    assert all(parts.issuperset(entry.needs) for entry in STAGES.values())


def test_stages_that_write_are_named_in_messages():
    assert generating() == "'stage2' and 'instruct'"


def test_every_loss_term_has_a_weight_in_the_objective():
    """The paper's three are on, what came after them is off."""
    assert {term.name for term in TERMS} <= {field.name for field in dataclasses.fields(config.Objective)}
    assert {term.name for term in TERMS if term.weight(config.Objective())} == {'itc', 'itm', 'itg'}
    assert len({term.name for term in TERMS}) == len(TERMS)
