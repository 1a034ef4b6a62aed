"""From a packed data set to batches; order, epochs, sharding and exact resume are grain's."""

import itertools
from collections.abc import Iterable, Iterator

import grain
import numpy as np

from ..config import Run
from ..errors import UserError
from . import mixture
from .dataset import Dataset, Source
from .grounding_tokenizer import with_location_tokens
from .preprocess import Need, Row, RowFormat, RowMaker
from .record_cache import RecordCache

_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # batches; one thread keeps a core for JAX


def batches(
    run: Run,
    row_format: RowFormat,
    dataset: Dataset,
    split: str,
    *,
    training: bool,
    shard: tuple[int, int] = (0, 1),
    features: bool = True,
    devices: int = 1,
) -> grain.DatasetIterator:
    """Return an endless iterator over batches of numpy arrays (B = batch_size / shard count).

    | format (of stage)            | keys                                                            |
    |------------------------------|-----------------------------------------------------------------|
    | CAPTIONS (vision, stage1)    | picture, `text`, `text_mask`                                    |
    | PLAIN_TEXT (language)        | `lm_text`, `lm_mask`, `lm_target`                               |
    | CAPTIONING (stage2)          | picture, `lm_text`, `lm_mask`, `lm_target`                      |
    | INSTRUCTIONS (instruct)      | picture, `text`, `text_mask`, `lm_text`, `lm_mask`, `lm_target` |

    Picture: `image` uint8 [B, S, S, 3]; from a data set of videos `image` uint8 [B, F, S, S, 3], `frame_mask`; from one
    of features `features` float32 [B, P, V], `feature_mask`; with `features` False these two are left out, for somebody
    who has them by `image_id` (`training/device_features.py`).
    Every batch has `image_id` int32 [B], the record's position in the split (of several data sets: their splits one
    after the other). Texts are int32 [B, max_text] or [B, max_lm_text], masks bool; `lm_target` marks the tokens that
    the language-model loss is on.

    Training shuffles every epoch by the run's seed, draws a caption or question a record, and a prompt, crops and
    mirrors; its rows do not depend on the number of shards. Several data sets take turns, row by row, so that each
    gives its share (`mixture.shares`, to a percent), and each begins its next epoch when its own records are through.
    Otherwise order and draws are fixed, every pass gives the same batches with the first prompt, several data sets
    take turns by batches, of the `held_out_sizes` for so many `devices`. A checkpoint keeps the place: `get_state`,
    `set_state`, `grain.checkpoint`. Raises UserError when the data set does not fit the run.
    """
    size, count = run.training.batch_size, shard[1]
    if size % count:
        raise UserError(f'training.batch_size {size} does not divide among {count} hosts; choose a multiple of {count}')
    sources = [part.source(split) for part in dataset.parts]
    useful = [_useful(run, row_format, source) for source in sources]
    shares = mixture.shares(list(map(len, useful))) if training else []
    for source, positions, share in zip(sources, useful, shares, strict=False):
        if size * share > len(positions):
            raise UserError(f"training.batch_size {size} exceeds the {len(positions)} records of '{split}' that stage "
                            f'{run.stage} can use in {source.path}; lower it or add data')  # fmt: skip
    parts = zip(useful, _row_makers(run, row_format, dataset, sources, training, features), strict=True)
    if training:
        rows = [_shuffled(*part, run.training.seed + number) for number, part in enumerate(parts)]
        local = _batched(grain.MapDataset.mix(rows, shares) if len(rows) > 1 else rows[0], size, shard)
    else:
        sizes = _held_out_sizes(useful, size, devices)
        each = [
            _batched(_in_order(*part, n), n, shard if n % devices == 0 else (0, 1))
            for part, n in zip(parts, sizes, strict=True)
        ]
        local = grain.MapDataset.mix([part.repeat(reseed_each_epoch=False) for part in each])
    return iter(local.to_iter_dataset(_READ_AHEAD))


def needs(run: Run, row_format: RowFormat, dataset: Dataset, split: str) -> Iterator[tuple[str, Need]]:
    """Yield what every text that the run may read of a split needs, with the name of its record.

    Pictures are read, and not decoded. Raises UserError when a record is damaged.
    """
    sources = [part.source(split) for part in dataset.parts]
    for source, maker in zip(sources, _row_makers(run, row_format, dataset, sources, True, False), strict=True):
        for position in _useful(run, row_format, source):
            record = source[position]
            yield from ((record.image_id, need) for need in maker.needs(record))


def names(dataset: Dataset, split: str, positions: Iterable[int]) -> list[str]:
    """Return the names of records by a batch's `image_id`: their positions, the splits one after the other."""
    sources = [part.source(split) for part in dataset.parts]
    ends = np.cumsum([len(source) for source in sources])
    which = [int(np.searchsorted(ends, position, side='right')) for position in positions]
    return [sources[n][int(p) - int(ends[n]) + len(sources[n])].image_id for n, p in zip(which, positions, strict=True)]


def held_out_sizes(run: Run, row_format: RowFormat, dataset: Dataset, split: str, devices: int) -> list[int]:
    """Return the rows of a batch of a held-out split, for each data set: `batch_size`, or fewer of a small split.

    They divide among the devices, unless there are fewer records than devices: then each device has all of them.
    Raises UserError where the split is unknown, or holds nothing that the stage reads.
    """
    useful = [_useful(run, row_format, part.source(split)) for part in dataset.parts]
    return _held_out_sizes(useful, run.training.batch_size, devices)


