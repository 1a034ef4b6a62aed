"""The grounding study: pages that are drawn, and what each variant trains."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.grounding import __main__ as study
from experiments.grounding import shapes
from qformer_jax import boxes
from qformer_jax.models import blip2
from qformer_jax.rules import split


def test_boxes_are_the_edges_of_what_is_drawn():
    """Of one colour on a page, the pixels reach every edge of the box; of several shapes none hides another."""
    counts = set()
    for seed in range(40):
        picture, phrases = shapes.page(64, np.random.default_rng(seed))
        counts.add(len(phrases))
        assert len({p['phrase'] for p in phrases}) == len(phrases)
        colours = [p['phrase'].split()[0] for p in phrases]
        for phrase, colour in zip(phrases, colours, strict=True):
            boxes.cells(tuple(phrase['box']), 32)
            if colours.count(colour) == 1:
                rows, columns = np.nonzero((np.asarray(picture) == shapes.COLOURS[colour]).all(axis=-1))
                edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                np.testing.assert_allclose(phrase['box'], np.array(edges) / 64, atol=1 / 64)  # a triangle's tip
    assert counts == {1, 2, 3}


def test_what_each_variant_trains():
    o = study.Options()
    parts = {}
    for variant in ('joint', 'frozen', 'lora', 'blind'):
        run = study.stage(o, variant, Path('data'), 0)
        lm = replace(run.model.lm, vocab_size=9)
        qformer = replace(run.model.qformer, vocab_size=9, feature_width=o.width)
        m = replace(run.model, lm=lm, qformer=qformer)
        parts[variant] = set(split(blip2.shapes(m), run.optimizer.rate_rules)[0])
        assert run.objective.instruction_aware == (variant != 'blind')
    trained = {'qformer', 'lm_projection', 'grounding'}
    assert parts == {
        'joint': trained | {'vit'}, 'blind': trained | {'vit'}, 'frozen': trained, 'lora': trained | {'lora'},
    }  # fmt: skip
