"""`qformer queries`: how much each query carries over a data set."""

from dataclasses import dataclass
from pathlib import Path

from .options import ConnectorFile, RunFolder, class_of


@dataclass(frozen=True)
class Queries:
    """Say which queries of a run matter over a data set: how often each wins ITC, and what is lost without it.

    A stage-1 run is judged with each picture's first caption: by ITC, where the query nearest to the text decides (it
    wins), and by ITM, whose log odds are the mean over the queries. A run with a language model is judged by log p of
    the caption, an `instruct` run by that of the first answer to each question. One query at a time is left out of
    ITC's maximum, of ITM's mean, or of what the language model reads, while the others stay as they are. Two queries
    that say the same lose little each.

    In queries.png each query has a bar, the most important first. The arrays in queries.npz are order [Q], for each
    score NAME (itc, itm, lm) drop_NAME [N, Q] over the N texts, and of stage 1 also wins [Q], the number of pictures
    that each query wins. The first m of `order` are those to keep for a run with m queries (`qformer convert --queries`
    and --order).
    """

    run: RunFolder
    """Folder of the run (`stage1` or later)."""
    split: str = 'test'
    """Split to judge on, or a part of it: `test[:256]` is faster, since each query costs one more reading."""
    data: Path | None = None
    """Packed data set; default: the one that the run was trained on (of several, the first)."""
    out: Path = Path('queries')
    """Folder to write."""
    connector: ConnectorFile = None


def queries(options: Queries) -> None:
    """Write queries.png and queries.npz, and print the queries that matter most."""
    import numpy as np

    from ..analysis.plots import SCORES, plot_query_importance
    from ..analysis.query_importance import query_importance
    from ..atomic import check_writable, replacing
    from ..data.dataset import Dataset
    from ..inference.blip2 import Blip2
    from ..runs import run_dir

    own = class_of(options.connector)
    done = run_dir.finished(options.run, own)
    dataset = Dataset.open(options.data or done.run.data.path)
    dataset.check_tower(done.last.get('vit'), done.run.model.vit)
    records = dataset.source(options.split)
    check_writable(options.out)
    found = query_importance(Blip2.load(options.run, connector=own), list(records))
    options.out.mkdir(parents=True, exist_ok=True)
    picture, arrays = options.out / 'queries.png', options.out / 'queries.npz'
    plot_query_importance(found, picture)
    wins = {} if found.wins is None else {'wins': found.wins}
    with replacing(arrays) as scratch:
        np.savez(scratch, order=found.order, **wins, **{f'drop_{name}': each for name, each in found.drops.items()})
    if found.wins is not None:
        best = ', '.join(f'{query} ({found.wins[query] / found.count:.1%})' for query in found.order[:5])
        print(f'win ITC for {found.count} pictures: {best}; never: {(found.wins == 0).sum()} of {len(found.wins)}')
    for name, drops in found.means.items():
        best = ', '.join(f'{query} ({drops[query]:+.3f})' for query in np.argsort(-drops, kind='stable')[:5])
        print(f'{SCORES[name]}, mean loss without a query: {best}')
    print(f'wrote {picture} and {arrays}')
