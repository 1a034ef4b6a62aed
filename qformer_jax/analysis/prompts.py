"""What a run is asked about a picture, and what it should say, in the form that it was trained on."""

from ..data.tokenizers import clean_caption
from ..errors import UserError
from ..inference.blip2 import Blip2
from ..typing import Array


def prompt(model: Blip2, question: str) -> str:
    """Return the run's first prompt with the question in it, or its caption prompt; nothing without a language model.

    Raises UserError for a question that nobody would read.
    """
    if model.run.model.lm:
        return model.question_prompts([question])[0] if question else model.run.data.caption_prompt[0]
    if question:
        raise UserError('this run has no language model to ask: leave the question out')
    return ''


def target(text: str, question: str) -> str:
    """Return a text as training writes an answer, or without a question a caption."""
    return text.lower().strip() if question else clean_caption(text)


def read(model: Blip2, prompt: str) -> tuple[Array, ...]:
    """Return the ids and mask of what queries read beside the features: the prompt if they are instruction-aware."""
    aware = model.run.model.lm and model.run.objective.instruction_aware
    return tuple(model.text_arrays([prompt])) if aware else ()
