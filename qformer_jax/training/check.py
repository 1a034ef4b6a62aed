"""What a configuration cannot do, said before anything is read."""

import contextlib

from .. import config
from ..config.ranges import MILLION, check_ranges
from ..errors import UserError
from ..models import connectors, query_count
from .stages import STAGES, StageEntry, generating


def _check_rates(run: config.Run) -> None:
    """Refuse multiples of the learning rate that are none."""
    for pattern, multiple in run.optimizer.rate_rules:
        if multiple is not None and not 0 <= multiple <= MILLION:  # NaN is not
            raise UserError(f"optimizer.rate-rules: '{pattern}' learns at {multiple} times the rate; expected a number "
                            f'from 0 to {MILLION:,}, or None to freeze it')  # fmt: skip


def _check_terms(run: config.Run, stage: StageEntry) -> None:
    weights = {term.name: term.weight(run.objective) for term in stage.terms}
    if not any(weights.values()):
        raise UserError(f"of the weights of '{run.stage}' one must be above 0: objective has {weights}")
    for term in stage.terms:
        if term.weight(run.objective) and (why := term.refusal(run.model.qformer)):
            raise UserError(f'objective.{term.name.replace("_", "-")} {why}')


def _check_connector(run: config.Run, stage: StageEntry) -> None:
    """Refuse stages without anything between the towers, and a connector or a text where nothing reads it."""
    m = run.model
    if stage.generates and not (m.qformer or m.connector):
        raise UserError(f"stage '{run.stage}' needs model.qformer or model.connector, and both are None")
    if m.connector and not stage.generates:
        raise UserError(f"model.connector has no text side and learns in {generating()}, not in '{run.stage}'")
    if m.connector:
        connectors.make(m.connector, 'float32')
    if m.time and not (m.qformer or m.connector):
        raise UserError('model.time tells a Q-Former or a connector when frames are, and both are None')
    if run.objective.instruction_aware and not m.qformer:
        raise UserError('objective.instruction-aware: the Q-Former reads the question, and model.qformer is None')


def _check_nested(run: config.Run, stage: StageEntry) -> None:
    if run.objective.nested_queries and not (run.model.qformer and stage.trains_queries):
        raise UserError("objective.nested-queries draws how many of the Q-Former's queries exist, and there is none")
    if run.objective.nested_queries:
        query_count.check_alike(run.model.qformer)


def _check_gates(run: config.Run, stage: StageEntry) -> None:
    gates, lm = run.model.gates, run.model.lm
    if not stage.generates:
        raise UserError(f"model.gates read pictures in {generating()}, not in '{run.stage}'")
    if lm.encoder_decoder:
        raise UserError('model.gates stand between the blocks of a decoder, OPT or Llama, and this is T5: gates=None')
    if lm.width % gates.heads:
        raise UserError(f"model.gates.heads is {gates.heads}, and must divide the language model's width, {lm.width}")


def check(run: config.Run) -> None:
    """Raise UserError for a configuration that cannot do what it says."""
    stage = STAGES[run.stage]
    for part in stage.needs:
        if getattr(run.model, part) is None:
            raise UserError(f"stage '{run.stage}' needs model.{part}, which is None")
    check_ranges(run)
    _check_rates(run)
    _check_connector(run, stage)
    _check_nested(run, stage)
    if run.model.gates:
        _check_gates(run, stage)
    if run.model.lora and not stage.generates:
        raise UserError(f"model.lora adapts a frozen language model in {generating()}, not in '{run.stage}'")
    _check_stage(run, stage)
    if run.optimizer.schedule == 'lavis' and not run.optimizer.steps_per_epoch:
        raise UserError("optimizer.schedule 'lavis' needs optimizer.steps-per-epoch")
    if run.optimizer.schedule == 'cosine' and run.optimizer.warmup_steps >= run.training.steps:
        raise UserError(
            f'optimizer.warmup-steps {run.optimizer.warmup_steps} must be below training.steps {run.training.steps}: '
            'the cosine comes after the warm-up'
        )
    if stage.needs_negatives and run.training.batch_size < 2:
        raise UserError('training.batch-size must be at least 2: a pair needs a negative')
    _check_prompts(run.data)


def _check_stage(run: config.Run, stage: StageEntry) -> None:
    """Refuse a text side or a language model that the stage cannot train, and micro-batches that leave it too few."""
    if stage.text_side and run.model.qformer.text_side != stage.text_side:
        raise UserError(f"stage '{run.stage}' trains the text side: model.qformer.text-side is "
                        f"'{run.model.qformer.text_side}', it must be '{stage.text_side}'")  # fmt: skip
    if stage.terms:
        _check_terms(run, stage)
    if stage.decoder_only and run.model.lm.encoder_decoder:
        raise UserError(
            f"stage '{run.stage}' trains a decoder-only language model, not T5: choose another one (model.lm)"
        )
    if stage.needs_negatives and run.training.accumulate > 1:
        raise UserError(
            f'training.accumulate must be 1 in {run.stage}: ITC and ITM draw their negatives from the batch, and a '
            'micro-batch has fewer; use a smaller batch or more devices'
        )


def _check_prompts(data: config.Data) -> None:
    """Raise UserError where there is no prompt, and for one that does not hold the question, or something else too."""
    for name, prompts in (('question', data.question_prompt), ('caption', data.caption_prompt)):
        if not prompts:
            raise UserError(f"data.{name}-prompt names no prompt; give at least one, '' for none at all")
    for prompt in data.question_prompt:
        with contextlib.suppress(KeyError, IndexError, ValueError):
            if '?!' in prompt.format(question='?!'):
                continue
        raise UserError(f"data.question-prompt '{prompt}': expected {{question}} in it, and nothing else in braces")
