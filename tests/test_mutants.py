"""Verification notices wrongs that are put into the product on purpose: a sample of the generated mutants.

All of them: `python -m tests.mutants`.
"""

import json
from contextlib import nullcontext

import pytest
from mutants import masks, objectives, parts, processors, tables
from mutants.__main__ import RESULTS, Options, chosen
from mutants.mutant import Mutant, run
from mutants.survivors import REASONS

from qformer_jax.errors import UserError

SAMPLE = (
    'picture: bilinear',
    'text: captions keep their case',
    'row: EVA: vit/layer_{i}/attention/query/kernel <-> vit/layer_{i}/attention/value/kernel',
    'row: EVA: vit/layer_{i}/attention_norm/bias <-> vit/layer_{i}/attention/query/bias',
    'row: CLIP: vit/layer_{i}/attention/query/bias <-> vit/layer_{i}/attention/key/bias',
    'row: Q-Former: qformer/layer_{i}/query_mlp/up/kernel <-> qformer/layer_{i}/text_mlp/up/kernel',
    'transpose: Q-Former: qformer/layer_{i}/self_attention/output/kernel',
    'epsilon: EVA: vit/layer_{i}/mlp_norm times 10',
    'epsilon: CLIP: vit/pre_norm times 0.1',
    'activation: EVA: vit/layer_{i}/mlp',
    'activation: Q-Former: qformer/lm_head',
    'mask: multimodal_causal is bidirectional',
    'mask: bidirectional sees padding',
    'smoothing: ITG: none',
    'smoothing: ITC: over the others only',
    'temperature: multiplies',
    'objective: negatives: without 1e-4',
    'objective: ITM: first query only',
    'objective: ITG: [CLS] stays',
    'mask: captions do not see the queries',
)


@pytest.fixture(scope='module')
def mutants():
    """Return those of the towers, the Q-Former and stage 1, by name; the language models' take minutes."""
    code = (mutant for kind in (parts, masks, objectives, processors) for mutant in kind.mutants())
    return {str(mutant): mutant for mutant in (*tables.mutants(tables.FAMILIES[:3]), *code)}


@pytest.mark.parametrize('name', SAMPLE)
def test_a_mutant_is_noticed(name, mutants):
    assert run(mutants[name]).killed


def test_the_right_code_is_not_taken_for_a_mutant():
    same = Mutant('none', 'nothing is wrong', ('low_variance_clip_vit',), lambda case: nullcontext())
    assert not run(same).killed


def test_every_survivor_on_record_has_its_reason():
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    survived = {f'{row["kind"]}: {row["name"]}' for row in rows if not row['killed']}
    assert survived == set(REASONS)
    assert {row['kind'] for row in rows} >= {name.partition(':')[0] for name in SAMPLE}


def test_shards_together_are_all():
    wanted = ('^text', '^picture')
    shards = [[str(mutant) for mutant in chosen(Options(wanted, f'{k}/4'))] for k in (1, 2, 3, 4)]
    assert sorted(name for shard in shards for name in shard) == sorted(map(str, chosen(Options(wanted))))
    assert len({len(shard) for shard in shards}) <= 2
    with pytest.raises(UserError, match='K from 1 to N'):
        next(chosen(Options(wanted, '5/4')))
