"""One task on one split of a finished run: numbers, the levels to read them against, and every prediction.

    RUN/evaluation/TASK-SPLIT.json    the table, with the run's fingerprint
    RUN/evaluation/TASK-SPLIT.jsonl   one line a prediction (TASK-SPLIT-8-queries: with the first 8 queries alone)

What was evaluated once is not evaluated again: the weights of a finished run do not change.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import atomic, json_file
from ..atomic import check_writable
from ..boxes import Grounded
from ..data.dataset import Dataset
from ..data.records import Record
from ..data.tokenizers import clean_caption
from ..errors import UserError
from ..inference.blip2 import Blip2
from ..inference.inputs import ImageFeatures, QueryOutputs
from ..inference.locate import locate
from ..inference.rerank import RERANK_TOP_K, rerank
from ..objectives import matching
from ..runs import run_dir
from ..typing import Array, Int
from . import grounding, retrieval, vqa

PICTURES_AT_ONCE = 256
QUESTIONS_AT_ONCE = 4096


@dataclass(frozen=True)
class TaskResult:
    """A task's numbers and its predictions, one dict a row."""

    numbers: dict[str, float]
    predictions: list[dict]


def evaluate(
    folder: Path,
    task: str,
    split: str,
    data: Path | None = None,
    queries: int = 0,
    connector: type | None = None,
) -> dict[str, float]:
    """Evaluate a finished run, or read what was evaluated before; prints the table and returns its numbers.

    `queries`: only so many of the queries are used, the first ones (0: all). `connector`: the class of the run's own.
    """
    done = run_dir.finished(folder, connector)
    dataset = Dataset.open(data or done.run.data.path)
    dataset.check_tower(done.last.get('vit'), done.run.model.vit)
    check_split(task, dataset, split, done.run.data.train_split)
    check_writable(folder / 'evaluation')
    identity = {'task': task, 'split': split, 'data': dataset.fingerprint, 'weights': done.last}
    name = f'{task}-{split}'.replace('/', '_')
    if queries:
        identity['queries'] = queries
        name += f'-{queries}-queries'
    table, rows = (folder / 'evaluation' / f'{name}{suffix}' for suffix in ('.json', '.jsonl'))
    numbers = _known_numbers(table, identity) if rows.is_file() else None
    if numbers is None:
        model = Blip2.load(folder, batch_size=PICTURES_AT_ONCE, queries=queries, connector=connector)
        judged = TASKS[task](model, dataset, split)
        numbers = judged.numbers
        atomic.write_text(rows, ''.join(json.dumps(row) + '\n' for row in judged.predictions))
        atomic.write_text(table, json.dumps({'identity': identity, 'numbers': numbers}, indent=1))
    _print(f'{task} on {split}, {folder}' + (f', {queries} queries' if queries else ''), numbers)
    print(f'predictions: {rows}; numbers: {table}')
    return numbers


def _known_numbers(table: Path, identity: dict) -> dict[str, float] | None:
    """Return the numbers of an earlier evaluation of the same; None where there is none, or its table is damaged."""
    try:
        known = json_file.read(table, _Table, '') if table.exists() else None
    except UserError:
        return None
    return known.numbers if known and known.identity == identity else None


class _Table(msgspec.Struct):
    """What an evaluation's table holds."""

    identity: dict
    numbers: dict[str, float]


def check_split(task: str, dataset: Dataset, split: str, train_split: str) -> None:
    """Raise UserError for a split without what the task asks for, before a model is loaded."""
    what, column = {'vqa': ('question', 1), 'grounding': ('phrase with boxes', 4)}.get(task, ('caption', 0))
    _need((dataset.source(split).counts[:, column] > 0).any(), what, split)
    if task in ('vqa', 'grounding'):
        dataset.source(train_split)  # what is blind, or reads text only, learns from it


def _print(title: str, numbers: dict[str, float]) -> None:
    view = Table(title=title)
    view.add_column('measure')
    view.add_column('value', justify='right')
    for name, value in numbers.items():
        view.add_row(name, f'{value:,.0f}' if name.startswith('number of') else f'{value:.4f}')
    Console().print(view)


def _iter_features(model: Blip2, records: Sequence[Record]) -> Iterator[ImageFeatures]:
    """Yield the features of all records, a batch at a time, showing progress."""
    console = Console(stderr=True)
    parts = model.iter_features(r.model_input for r in records)
    total = math.ceil(len(records) / model.batch_size)
    return track(parts, 'reading pictures', total, console=console, disable=not console.is_terminal)


