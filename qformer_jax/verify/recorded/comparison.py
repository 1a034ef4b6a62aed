"""What there is to do for a case: our computation, and the recorded arrays that it must give."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ...typing import Array, Params
from .. import tolerance
from ..report import ReportRow, compare, difference

PRECISION = 'highest'
Arrays = dict[str, Array]
Function = Callable[[Params, Arrays, DTypeLike, bool], Arrays]
"""Our code: (params, inputs, compute dtype, whether gradients are wanted too) -> arrays by their recorded names."""


@dataclass(frozen=True, eq=False)
class Work:
    """One case, ready to be computed in any precision and with any parameters of the same shapes."""

    params: Params
    """The recorded weights (float32)."""
    inputs: Arrays
    function: Function
    expected: dict[str, np.ndarray]
    """What was recorded and must come out."""
    gradients: dict[str, np.ndarray]
    """What was recorded and must come out as a gradient."""
    unknown: tuple[str, ...]
    """What was recorded, and nothing here computes it."""
    left_out: dict[str, str]
    """What was recorded and is not compared: name -> why."""
    unstable: frozenset[str]
    """What takes another turn where rounding decides between two words or candidates: not compared in bfloat16."""

    noise: dict[str, float] = dataclasses.field(default_factory=dict)
    """What float32 does to each array, as far as it is known already."""

    @cached_property
    def _compiled(self) -> Callable:
        def run(params: Params, inputs: Arrays, dtype: DTypeLike, names: frozenset[str]) -> Arrays:
            found = self.function(params, inputs, dtype, not names.isdisjoint(self.gradients))
            return {name: x for name, x in found.items() if name in names}

        return jax.jit(run, static_argnums=(2, 3))

    def compute(
        self, params: Params, dtype: str, names: Iterable[str], precision: str = PRECISION
    ) -> dict[str, np.ndarray]:
        """Return our arrays by name; `highest` keeps products from rounding their inputs, which some devices do."""
        wide = dtype == 'float64'

        def given(x: Array) -> Array:
            return jnp.asarray(x, jnp.float64 if wide and jnp.issubdtype(x.dtype, jnp.floating) else None)

        with jax.enable_x64(wide), jax.default_matmul_precision(precision):
            out = self._compiled(*jax.tree.map(given, (params, self.inputs)), jnp.dtype(dtype), frozenset(names))
            return {name: np.asarray(x) for name, x in out.items()}

    @cached_property
    def tolerances(self) -> dict[str, float]:
        """What each array may differ by in float32; the noise that is not known is measured."""
        known = self.noise if self.noise.keys() >= self.measurable else self.measure_noise()
        arrays = {name: tolerance.float32(x, known.get(name, 0.0)) for name, x in self.expected.items()}
        return arrays | {name: tolerance.gradient(x) for name, x in self.gradients.items()}

    @property
    def measurable(self) -> set[str]:
        """The arrays that have noise: those of numbers."""
        return {name for name, x in self.expected.items() if not tolerance.is_ids(x)}

    def measure_noise(self) -> dict[str, float]:
        """Return the largest difference between float32 and float64 by array, with the recorded weights."""
        narrow = self.compute(self.params, 'float32', self.expected)
        wide = self.compute(self.params, 'float64', self.expected)
        return {name: difference(narrow[name], wide[name]) for name in sorted(self.measurable)}

    def rows(self, params: Params, dtype: str) -> list[ReportRow]:
        """Return one row a recorded array, in the order of the file."""
        expected = self.expected | self.gradients
        if dtype == 'bfloat16':
            expected = {name: x for name, x in expected.items() if name not in self.unstable}
        computed = self.compute(params, dtype, expected)
        if dtype == 'bfloat16':
            allowed = {name: tolerance.bfloat16(x, name in self.gradients) for name, x in expected.items()}
        else:
            allowed = self.tolerances
        rows = [_row(name, computed[name], x, allowed[name]) for name, x in expected.items()]
        return rows + [ReportRow(name, np.inf, np.nan, 0.0, 'nothing here computes it') for name in self.unknown]

    def explained(self, rows: list[ReportRow]) -> list[ReportRow]:
        """Return the rows; those of numbers that fail say whose rounding it is, by their distance to float64."""
        expected = self.expected | self.gradients
        unsaid = [row.name for row in rows if not row.passed and not row.note]
        failed = [name for name in unsaid if not tolerance.is_ids(expected[name])]
        if not failed:
            return rows
        computed, exact = (self.compute(self.params, dtype, failed) for dtype in ('float32', 'float64'))

        def note(row: ReportRow) -> str:
            if np.isnan(expected[row.name]).any():
                return 'NaN was recorded'
            unit = row.scale or 1.0
            gaps = (difference(x, exact[row.name]) / unit for x in (computed[row.name], expected[row.name]))
            return 'float64 is {:.1e} of the scale from ours, {:.1e} from the recorded'.format(*gaps)

        return [dataclasses.replace(row, note=note(row)) if row.name in failed else row for row in rows]


def _row(name: str, computed: np.ndarray, expected: np.ndarray, allowed: float) -> ReportRow:
    """Compare; a narrow array where the policy asks for float32 fails whatever its values."""
    row = compare(name, computed, expected, allowed)
    narrow = tolerance.decides(name) and np.issubdtype(expected.dtype, np.floating) and computed.dtype.itemsize < 4
    return dataclasses.replace(row, difference=np.inf, note=f'is {computed.dtype}, must be float32') if narrow else row
