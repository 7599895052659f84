"""A comparison as rows of text, for Markdown, the terminal and the page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

from llm_barber.comparison.paired import (
    ACCURACY,
    INTERVAL,
    Difference,
    answers,
    beyond_chance,
    paired_differences,
    tasks_without_answers,
)
from llm_barber.comparison.result import DENSE, Comparison, ComparisonCell
from llm_barber.evaluation.result import Evaluation
from llm_barber.page.environment import MISSING
from llm_barber.settings.compare import CompareRow

TITLES = {
    CompareRow.MAGNITUDE: "magnitude",
    CompareRow.SPARSEGPT: "SparseGPT, dense weights",
    CompareRow.SPARSEGPT_UPDATES: "SparseGPT, its updates",
    CompareRow.WANDA: "Wanda",
    CompareRow.RIA: "RIA",
    CompareRow.DSNOT: "DSnoT on Wanda",
    CompareRow.ALPS: "ALPS, its weights",
    CompareRow.MASK: "preset mask",
    CompareRow.BEST: "preset best",
    CompareRow.PAPER: "preset paper",
    CompareRow.SPARSEGPT_ALLOCATED: "SparseGPT, its updates, allocated",
    CompareRow.ALPS_ALLOCATED: "ALPS, its weights, allocated",
}
REBUILT = " + rebuild"
PAIRED = (
    "Mean accuracy of the row's model minus that of the column's model, in points, on the same examples; ± the "
    "95\N{NO-BREAK SPACE}% interval of this pair alone. Bold: significant at 5\N{NO-BREAK SPACE}% after Holm's "
    "correction for all pairs. Differences between calibration seeds are not covered."
)


@dataclass(frozen=True)
class Column:
    """A number of each cell.

    `value`: takes it from an evaluation, None: it was not measured. `form`: its format specification.
    """

    heading: str
    value: Callable[[Evaluation], float | None]
    form: str
    lower_is_better: bool


@dataclass(frozen=True)
class Row:
    """A row of a table: its title, its formatted numbers, and for each if it is the best of its column."""

    title: str
    cells: tuple[str, ...]
    best: tuple[bool, ...]


@dataclass(frozen=True)
class PairedTable:
    """Differences of mean accuracy: a row's less that of the row which the heading names, points ± a 95 % interval.

    `best` of a row: the differences that are more than chance.
    """

    headings: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class TargetTable:
    """The rows of one sparsity or pattern; `paired`: their differences on tasks, None: fewer than two have any."""

    title: str
    rows: tuple[Row, ...]
    paired: PairedTable | None = None


def target_title(target: str) -> str:
    """Title of a target. Example: "0.5" -> "50 %", "2:4" -> "2:4"."""
    return target if ":" in target else f"{100 * float(target):g} %"


def columns(dense: Evaluation) -> list[Column]:
    """Perplexity and KL divergence of each text, accuracy of each task, and the mean accuracy."""
    result = []
    for index, text in enumerate(dense.texts):
        name = text.text.rpartition("/")[2].removesuffix(".txt")
        result.append(Column(f"{name} perplexity", partial(_perplexity, index), ".2f", True))
        result.append(Column(f"{name} KL", partial(_divergence, index), ".3f", True))
    tasks = [task.task for task in dense.tasks if task.metric == ACCURACY]
    for name in tasks:
        result.append(Column(f"{name} %", partial(_percent, (name,)), ".1f", False))
    if len(tasks) > 1:
        result.append(Column("mean %", partial(_percent, tuple(tasks)), ".1f", False))
    return result


def headings(comparison: Comparison) -> list[str]:
    """Headings of all columns after the method's."""
    return [*(column.heading for column in columns(comparison.dense)), "seconds", "peak GiB"]


def tables_by_target(comparison: Comparison) -> list[TargetTable]:
    """A table for each target: means, with ± the sample standard deviation over several seeds."""
    return [_table(comparison, target) for target in dict.fromkeys(cell.target for cell in comparison.cells)]


def _table(comparison: Comparison, target: str) -> TargetTable:
    measured = columns(comparison.dense)
    groups = cells_by_row(comparison, target)
    values = [[_measured_values(column, group) for column in measured] for group in groups.values()]
    best_means = [
        (min if column.lower_is_better else max)((fmean(row[i]) for row in values if row[i]), default=None)
        for i, column in enumerate(measured)
    ]
    dense = [_formatted(column.value(comparison.dense), column.form) for column in measured]
    rows = [Row(DENSE, (*dense, MISSING, MISSING), (False,) * (len(measured) + 2))]
    for (title, group), numbers in zip(groups.items(), values, strict=True):
        results = [cell.result for cell in group if cell.result]
        cells = [_mean_and_spread(row, column.form) for row, column in zip(numbers, measured, strict=True)]
        cells.append(_mean([result.seconds for result in results], ".1f"))
        cells.append(_mean([result.peak_memory / 2**30 for result in results], ".2f"))
        best = [bool(row) and fmean(row) == best_mean for row, best_mean in zip(numbers, best_means, strict=True)]
        rows.append(Row(title, tuple(cells), (*best, False, False)))
    return TargetTable(target_title(target), tuple(rows), _paired_table(differences_on_tasks(comparison, target)))