def _encode_queries(model: Blip2, records: Sequence[Record]) -> ImageFeatures | QueryOutputs:
    """Return what answers need of all records: of a picture that is asked twice, the queries are run once."""
    parts = [model.encode_queries(image_features) for image_features in _iter_features(model, records)]
    return parts[0].join(parts)


def _need(found: object, what: str, split: str) -> None:
    if not found:
        raise UserError(f"split '{split}' has no {what}: name another split, or another task")


def evaluate_vqa(model: Blip2, dataset: Dataset, split: str) -> TaskResult:
    """Answer every question; again with the pictures shuffled; and without pictures (the commonest answer)."""
    records = list(dataset.source(split))
    _need(any(r.questions for r in records), 'question', split)
    positions, questions, answers = vqa.pairs(records)
    encoded = _encode_queries(model, records)
    shuffled = np.random.default_rng(0).permutation(len(records))[positions]
    predictions, blind = (_answers(model, encoded, rows, questions) for rows in (positions, shuffled))
    guess = vqa.text_only(dataset.source(model.run.data.train_split))

    def mean(predicted: Sequence[str]) -> float:
        return float(np.mean([vqa.score(p, a) for p, a in zip(predicted, answers, strict=True)]))

    rows = [
        {'image': records[i].image_id, 'question': q, 'prediction': p, 'answers': a}
        for i, q, p, a in zip(positions, questions, predictions, answers, strict=True)
    ]
    numbers = {'accuracy': mean(predictions), 'with shuffled pictures': mean(blind)}
    if guess:  # there is none where nobody asked anything in training
        numbers['text only (commonest answer)'] = mean([guess.get(q, '') for q in questions])
    return TaskResult(numbers | {'number of questions': len(questions)}, rows)


def _answers(
    model: Blip2, encoded: ImageFeatures | QueryOutputs, pictures: Sequence[int] | Int['N'], questions: Sequence[str]
) -> list[str]:
    """Answer each question about picture `pictures[n]`; of pictures there are no more copies than questions at once."""
    parts = [slice(i, i + QUESTIONS_AT_ONCE) for i in range(0, len(questions), QUESTIONS_AT_ONCE)]
    return [answer for part in parts for answer in model.ask(encoded.take(pictures[part]), questions[part])]


def evaluate_caption(model: Blip2, dataset: Dataset, split: str) -> TaskResult:
    """Write captions; compare the loss of the true caption with that of another picture's."""
    records = [r for r in dataset.source(split) if r.captions]
    _need(records, 'caption', split)
    encoded = _encode_queries(model, records)
    truth = [r.captions[0] for r in records]
    other = np.random.default_rng(0).permutation(len(records))
    matched, shuffled = (caption_loss(model, encoded.take(rows), truth) for rows in (np.arange(len(records)), other))
    captions = model.caption(encoded)
    right = [clean_caption(c) in map(clean_caption, r.captions) for c, r in zip(captions, records, strict=True)]
    rows = [
        {'image': r.image_id, 'prediction': c, 'captions': r.captions} for r, c in zip(records, captions, strict=True)
    ]
    return TaskResult(
        {
            'exact match': float(np.mean(right)),
            'loss, own picture (nats/token)': matched,
            'loss, shuffled pictures': shuffled,
            'shuffled minus matched': shuffled - matched,
            'number of pictures': len(records),
        },
        rows,
    )


def caption_loss(model: Blip2, encoded: ImageFeatures | QueryOutputs, captions: Sequence[str]) -> float:
    """Return the mean loss (nats a token) of captions given pictures."""
    captions = [clean_caption(caption) for caption in captions]
    losses, counts = model.losses(encoded, [model.run.data.caption_prompt[0]] * len(captions), captions)
    return float(losses.sum() / counts.sum())


