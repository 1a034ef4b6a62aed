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

from .. import config
from ..convert import huggingface_config
from ..convert.recognise import NOTHING
from ..errors import UserError
from ..training import exchange
from . import flow, probe, report, theirs
from .probe import Probe
from .report import Row
from .tolerance import EPSILON, NOISE_FACTOR

READER = replace(NOTHING, qformer=config.Qformer(feature_width=1, num_queries=1, embed_width=1))
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


def check(source: Path) -> tuple[list[Row], list[str]]:
    """Return one row a layer in the order in which data flows, and what was changed in their model before."""
    if not (source / 'config.json').is_file():
        raise UserError(f"'{source}' is no Hugging Face folder: it has no config.json")
    kind = huggingface_config.read(source / 'config.json')['model_type']
    model = exchange.read([source], READER if kind == 'bert' else NOTHING)
    c = model.run.model
    inputs = probe.make(c)
    network, changes = theirs.load(source, c, kind)
    recorded = theirs.compute(network, c, kind, inputs)
    del network
    gc.collect()  # their weights, before ours come
    ours = flow.compute(c, model.tensors, inputs)
    return [_row(name, x, ours, existing(name, c, inputs)) for name, x in recorded.items()], changes


def _row(name: str, theirs: np.ndarray, ours: dict[str, dict[str, np.ndarray]], exist: np.ndarray | None) -> Row:
    narrow, wide = (ours[dtype][name] for dtype in flow.DTYPES)
    if exist is not None and narrow.shape == theirs.shape:
        theirs, narrow, wide = (x[exist] for x in (theirs, narrow, wide))
    noise = max(report.difference(narrow, wide), EPSILON * report.scale(theirs))
    return report.compare(name, narrow, theirs, NOISE_FACTOR * noise)


def existing(name: str, c: config.Blip2, inputs: Probe) -> np.ndarray | None:
    """Return which positions of a row of the table are no padding; None where none is."""
    if name.startswith('lm/decoder') or (name == 'logits' and c.lm.family == 't5'):
        return inputs.answer_exist
    if name.startswith('lm/') or name == 'logits':
        return inputs.prefixed(inputs.text_exist, c, True)
    if name.startswith('text alone: ') or (name.startswith('qformer/') and c.vit is None):
        return inputs.words_exist
    if re.fullmatch(r'qformer/(embedding|layer_\d+)', name) and c.qformer.text_side != 'none':
        return inputs.prefixed(inputs.words_exist, c, True)
    return None
