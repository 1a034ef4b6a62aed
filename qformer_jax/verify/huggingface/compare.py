"""Our numbers against Hugging Face's on a user's own model: one row a layer, and the first one that disagrees.

Both sides read the same inputs in float32. A layer may differ by ten times what float32 itself does to it here: the
same weights and inputs, in our code, in float64; the largest difference is the noise, and it counts as at least one
float32 epsilon of the layer's largest entry. Rounding grows with depth, and the noise grows with it; so there is no
fixed limit as for the small recorded cases, and every row states its own. A fault of one layer shows in all after it:
the first above tolerance is the one to look at.
"""

import gc
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from ... import config
from ...convert import huggingface_config
from ...convert.recognise import NOTHING
from ...errors import UserError
from ...runs import import_export
from .. import report
from ..report import ReportRow
from ..tolerance import EPSILON, NOISE_FACTOR
from . import inputs, layerwise, reference
from .inputs import Probe

READER = replace(NOTHING, qformer=config.QformerConfig(feature_width=1, num_queries=1, embed_width=1))
"""What a BERT is compared in: a Q-Former of which only the text branch is used."""


def verify(source: Path) -> bool:
    """Compare, print the table and the first layer that disagrees, and return whether none does.

    Raises UserError for a folder that is none of Hugging Face's, or of a kind without a table here.
    """
    rows, changes = check(source)
    report.show(str(source), rows, {})
    for change in changes:
        print(change)
    failed = [row.name for row in rows if not row.passed]
    if failed:
        print(f'first above tolerance, in the order in which data flows: {failed[0]}')
    else:
        print(f'all {len(rows)} layers agree')
    return not failed


def check(source: Path) -> tuple[list[ReportRow], list[str]]:
    """Return one row a layer in the order in which data flows, and what was changed in their model before."""
    if not (source / 'config.json').is_file():
        raise UserError(f"'{source}' is no Hugging Face folder: it has no config.json")
    kind = huggingface_config.read(source / 'config.json')['model_type']
    model = import_export.read([source], READER if kind == 'bert' else NOTHING)
    c = model.run.model
    probe = inputs.make(c)
    network, changes = reference.load(source, c, kind)
    recorded = reference.compute(network, c, kind, probe)
    del network
    gc.collect()  # their weights, before ours come
    computed = layerwise.compute(c, model.tensors, probe)
    return [_row(name, x, computed, existing(name, c, probe)) for name, x in recorded.items()], changes


def _row(
    name: str, expected: np.ndarray, computed: dict[str, dict[str, np.ndarray]], exist: np.ndarray | None
) -> ReportRow:
    narrow, wide = (computed[dtype][name] for dtype in layerwise.DTYPES)
    if exist is not None and narrow.shape == expected.shape:
        expected, narrow, wide = (x[exist] for x in (expected, narrow, wide))
    noise = max(report.difference(narrow, wide), EPSILON * report.scale(expected))
    return report.compare(name, narrow, expected, NOISE_FACTOR * noise)


def existing(name: str, c: config.Blip2Config, inputs: Probe) -> np.ndarray | None:
    """Return which positions of a row of the table are no padding; None where none is."""
    if name.startswith('lm/decoder') or (name == 'logits' and c.lm.encoder_decoder):
        return inputs.answer_exist
    if name.startswith('lm/') or name == 'logits':
        return inputs.prefixed(inputs.text_exist, c, True)
    if name.startswith('text alone: ') or (name.startswith('qformer/') and c.vit is None):
        return inputs.words_exist
    if re.fullmatch(r'qformer/(embedding|layer_\d+)', name) and c.qformer.text_side != 'none':
        return inputs.prefixed(inputs.words_exist, c, True)
    return None
