"""What a configuration cannot do, said before anything is read."""

import contextlib

from .. import config
from ..config.ranges import MILLION, check_ranges
from ..errors import UserError
from ..models import connectors, query_count

TERMS = ('itc', 'itm', 'itg', 'cross_modal', 'in_modal', 'intra_modal', 'static_queries')


def _check_rates(run: config.Run) -> None:
    """Refuse multiples of the learning rate that are none."""
    for pattern, multiple in run.optimizer.rate_rules:
        if multiple is not None and not 0 <= multiple <= MILLION:  # NaN is not
            raise UserError(f"optimizer.rate-rules: '{pattern}' learns at {multiple} times the rate; expected a number "
                            f'from 0 to {MILLION:,}, or None to freeze it')  # fmt: skip


def _check_terms(run: config.Run) -> None:
    weights = {name: getattr(run.objective, name) for name in TERMS}
    if not any(weights.values()):
        raise UserError(f'of the weights of stage 1 one must be above 0: objective has {weights}')
    if run.objective.intra_modal and not run.model.qformer.dropout:
        raise UserError(
            'objective.intra-modal contrasts two passes with other dropout, and model.qformer.dropout is 0: set it'
        )
    if run.objective.static_queries and run.model.qformer.query_bank == 1:
        raise UserError(
            'objective.static-queries trains the bank of queries, and there is none: model.qformer.query-bank is 1'
        )


def _check_connector(run: config.Run) -> None:
    """Refuse stages without anything between the towers, and a connector or a text where nothing reads it."""
    m, connects = run.model, run.stage in ('stage2', 'instruct')
    if connects and not (m.qformer or m.connector):
        raise UserError(f"stage '{run.stage}' needs model.qformer or model.connector, and both are None")
    if m.connector and not connects:
        raise UserError(f"model.connector has no text side and learns in 'stage2' and 'instruct', not in '{run.stage}'")
    if m.connector:
        connectors.make(m.connector, 'float32')
    if m.time and not (m.qformer or m.connector):
        raise UserError('model.time tells a Q-Former or a connector when frames are, and both are None')
    if run.objective.instruction_aware and not m.qformer:
        raise UserError('objective.instruction-aware: the Q-Former reads the question, and model.qformer is None')


def _check_nested(run: config.Run) -> None:
    if run.objective.nested_queries and not (run.model.qformer and run.stage in ('stage1', 'stage2', 'instruct')):
        raise UserError("objective.nested-queries draws how many of the Q-Former's queries exist, and there is none")
    if run.objective.nested_queries:
        query_count.check_alike(run.model.qformer)


def _check_gates(run: config.Run) -> None:
    gates, lm = run.model.gates, run.model.lm
    if run.stage not in ('stage2', 'instruct'):
        raise UserError(f"model.gates read pictures in 'stage2' and 'instruct', not in '{run.stage}'")
    if lm.encoder_decoder:
        raise UserError('model.gates stand between the blocks of a decoder, OPT or Llama, and this is T5: gates=None')
    if lm.width % gates.heads:
        raise UserError(f"model.gates.heads is {gates.heads}, and must divide the language model's width, {lm.width}")


def check(run: config.Run) -> None:
    """Raise UserError for a configuration that cannot do what it says."""
    needs = {
        'vision': ('vit',),
        'language': ('lm',),
        'stage1': ('qformer',),
        'stage2': ('lm',),
        'instruct': ('lm',),
    }
    for part in needs[run.stage]:
        if getattr(run.model, part) is None:
            raise UserError(f"stage '{run.stage}' needs model.{part}, which is None")
    check_ranges(run)
    _check_rates(run)
    _check_connector(run)
    _check_nested(run)
    if run.model.gates:
        _check_gates(run)
    if run.model.lora and run.stage not in ('stage2', 'instruct'):
        raise UserError(f"model.lora adapts a frozen language model in 'stage2' and 'instruct', not in '{run.stage}'")
    if run.stage == 'stage1':
        if run.model.qformer.text_side != 'full':
            raise UserError(f"stage 'stage1' trains the text side: model.qformer.text-side is "
                            f"'{run.model.qformer.text_side}', it must be 'full'")  # fmt: skip
        _check_terms(run)
    if run.stage == 'language' and run.model.lm.encoder_decoder:
        raise UserError("stage 'language' trains a decoder-only language model, not T5: choose another one (model.lm)")
    if run.stage == 'stage1' and run.training.accumulate > 1:
        raise UserError(
            'training.accumulate must be 1 in stage1: ITC and ITM draw their negatives from the batch, and a '
            'micro-batch has fewer; use a smaller batch or more devices'
        )
    if run.optimizer.schedule == 'lavis' and not run.optimizer.steps_per_epoch:
        raise UserError("optimizer.schedule 'lavis' needs optimizer.steps-per-epoch")
    if run.optimizer.schedule == 'cosine' and run.optimizer.warmup_steps >= run.training.steps:
        raise UserError(
            f'optimizer.warmup-steps {run.optimizer.warmup_steps} must be below training.steps {run.training.steps}: '
            'the cosine comes after the warm-up'
        )
    if run.stage == 'stage1' and run.training.batch_size < 2:
        raise UserError('training.batch-size must be at least 2: a pair needs a negative')
    _check_prompts(run.data)


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
