"""What bfloat16 and TF32 do to the numbers: every recorded LAVIS case in each precision, and greedy ids beside PyTorch.

    python -m experiments.numerics.precision

One row a case and precision: the largest difference from the recorded float32 arrays as a share of the array's largest
entry, likewise for gradients; fails when a number is NaN or infinite where the recording is not, or when a loss or a
logit comes out in another type than float32. Then the ids that we write in bfloat16 against those that PyTorch writes
in bfloat16 (tests/goldens/bf16), wherever PyTorch's own two best scores are further apart than the noise of both.
Rows go to experiments/numerics/precision.jsonl, one set for each kind of device.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from qformer_jax import config, verify
from qformer_jax.inference import decode, forward
from qformer_jax.inference.generate import GenerationConfig, generate, step_scores
from qformer_jax.models import blip2
from qformer_jax.typing import Array, Params
from qformer_jax.verify import report
from qformer_jax.verify.recorded import sizes, stage2
from qformer_jax.verify.recorded.comparison import Work
from qformer_jax.verify.tolerance import decides, is_ids

GOLDENS = Path(__file__).parents[2] / 'tests' / 'goldens'
CASES = (
    'eva_vit', 'clip_vit', 'qformer_modes', 'stage1', 'stage1_clip', 'stage1_world2', 'itm_retrieval',
    'stage1_generate', 'opt_stage2', 't5_stage2',
)  # fmt: skip
RESULTS = Path(__file__).with_name('precision.jsonl')


def modes() -> dict[str, tuple[str, str]]:
    """Return name -> (compute dtype, precision of products) that differ on this device; CPUs have no TF32."""
    found = {'float32': ('float32', 'highest')}
    if jax.default_backend() == 'gpu':
        found['TF32'] = ('float32', 'tensorfloat32')
    return found | {'bfloat16': ('bfloat16', 'highest')}


@dataclass(frozen=True)
class Cost:
    """What a precision costs in one case."""

    case: str
    mode: str
    arrays: float
    """Largest relative difference of an array."""
    worst: str
    gradients: float | None
    """Largest relative difference of a gradient; None where none was recorded."""


def cost(name: str, mode: str, dtype: str, precision: str) -> Cost:
    """Return the differences of a case; raises SystemExit for numbers that are not finite, and for wrong types."""
    case = verify.read(GOLDENS / 'lavis' / name)
    work = verify.work(case)
    expected = work.expected | work.gradients
    computed = work.compute(work.params, dtype, expected, precision)
    for array, value in expected.items():
        if np.isfinite(value).sum() != np.isfinite(np.asarray(computed[array], np.float32)).sum():
            raise SystemExit(f'{name} in {mode}: {array} holds numbers that are not finite')
        if decides(array) and not is_ids(value) and computed[array].dtype != np.float32:
            raise SystemExit(f'{name} in {mode}: {array} is {computed[array].dtype}, and should be float32')
    arrays = {array: relative(computed[array], x) for array, x in comparable(work).items()}
    gradients = [relative(computed[array], x) for array, x in work.gradients.items()]
    worst = max(arrays, key=arrays.get)
    return Cost(name, mode, arrays[worst], worst, max(gradients, default=None))


def comparable(work: Work) -> dict[str, np.ndarray]:
    """Return the recorded floating arrays, but for what depends on a choice of words."""
    kept = (name for name in work.expected if name not in work.unstable and not name.endswith('top2_gap'))
    return {name: work.expected[name] for name in kept if not is_ids(work.expected[name])}


def relative(computed: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference as a share of the largest entry."""
    return report.difference(computed, expected) / (report.scale(expected) or 1.0)


@dataclass(frozen=True)
class Greedy:
    """Our bfloat16 ids against PyTorch's for one setting."""

    setting: str
    steps: int
    """Steps of all rows up to the first different id of each."""
    decided: int
    """Of them, steps at which PyTorch's two best scores are further apart than the noise."""
    noise: float
    """Largest difference from float32 logits of either side."""
    differ: tuple[str, ...]
    """Where the ids part, and how close PyTorch's choice was."""
    wrong: int
    """How many of these were decided."""


def greedy(part: str) -> list[Greedy]:
    """Return one comparison a prompt; `lm` starts from the recorded float32 prefix, `whole` from the features."""
    with np.load(GOLDENS / 'bf16' / 'greedy.npz') as file:
        recorded = dict(file)
    found = []
    for family, name in (('opt', 'opt_stage2'), ('t5', 't5_stage2')):
        case = verify.read(GOLDENS / 'lavis' / name)
        work = verify.work(case)
        language_model = sizes.opt(case) if family == 'opt' else sizes.t5(case)
        c = config.Blip2Config(sizes.vit(case, 'vit'), sizes.qformer(case, 'none'), language_model)
        narrow, wide = (blip2.Blip2Module(c, jnp.dtype(x)) for x in ('bfloat16', 'float32'))
        params = jax.tree.map(jnp.asarray, work.params)
        features = forward.bound(stage2.vision_features)(wide, params, case.arrays['pixels'])
        exact = case.arrays['no_prompt.inputs_opt' if family == 'opt' else 'inputs_t5']
        prefix = exact if part == 'lm' else forward.soft_prefix(narrow, params, *features).vectors
        names = (name.removesuffix('.sequences') for name in recorded if name.endswith('.sequences'))
        for setting in names:
            if setting.startswith(f'{family}.{part}'):
                found.append(compare_greedy(setting, recorded, case, (narrow, wide), params, prefix, exact))
    return found


