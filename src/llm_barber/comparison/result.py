"""Results of a comparison: the dense model's evaluation, and that of each cell."""

from typing import Any

from llm_barber.evaluation.result import Evaluation, Frozen
from llm_barber.settings.compare import CompareRow

DENSE = "dense"  # the dense model's name, in tables and cells


class CellResult(Frozen):
    """The result of one cell: one model, pruned in one way and measured.

    `key`: all that the result depends on. `errors`: for each kind of block, the mean reconstruction error before and
    after the rebuild. `seconds`: of pruning, from the first layer read to the last written. `peak_memory`, bytes: of
    the process while it prunes, with what the evaluator keeps in memory. `machine`: the machine that pruned; None: an
    older version did not note it.
    """

    name: str
    key: dict[str, Any]
    sparsity: float
    swapped: int
    granularity: str | None
    rebuild_ratio: float | None
    errors: dict[str, tuple[float | None, float | None]]
    seconds: float
    peak_memory: int
    peak_device_memory: int | None
    machine: str | None = None
    evaluation: Evaluation


class DenseResult(Frozen):
    """The dense model's evaluation; `key`: all that it depends on."""

    key: dict[str, Any]
    evaluation: Evaluation


class ComparisonCell(Frozen):
    """A cell of a comparison with its result, or with the error that stopped it, and what to do about it."""

    method: CompareRow
    rebuilt: bool
    target: str
    seed: int
    result: CellResult | None = None
    failure: str | None = None
    hint: str | None = None


class Comparison(Frozen):
    """A comparison: the dense model's evaluation and the cells that are finished."""

    model: str
    settings: dict[str, Any]
    device: str
    dtype: str
    versions: dict[str, str]
    dense: Evaluation
    cells: tuple[ComparisonCell, ...]

    @property
    def failures(self) -> list[ComparisonCell]:
        """The cells that could not be finished."""
        return [cell for cell in self.cells if cell.failure is not None]
