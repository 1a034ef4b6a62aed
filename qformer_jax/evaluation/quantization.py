"""What fewer bits cost a model in use: its task's numbers, and its losses, before and after."""

import math

import numpy as np

from ..data.dataset import Dataset
from ..inference.blip2 import Blip2
from ..training.stages import STAGES
from . import vqa
from .task import TASKS


def evaluate(model: Blip2, dataset: Dataset, split: str) -> dict[str, float]:
    """Return the numbers of the run's task on a split; for `vqa` the answers' loss and perplexity too."""
    task = STAGES[model.run.stage].task
    numbers = dict(TASKS[task](model, dataset, split).numbers)
    if task == 'vqa':
        numbers['loss of the answers (nats/token)'] = loss = answer_loss(model, dataset, split)
        numbers['perplexity of the answers'] = math.exp(loss)
    if task == 'caption':
        numbers['perplexity of the captions'] = math.exp(numbers['loss, own picture (nats/token)'])
    return {name: number for name, number in numbers.items() if not name.startswith('number of')}


def answer_loss(model: Blip2, dataset: Dataset, split: str) -> float:
    """Return the mean loss (nats a token) of each question's first answer, given picture and question."""
    records = list(dataset.source(split))
    positions, questions, answers = vqa.pairs(records)
    encoded = model.encode_queries([r.model_input for r in records])
    prompts = model.question_prompts(questions)
    losses, counts = model.losses(encoded.take(np.array(positions)), prompts, [a[0] for a in answers])
    return float(losses.sum() / counts.sum())
