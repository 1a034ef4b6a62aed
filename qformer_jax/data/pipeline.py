"""From a packed data set to batches; order, epochs, sharding and exact resume are grain's."""

import grain
import numpy as np

from qformer_jax.config import Run
from qformer_jax.data.dataset import Dataset, Source
from qformer_jax.data.memory import Memory
from qformer_jax.data.rows import Row, RowMaker
from qformer_jax.errors import UserError

_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # batches; one thread keeps a core for JAX


def batches(
    run: Run, dataset: Dataset, split: str, *, training: bool, shard: tuple[int, int] = (0, 1)
) -> grain.DatasetIterator:
    """Return an endless iterator over batches of numpy arrays (B = batch_size / shard count) for the run's stage.

    | stage           | keys                                                                    |
    |-----------------|-------------------------------------------------------------------------|
    | vision, stage1  | picture, `text`, `text_mask`                                            |
    | language        | `lm_text`, `lm_mask`, `lm_target`                                       |
    | stage2          | picture, `lm_text`, `lm_mask`, `lm_target`                              |
    | instruct        | picture, `text`, `text_mask`, `lm_text`, `lm_mask`, `lm_target`         |

    Picture: `image` uint8 [B, S, S, 3], or from a data set of features `features` float32 [B, P, V], `feature_mask`.
    Every batch has `image_id` int32 [B], the record's position in the split. Texts are int32 [B, max_text] or
    [B, max_lm_text], masks bool; `lm_target` marks the tokens that the language-model loss is on.

    Training shuffles every epoch by the run's seed, draws a caption or question a record, crops and mirrors; its rows
    do not depend on the number of shards. Otherwise order and draws are fixed and every pass gives the same batches.
    A checkpoint keeps the place: `get_state`, `set_state`, `grain.checkpoint`. Raises UserError when the data set does
    not fit the run.
    """
    source = dataset.source(split)
    maker, positions = _row_maker(run, dataset, source, training), _useful(run, source)
    size, (index, count) = run.training.batch_size, shard
    if size % count:
        raise UserError(f'training.batch_size {size} does not divide among {count} hosts; choose a multiple of {count}')
    if size > len(positions):
        raise UserError(f"training.batch_size {size} exceeds the {len(positions)} records of '{split}' that stage "
                        f'{run.stage} can use; lower it or add data')  # fmt: skip
    if not training:
        positions = positions[: len(positions) // size * size]  # else the hosts would disagree on the last batch
    rows = grain.MapDataset.source(positions).seed(run.training.seed if training else 0)
    # Random draws come before the slice, so that they follow the global row and not the host.
    rows = rows.shuffle().repeat().random_map(maker) if training else rows.random_map(maker)
    local = rows[index::count].batch(size // count, drop_remainder=True, batch_fn=_stack)
    if not training:
        local = local.repeat(reseed_each_epoch=False)
    return iter(local.to_iter_dataset(_READ_AHEAD))


def _stack(rows: list[Row]) -> Row:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _useful(run: Run, source: Source) -> list[int]:
    """Return the positions of the records that hold what the stage reads."""
    captions, questions = source.counts[:, 0] > 0, source.counts[:, 1] > 0
    return np.flatnonzero(captions | questions if run.stage == 'instruct' else captions).tolist()


def _row_maker(run: Run, dataset: Dataset, source: Source, training: bool) -> RowMaker:
    size = run.model.vit.image_size if run.model.vit and not dataset.feature_shape else 0
    _check_vocabularies(run, dataset)
    return RowMaker(
        stage=run.stage,
        data=run.data,
        memory=Memory(source, pictures=size > 0 and run.stage != 'language'),
        image_size=size,
        max_patches=0 if run.stage == 'language' else _patches(run, dataset),
        text_tokenizer=dataset.text_tokenizer,
        lm_tokenizer=dataset.lm_tokenizer,
        augment=training,
    )


def _patches(run: Run, dataset: Dataset) -> int:
    """Return the feature rows to pad to (0 for pictures), or refuse a data set of the other kind or width."""
    if run.model.vit and not dataset.feature_shape:
        return 0
    if run.model.vit and not dataset.encoder:
        dataset.check_tower(None, run.model.vit)
    if not dataset.feature_shape:
        raise UserError(f'{dataset.path} holds pictures, and the run has no vision tower; give it one (model.vit)')
    longest, width = dataset.feature_shape
    if run.model.qformer and width != run.model.qformer.feature_width:
        raise UserError(f'{dataset.path} holds features of width {width}; set model.qformer.feature_width to it '
                        f'(now {run.model.qformer.feature_width})')  # fmt: skip
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
