"""A comparison as rows of text, for Markdown, the terminal and the page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from llm_barber.comparison.paired import (
    ACCURACY,
    INTERVAL,
    Difference,
    answers,
    beyond_chance,
    paired_differences,
)
from llm_barber.comparison.result import DENSE, CellResult, Comparison
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
# Format of a column's numbers, and the choice of its best, by the last word of its heading.
FORMS = {"perplexity": ".2f", "KL": ".3f", "%": ".1f", "seconds": ".1f", "GiB": ".2f"}
BEST: dict[str, Callable[[Iterable[float]], float]] = {"perplexity": min, "KL": min, "%": max}
PAIRED = (
    "Mean accuracy of the row's model minus that of the column's model, in points, on the same examples; ± the "
    "95\N{NO-BREAK SPACE}% interval of this pair alone. Bold: significant at 5\N{NO-BREAK SPACE}% after Holm's "
    "correction for all pairs. Differences between calibration seeds are not covered."
)


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


def row_title(method: CompareRow, rebuilt: bool) -> str:
    """Title of a row. Example: "Wanda + rebuild"."""
    return TITLES[method] + " + rebuild" * rebuilt


def targets(comparison: Comparison) -> list[str]:
    """The targets of a comparison, in its order."""
    return list(dict.fromkeys(cell.target for cell in comparison.cells))


def measured(evaluation: Evaluation) -> dict[str, float]:
    """Perplexity and KL divergence of each text, accuracy of each task in percent, and their mean, by heading."""
    numbers = {}
    short = [text.text.rpartition("/")[2].removesuffix(".txt") for text in evaluation.texts]
    for text, short_name in zip(evaluation.texts, short, strict=True):
        name = short_name if short.count(short_name) == 1 else text.text
        numbers[f"{name} perplexity"] = text.perplexity
        if text.against is not None:
            numbers[f"{name} KL"] = text.against.divergence
    accuracies = {f"{task.task} %": 100 * task.value for task in evaluation.tasks if task.metric == ACCURACY}
    mean = {"mean %": fmean(accuracies.values())} if len(accuracies) > 1 else {}
    return {**numbers, **accuracies, **mean}


def headings(comparison: Comparison) -> list[str]:
    """Headings of a target's table, after that of the titles."""
    return [*measured(comparison.dense), "seconds", "peak GiB"]


def tables_by_target(comparison: Comparison) -> list[TargetTable]:
    """A table for each target: means, with ± the sample standard deviation over several seeds."""
    return [_table(comparison, target) for target in targets(comparison)]


def _table(comparison: Comparison, target: str) -> TargetTable:
    names, groups = headings(comparison), results_by_row(comparison, target)
    numbers = {DENSE: [measured(comparison.dense)]}
    for title, results in groups.items():
        numbers[title] = [
            {**measured(result.evaluation), "seconds": result.seconds, "peak GiB": result.peak_memory / 2**30}
            for result in results
        ]
    columns = {
        name: {title: [seed[name] for seed in seeds if name in seed] for title, seeds in numbers.items()}
        for name in names
    }
    best = {name: _best(name, column) for name, column in columns.items()}
    rows = []
    for title in numbers:
        values = {name: columns[name][title] for name in names}
        cells = tuple(_text(seeds, FORMS[name.split()[-1]]) for name, seeds in values.items())
        rows.append(Row(title, cells, tuple(title in best[name] for name in names)))
    evaluations = {title: [result.evaluation for result in results] for title, results in groups.items()}
    by_row = {title: answers(row) for title, row in {DENSE: [comparison.dense], **evaluations}.items()}
    return TargetTable(target_title(target), tuple(rows), _paired_table(paired_differences(by_row)))


def _best(name: str, column: Mapping[str, Sequence[float]]) -> set[str]:
    """Titles of the rows with the best mean of a column, the dense model's aside."""
    means = {title: fmean(values) for title, values in column.items() if values and title != DENSE}
    choose = BEST.get(name.split()[-1])
    return {title for title, mean in means.items() if choose and mean == choose(means.values())}


def results_by_row(comparison: Comparison, target: str) -> dict[str, list[CellResult]]:
    """The results of a target by the title of their row: one a calibration seed."""
    rows: dict[str, list[CellResult]] = {}
    for cell in comparison.cells:
        if cell.target == target:
            rows.setdefault(row_title(cell.method, cell.rebuilt), []).extend([cell.result] if cell.result else [])
    return rows


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


def _text(values: Sequence[float], form: str) -> str:
    """Mean of values; of several with ± the sample standard deviation."""
    if not values:
        return MISSING
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")