def compare_greedy(
    setting: str,
    recorded: dict[str, np.ndarray],
    case: verify.Case,
    models: tuple[blip2.Blip2Module, blip2.Blip2Module],
    params: Params,
    prefix: Array,
    exact: Array,
) -> Greedy:
    """Return how our ids compare with PyTorch's in one setting; `models` compute in bfloat16 and in float32."""
    ids, gaps = recorded[f'{setting}.sequences'].astype(np.int32), recorded[f'{setting}.top2_gap']
    steps = gaps.shape[1]
    if setting.startswith('opt'):
        prompt, mask = ids[:, : ids.shape[1] - steps], np.ones((len(ids), ids.shape[1] - steps), bool)
        end = case.setting('opt', 'tokenizer', 'eos_token_id(newline)')
    else:
        prompt, mask = case.arrays['gen.input_ids'], case.arrays['gen.attention_mask'].astype(bool)
        end = 1
    new = ids[:, ids.shape[1] - steps :]
    settings = GenerationConfig(max_new_tokens=steps, end_ids=(end,))

    @partial(jax.jit, static_argnums=0)
    def write(model, prefix):
        step, start = decode.prefill_lm(model, params, blip2.Prefix.whole(prefix), prompt, mask, steps)
        return generate(step, start, settings).tokens[:, 0], step_scores(step, start, jnp.asarray(new), settings)

    with jax.default_matmul_precision('highest'):
        (computed, narrow), (_, wide) = write(models[0], jnp.asarray(prefix)), write(models[1], jnp.asarray(exact))
    ended = np.cumsum(new == end, axis=1) - (new == end) > 0
    own = np.abs(np.asarray(narrow, np.float32) - np.asarray(wide, np.float32)).max(axis=-1)
    noise = max(float(own[~ended].max()), float(np.nanmax(recorded[f'{setting}.noise'])))
    count = decided = wrong = 0
    differ = []
    for row in range(len(new)):
        for at in np.flatnonzero(~ended[row]):
            count += 1
            sure = gaps[row, at] > 2 * noise  # either of two scores may be off
            decided += sure
            if computed[row, at] != new[row, at]:
                differ.append(f'row {row}, token {at}: gap {gaps[row, at]:.3g}')
                wrong += sure
                break
    return Greedy(setting, count, int(decided), noise, tuple(differ), int(wrong))


def main() -> None:
    """Measure, print, keep; raises SystemExit when a decided id differs."""
    device = jax.devices()[0].device_kind
    costs = [said(cost(name, mode, *way)) for mode, way in modes().items() for name in CASES]
    ids = [said(row) for part in ('lm', 'whole') for row in greedy(part)]
    show(device, costs, ids)
    keep(device, [vars(row) | {'kind': 'cost'} for row in costs] + [vars(row) | {'kind': 'greedy'} for row in ids])
    if any(row.wrong for row in ids):
        raise SystemExit('an id differs where it should not')


def said(row: Cost | Greedy) -> Cost | Greedy:
    """Print a row as soon as it is there, and return it."""
    print(json.dumps(vars(row)), flush=True)
    return row


def show(device: str, costs: list[Cost], ids: list[Greedy]) -> None:
    """Print both tables."""
    table = Table(title=f'largest relative difference from float32 recordings, {device}')
    for column in ('case', 'precision', 'arrays', 'of', 'gradients'):
        table.add_column(column)
    for row in costs:
        gradients = f'{row.gradients:.1e}' if row.gradients is not None else ''
        table.add_row(row.case, row.mode, f'{row.arrays:.1e}', row.worst, gradients)
    second = Table(title=f'greedy ids in bfloat16 beside PyTorch, {device}')
    for column in ('setting', 'steps', 'decided', 'noise', 'of them different', 'different'):
        second.add_column(column)
    for row in ids:
        second.add_row(
            row.setting, f'{row.steps}', f'{row.decided}', f'{row.noise:.2g}', f'{row.wrong}', '; '.join(row.differ)
        )
    console = Console(width=140)
    console.print(table, second)


def keep(device: str, rows: list[dict]) -> None:
    """Write the rows of this device in place of its older ones."""
    old = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    kept = [row for row in old if row['device'] != device]
    rows = kept + [row | {'device': device, 'jax': jax.__version__} for row in rows]
    RESULTS.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    print(f'wrote {RESULTS}')


if __name__ == '__main__':
    main()
