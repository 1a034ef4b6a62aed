"""Visual question answering: exact match for one accepted answer, VQAv2's consensus for several."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from ..data.records import Record


def score(prediction: str, answers: Sequence[str]) -> float:
    """Return 0..1: with n > 1 answers, min(matches / 3, 1) averaged over leaving each one out (VQAv2)."""
    prediction, answers = prediction.lower().strip(), [a.lower().strip() for a in answers]
    if len(answers) == 1:
        return float(prediction == answers[0])
    matches = answers.count(prediction)
    rest = [matches - (answer == prediction) for answer in answers]
    return sum(min(n / 3, 1) for n in rest) / len(answers)


def pairs(records: Iterable[Record]) -> tuple[list[int], list[str], list[tuple[str, ...]]]:
    """Return, for every question, the picture's position, the question, and its accepted answers."""
    rows = [
        (position, question, answers)
        for position, record in enumerate(records)
        for question, answers in zip(record.questions, record.answers, strict=True)
    ]
    positions, questions, answers = zip(*rows, strict=True)
    return list(positions), list(questions), list(answers)


def text_only(train: Iterable[Record]) -> dict[str, str]:
    """Return each question's commonest answer: what a model that never sees the picture can reach."""
    counters = defaultdict(Counter)
    for record in train:
        for question, answers in zip(record.questions, record.answers, strict=True):
            counters[question].update(answers)
    return {question: answers.most_common(1)[0][0] for question, answers in counters.items()}