def _held_out_sizes(useful: list[list[int]], size: int, devices: int) -> list[int]:
    counts = [min(size, len(positions)) for positions in useful]
    return [count // devices * devices or count for count in counts]


def _shuffled(positions: list[int], maker: RowMaker, seed: int) -> grain.MapDataset:
    """Return endless rows, every epoch in another order."""
    # A range, not the positions as a source: grain keeps books of what a source gives, a fifth of a batch's time.
    numbers = grain.MapDataset.range(len(positions)).seed(seed)
    return numbers.shuffle().repeat().random_map(lambda n, rng: maker(positions[n], rng))


def _in_order(positions: list[int], maker: RowMaker, size: int) -> grain.MapDataset:
    """Return the rows of whole batches: else the hosts would disagree on the last one."""
    numbers = grain.MapDataset.range(len(positions) // size * size).seed(0)
    return numbers.random_map(lambda n, rng: maker(positions[n], rng))


def _batched(rows: grain.MapDataset, size: int, shard: tuple[int, int]) -> grain.MapDataset:
    """Return one host's batches. Random draws came before this slice, so they follow the global row, not the host."""
    index, count = shard
    rows = rows[index::count] if count > 1 else rows
    return rows.batch(size // count, drop_remainder=True, batch_fn=_stack)


def _stack(rows: list[Row]) -> Row:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _useful(run: Run, row_format: RowFormat, source: Source) -> list[int]:
    """Return the positions of the records that hold what the stage reads."""
    kinds = [*row_format.reads]
    kinds += ['phrase'] if _grid(run, row_format) and run.data.phrase_fraction else []
    columns = [{'caption': 0, 'question': 1, 'phrase': 4}[kind] for kind in kinds]
    positions = np.flatnonzero((source.counts[:, columns] > 0).any(axis=1)).tolist()
    if not positions:
        wanted = ' or '.join(f'a {kind}' for kind in kinds)
        raise UserError(f"stage {run.stage} needs {wanted}, and no record of '{source.split}' in {source.path} has one")
    return positions


def _grid(run: Run, row_format: RowFormat) -> int:
    """Return the grid that boxes are said in, 0 where no row asks for any; raises UserError where words lack."""
    if not row_format.boxes:
        return 0
    if run.data.phrase_fraction and not run.model.grounding:
        raise UserError(f'data.phrase_fraction {run.data.phrase_fraction} asks for boxes, and the model has no words '
                        'for them; set model.grounding')  # fmt: skip
    return run.model.grounding.grid if run.model.grounding else 0


def _row_makers(
    run: Run, row_format: RowFormat, dataset: Dataset, sources: list[Source], training: bool, features: bool
) -> list[RowMaker]:
    size = run.model.vit.image_size if run.model.vit and not dataset.feature_shape else 0
    rows = patches(run, dataset) if row_format.pictures else 0
    _check_vocabularies(run, dataset)
    first, used = itertools.accumulate(map(len, sources), initial=0), [0]
    return [
        RowMaker(
            row_format=row_format,
            data=run.data,
            memory=RecordCache(source, size > 0 and row_format.pictures, features, used),
            first=number,
            image_size=size,
            max_frames=dataset.longest_video,
            max_patches=rows,
            text_tokenizer=dataset.text_tokenizer,
            lm_tokenizer=with_location_tokens(dataset.lm_tokenizer, run.model),
            training=training,
            reads_prompt=run.objective.instruction_aware,
            grid=_grid(run, row_format),
        )
        for source, number in zip(sources, first, strict=False)  # `first` ends with the number of all records
    ]


def patches(run: Run, dataset: Dataset) -> int:
    """Return the feature rows to pad to (0 for pictures), or refuse a data set of the other kind or width."""
    if run.model.vit and not dataset.feature_shape:
        return 0
    if run.model.vit and not dataset.encoder:
        dataset.check_tower(None, run.model.vit)
    if not dataset.feature_shape:
        raise UserError(f'{dataset.path} holds pictures, and the run has no vision tower; give it one (model.vit)')
    longest, width = dataset.feature_shape
    if run.model.feature_width not in (0, width):
        raise UserError(f'{dataset.path} holds features of width {width}; set model.qformer.feature_width, or the '
                        f"connector's, to it (now {run.model.feature_width})")  # fmt: skip
    if run.data.max_patches and run.data.max_patches < longest:
        raise UserError(f'data.max_patches {run.data.max_patches}: {dataset.path} holds an array of {longest} rows; '
                        'raise it, or set it to 0')  # fmt: skip
    return run.data.max_patches or longest


def _check_vocabularies(run: Run, dataset: Dataset) -> None:
    """Refuse a table with fewer rows than its tokenizer has ids: JAX would read a wrong row without a word."""
    tables = [
        ('model.qformer.vocab_size', run.model.qformer, dataset.text_tokenizer),
        ('model.lm.vocab_size', run.model.lm, dataset.lm_tokenizer),
    ]
    for name, part, tokenizer in tables:
        if part and part.vocab_size < tokenizer.vocab_size:
            raise UserError(f'{name} {part.vocab_size}: the tokenizer has {tokenizer.vocab_size} entries; set it to '
                            'that or more')  # fmt: skip
