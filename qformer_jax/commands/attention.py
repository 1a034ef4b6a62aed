"""`qformer attention`: where the queries look in a picture, and what each does for a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .options import ConnectorFile, PictureFile, RunFolder

if TYPE_CHECKING:
    from ..analysis.attention import AttentionMaps
    from ..analysis.relevance import Relevance


@dataclass(frozen=True)
class AttentionOptions:
    """Draw where each query of the Q-Former looks in a picture and, with --text, how much each matters for the text.

    In attention.png the first row is the mean of all queries, and each query has a row below it. The columns: (1) the
    mean of the cross-attention weights over all layers and heads; (2) rollout, the share of each patch in the query
    after the last layer, through self-attention too; (3) with --text, what speaks for the text: weights times the
    gradient of a score, where positive, on one scale for all queries; then the weights of each layer. What the class
    token got is left out of the maps.

    The score depends on the run. A stage-1 run compares the picture with --text by ITC (the cosine of the best query)
    and by ITM (the log odds of a match, whose gradient is drawn). A run with a language model gives log p of --text, as
    the caption or as the answer to --question. Beside each query stands its cosine with the text (stage 1), and what
    each score loses when that query alone is left out: of ITC's maximum, of ITM's mean, or of what the language model
    reads. Two queries that say the same lose little each. With --text the best queries come first.

    The arrays in attention.npz are maps [C, H, Q, G, G] of every layer and head, class_token [C, H, Q], layers [C],
    rollout [Q, G, G]; with --text also gradient [C, H, Q, G, G], cosines [Q] (stage 1), and score_NAME, drop_NAME [Q]
    for each of the scores itc, itm, lm.
    """

    run: RunFolder
    """Folder of the run (`stage1` or later)."""
    picture: PictureFile
    """Picture file."""
    text: str = ''
    """A caption to compare the picture with, or what the language model should write."""
    question: str = ''
    """Question that --text answers (an instruction-aware Q-Former reads it too); default: --text is a caption."""
    out: Path = Path('attention')
    """Folder to write."""
    connector: ConnectorFile = None


def attention(options: AttentionOptions) -> None:
    """Write attention.png and attention.npz, and print the queries that matter most."""
    import numpy as np

    from ..analysis.attention import attention_maps, encode_picture
    from ..analysis.plots import plot_attention
    from ..analysis.relevance import relevance
    from ..atomic import check_writable, replacing
    from ..inference.blip2 import Blip2

    check_writable(options.out)
    model = Blip2.load(options.run, connector=options.connector)
    image_features = encode_picture(model, options.picture)
    found = attention_maps(model, image_features, options.question)
    fits = relevance(model, image_features, options.text, options.question) if options.text else None
    options.out.mkdir(parents=True, exist_ok=True)
    picture, arrays = options.out / 'attention.png', options.out / 'attention.npz'
    plot_attention(found, fits, options.picture, model.run.model.vit.image_size, picture)
    with replacing(arrays) as scratch:
        np.savez(scratch, **_arrays(found, fits))
    if fits:
        _say(options.text, fits)
    print(f'wrote {picture} and {arrays}')
    print(f'next: open {picture}; over a data set: qformer queries {options.run}')


def _arrays(found: 'AttentionMaps', fits: 'Relevance | None') -> dict:
    arrays = {'maps': found.maps, 'class_token': found.class_token, 'layers': found.layers, 'rollout': found.rollout}
    if fits:
        arrays |= {'gradient': fits.gradient} | ({} if fits.cosines is None else {'cosines': fits.cosines})
        arrays |= {f'score_{name}': score for name, score in fits.scores.items()}
        arrays |= {f'drop_{name}': drops for name, drops in fits.drops.items()}
    return arrays


def _say(text: str, fits: 'Relevance') -> None:
    from ..analysis.plots import SCORES, best_first

    scores = ', '.join(f'{SCORES[name]} {score:.3f}' for name, score in fits.scores.items())
    print(f'"{text}": {scores}')
    name, drops = list(fits.drops.items())[-1]
    best = ', '.join(f'{query} ({drops[query]:+.3f})' for query in best_first(fits, len(drops))[:3])
    print(f'the best queries, and what the {SCORES[name]} loses without each: {best}')