def cells_by_row(comparison: Comparison, target: str) -> dict[str, list[ComparisonCell]]:
    """The cells of a target by the title of their row: one a calibration seed."""
    groups: dict[str, list[ComparisonCell]] = {}
    for cell in comparison.cells:
        if cell.target == target:
            groups.setdefault(row_title(cell), []).append(cell)
    return groups


def evaluations_by_row(comparison: Comparison, target: str) -> dict[str, list[Evaluation]]:
    """The evaluations of a target by the title of their row; the dense model's first."""
    rows = cells_by_row(comparison, target)
    measured = {title: [cell.result.evaluation for cell in cells if cell.result] for title, cells in rows.items()}
    return {DENSE: [comparison.dense], **measured}


def differences_on_tasks(comparison: Comparison, target: str) -> dict[tuple[str, str], Difference]:
    """Differences on tasks between the rows that have answers by example, each from the rows above it."""
    left_out = tasks_without_answers(comparison.dense)
    found = {title: answers(row, left_out) for title, row in evaluations_by_row(comparison, target).items()}
    return paired_differences({title: row_answers for title, row_answers in found.items() if row_answers is not None})


def _paired_table(differences: Mapping[tuple[str, str], Difference]) -> PairedTable | None:
    """A triangle: each row's differences from the rows above it; None: there are none."""
    if not differences:
        return None
    certain = beyond_chance(differences)
    titles = list(dict.fromkeys(title for pair in differences for title in reversed(pair)))
    rows = []
    for number, title in enumerate(titles[1:], 1):
        pairs = [(title, earlier) for earlier in titles[:number]]
        missing = len(titles) - 1 - number
        cells = [
            f"{100 * differences[pair].mean:+.1f} ± {100 * INTERVAL * differences[pair].standard_error:.1f}"
            for pair in pairs
        ]
        rows.append(Row(title, (*cells, *[""] * missing), (*(pair in certain for pair in pairs), *[False] * missing)))
    return PairedTable(tuple(titles[:-1]), tuple(rows))


def perplexities(comparison: Comparison) -> dict[tuple[CompareRow, bool], dict[str, float]]:
    """Mean perplexity over seeds on the first text, by (method, rebuilt) and then by target."""
    values: dict[tuple[CompareRow, bool], dict[str, list[float]]] = {}
    for cell in comparison.cells:
        if cell.result is not None and cell.result.evaluation.texts:
            points = values.setdefault((cell.method, cell.rebuilt), {})
            points.setdefault(cell.target, []).append(cell.result.evaluation.texts[0].perplexity)
    return {row: {target: fmean(points[target]) for target in points} for row, points in values.items()}


def _perplexity(index: int, evaluation: Evaluation) -> float:
    return evaluation.texts[index].perplexity


def _divergence(index: int, evaluation: Evaluation) -> float | None:
    compared = evaluation.texts[index].against
    return None if compared is None else compared.divergence


def _percent(names: Sequence[str], evaluation: Evaluation) -> float | None:
    """Mean accuracy of some tasks, in percent; None: none of them was measured."""
    accuracies = [task.value for task in evaluation.tasks if task.task in names and task.metric == ACCURACY]
    return 100 * fmean(accuracies) if accuracies else None


def _measured_values(column: Column, cells: Iterable[ComparisonCell]) -> list[float]:
    """A column's values of the cells that have one."""
    values = [column.value(cell.result.evaluation) for cell in cells if cell.result]
    return [value for value in values if value is not None]


def _formatted(value: float | None, form: str) -> str:
    return MISSING if value is None else f"{value:{form}}"


def _mean(values: Sequence[float], form: str) -> str:
    return _formatted(fmean(values) if values else None, form)


def _mean_and_spread(values: Sequence[float], form: str) -> str:
    """Mean; of several values with ± the sample standard deviation."""
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return _mean(values, form) + spread


def row_title(cell: ComparisonCell) -> str:
    """Title of a cell's row. Example: "Wanda + rebuild"."""
    return TITLES[cell.method] + (REBUILT if cell.rebuilt else "")