def evaluate_retrieval(model: Blip2, dataset: Dataset, split: str) -> TaskResult:
    """Rank the split's different captions for each picture, and back: by ITC, then the best again by ITM and ITC.

    The prediction kept for each picture is the last one's. ITM's accuracy is over hard negatives.
    """
    records = [r for r in dataset.source(split) if r.captions]
    _need(records, 'caption', split)
    image_features = ImageFeatures.join(list(_iter_features(model, records)))
    texts, positive = retrieval.candidates([tuple(map(clean_caption, r.captions)) for r in records])
    similarity = model.similarity(image_features, texts)
    text = model.text_arrays(texts)

    def match(pictures: Array, captions: Array) -> Array:
        return jnp.asarray(model.match(image_features, text, np.asarray(pictures), np.asarray(captions))[:, 1])

    again = rerank(similarity, match, RERANK_TOP_K)
    back = rerank(similarity.T, lambda captions, pictures: match(pictures, captions), RERANK_TOP_K)
    ways = (
        ('picture to text', similarity, positive),
        ('picture to text, re-ranked', again, positive),
        ('text to picture', similarity.T, positive.T),
        ('text to picture, re-ranked', back, positive.T),
    )
    numbers = {
        f'{way} R@{k}': retrieval.recall(np.asarray(matrix), hits, k)
        for way, matrix, hits in ways
        for k in (1, 5, 10)
        if k <= matrix.shape[1]
    }
    numbers |= match_accuracy(model, image_features, text, similarity, positive)
    numbers |= {'number of pictures': len(records), 'number of captions': len(texts)}
    best = np.asarray(again).argmax(axis=1)
    rows = [
        {'image': r.image_id, 'prediction': texts[b], 'captions': r.captions}
        for r, b in zip(records, best, strict=True)
    ]
    return TaskResult(numbers, rows)


def match_accuracy(
    model: Blip2, image_features: ImageFeatures, text: list[np.ndarray], similarity: np.ndarray, positive: np.ndarray
) -> dict[str, float]:
    """Return ITM accuracy over a true pair and two hard negatives a picture, drawn as stage 1 draws them."""
    own = positive.argmax(axis=1)
    logits = jnp.asarray(similarity[:, own] / float(model.params['qformer']['temperature']))
    same = jnp.asarray(positive[:, own])
    drawn = matching.draw_negatives(jax.random.key(0), logits, logits.T, same)
    everyone = np.arange(len(own))
    pictures = np.concatenate([everyone, np.asarray(drawn.image), everyone])
    captions = np.concatenate([own, own, own[np.asarray(drawn.text)]])
    matched = np.arange(len(pictures)) < len(own)
    scores = model.match(image_features, text, pictures, captions)
    return {'ITM accuracy': float(((scores[:, 1] > scores[:, 0]) == matched).mean()), 'ITM, always no': 2 / 3}


def evaluate_grounding(model: Blip2, dataset: Dataset, split: str) -> TaskResult:
    """Say where every phrase is; again with the pictures shuffled; and one box for all (the one that fits most)."""
    records = [r for r in dataset.source(split) if r.phrases]
    _need(records, 'phrase with boxes', split)
    encoded = _encode_queries(model, records)
    phrases_asked = [
        (i, phrase, truth) for i, record in enumerate(records) for phrase, truth in record.phrases_with_boxes
    ]
    positions, phrases, truths = (list(column) for column in zip(*phrases_asked, strict=True))
    other = np.random.default_rng(0).permutation(len(records))[positions]
    said, blind = (_locate(model, encoded, rows, phrases) for rows in (np.array(positions), other))
    train = [box for record in dataset.source(model.run.data.train_split) for _, box in record.phrases]
    answers = [grounding.first(text) for text in said]
    fits = grounding.fits(answers, truths)
    levels = {
        'R@1 at IoU 0.5': fits,
        'with shuffled pictures': grounding.fits([grounding.first(text) for text in blind], truths),
        'one box for all pictures': grounding.fits([grounding.blind(train)] * len(truths), truths),
    }
    rows = [
        {'image': records[i].image_id, 'phrase': phrase, 'prediction': box, 'boxes': truth, 'iou': round(float(iou), 4)}
        for (i, phrase, truth), box, iou in zip(phrases_asked, answers, fits, strict=True)
    ]
    numbers = {name: float((ious > grounding.FITS).mean()) for name, ious in levels.items()}
    numbers |= {'mean IoU': float(fits.mean()), 'malformed answers': np.mean([bool(s.dropped) for s in said]).item()}
    return TaskResult(numbers | {'number of phrases': len(phrases)}, rows)


def _locate(
    model: Blip2, encoded: ImageFeatures | QueryOutputs, pictures: Int['N'], phrases: Sequence[str]
) -> list[Grounded]:
    """Say where each phrase is in picture `pictures[n]`; of pictures there are no more copies than phrases at once."""
    parts = [slice(i, i + QUESTIONS_AT_ONCE) for i in range(0, len(phrases), QUESTIONS_AT_ONCE)]
    return [text for part in parts for text in locate(model, encoded.take(pictures[part]), phrases[part])]


TASKS: dict[str, Callable[[Blip2, Dataset, str], TaskResult]] = {
    'vqa': evaluate_vqa,
    'caption': evaluate_caption,
    'retrieval': evaluate_retrieval,
    'grounding': evaluate_grounding,
}
