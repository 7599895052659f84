"""A comparison as rows of text, for Markdown, CSV, the terminal and the page."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

from llm_barber.comparison.result import Comparison, ComparisonCell
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
ACCURACY = "acc"


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
class TargetTable:
    """The rows of one sparsity or pattern."""

    title: str
    rows: tuple[Row, ...]


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
    groups: dict[tuple[CompareRow, bool], list[ComparisonCell]] = {}
    for cell in comparison.cells:
        if cell.target == target:
            groups.setdefault((cell.method, cell.rebuilt), []).append(cell)
    values = [[_measured_values(column, group) for column in measured] for group in groups.values()]
    best_means = [
        (min if column.lower_is_better else max)((fmean(row[i]) for row in values if row[i]), default=None)
        for i, column in enumerate(measured)
    ]
    dense = [_formatted(column.value(comparison.dense), column.form) for column in measured]
    rows = [Row("dense", (*dense, MISSING, MISSING), (False,) * (len(measured) + 2))]
    for ((method, rebuilt), group), numbers in zip(groups.items(), values, strict=True):
        results = [cell.result for cell in group if cell.result]
        cells = [_mean_and_spread(row, column.form) for row, column in zip(numbers, measured, strict=True)]
        cells.append(_mean([result.seconds for result in results], ".1f"))
        cells.append(_mean([result.peak_memory / 2**30 for result in results], ".2f"))
        best = [bool(row) and fmean(row) == best_mean for row, best_mean in zip(numbers, best_means, strict=True)]
        rows.append(Row(TITLES[method] + (REBUILT if rebuilt else ""), tuple(cells), (*best, False, False)))
    return TargetTable(target_title(target), tuple(rows))


def perplexities(comparison: Comparison) -> dict[tuple[CompareRow, bool], dict[str, float]]:
    """Mean perplexity over seeds on the first text, by (method, rebuilt) and then by target."""
    values: dict[tuple[CompareRow, bool], dict[str, list[float]]] = {}
    for cell in comparison.cells:
        if cell.result is not None and cell.result.evaluation.texts:
            points = values.setdefault((cell.method, cell.rebuilt), {})
            points.setdefault(cell.target, []).append(cell.result.evaluation.texts[0].perplexity)
    return {row: {target: fmean(points[target]) for target in points} for row, points in values.items()}


def notes(comparison: Comparison) -> list[str]:
    """Sentences about all that the numbers depend on, and about the cells that could not be finished."""
    settings = comparison.settings
    seeds = ", ".join(map(str, settings["seeds"]))
    lines = [
        f"Model: {comparison.model}.",
        f"Calibration: {settings['calibration']}, {settings['samples']} windows of {settings['seqlen']} tokens, "
        f"seed{'s' if len(settings['seeds']) > 1 else ''} {seeds}"
        + (" (mean ± sample standard deviation over seeds)." if len(settings["seeds"]) > 1 else "."),
        *_notes_on_tests(comparison),
        *_notes_on_rebuilds(comparison.cells),
        "Seconds: pruning, from the first layer read to the last written. Peak memory: the whole process meanwhile, "
        "with the dense model's predictions. Bold: the best of its column. "
        f"{comparison.dtype} on {comparison.device}; "
        + ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
        + ".",
    ]
    machines = dict.fromkeys(cell.result.machine or "not noted" for cell in comparison.cells if cell.result)
    if machines:
        lines.append(f"Machine{'s' if len(machines) > 1 else ''}: {'; '.join(machines)}.")
    return lines + [f"Not done: {_title(cell)}: {cell.failure}." for cell in comparison.failures]


def _notes_on_tests(comparison: Comparison) -> list[str]:
    """Sentences about the texts and tasks."""
    settings = comparison.settings
    lines = [
        f"{text.text}: {text.windows} windows of {text.seqlen} tokens, "
        f"{'each with' if text.begins_with_bos else 'without'} BOS, "
        f"sha256 {text.sha256[:16]}; KL: mean Kullback-Leibler divergence of the pruned model's "
        "next-token distribution from the dense model's, nats a token."
        for text in comparison.dense.texts
    ]
    lines += [
        f"{task.task}: accuracy on {task.examples} examples, {task.shots} shots, {task.source}; "
        f"standard error of the dense model's {100 * task.standard_error:.1f} %."
        for task in comparison.dense.tasks
        if task.metric == ACCURACY
    ]
    if settings["task_seeds"] is not None and settings["task_seeds"] < len(settings["seeds"]):
        seeds = settings["seeds"][: settings["task_seeds"]]
        lines.append(f"Tasks: calibration seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} only.")
    return lines


def _notes_on_rebuilds(cells: Iterable[ComparisonCell]) -> list[str]:
    """Sentences about the settings of the rebuilds, and about the rebuilds that changed nothing."""
    rebuilt = [(cell, cell.result) for cell in cells if cell.rebuilt and cell.result]
    swaps = dict.fromkeys(
        f"{TITLES[cell.method]}{' (N:M)' if ':' in cell.target else ''}: "
        f"within each {result.granularity}, ratio {result.rebuild_ratio:g}"
        for cell, result in rebuilt
        if result.rebuild_ratio is not None
    )
    unchanged = dict.fromkeys(
        f"{TITLES[cell.method]} at {target_title(cell.target)}" for cell, result in rebuilt if not result.swapped
    )
    lines = [f"Rebuild: {'; '.join(swaps)}."] if swaps else []
    return lines + ([f"The rebuild swapped nothing: {'; '.join(unchanged)}."] if unchanged else [])


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown: a table for each target, and the notes."""
    lines = [f"# {comparison.model}: methods side by side", ""]
    for table in tables_by_target(comparison):
        lines += [f"## {table.title}", "", *markdown_table(["method", *headings(comparison)], table.rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(comparison)), ""])


def markdown_table(headings: Sequence[str], rows: Iterable[Row]) -> list[str]:
    """Lines of a Markdown table, the best numbers in bold."""
    titles = [head.replace("|", "\\|") for head in headings]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    for row in rows:
        cells = [f"**{cell}**" if best else cell for cell, best in zip(row.cells, row.best, strict=True)]
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    return lines


def comma_separated(comparison: Comparison) -> str:
    """The comparison as CSV, for other programs: a line for each cell and metric."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "rebuilt", "target", "seed", "text_or_task", "metric", "value", "standard_error"])
    for line in _numbers(comparison.dense):
        writer.writerow(["dense", False, "", "", *line])
    for cell in comparison.cells:
        if cell.result is None:
            continue
        result = cell.result
        columns_of_cell = [cell.method.value, cell.rebuilt, cell.target, cell.seed]
        pruning = {
            "sparsity": result.sparsity,
            "swapped": result.swapped,
            "seconds": round(result.seconds, 3),
            "peak_memory": result.peak_memory,
        }
        for line in [*(["", name, value, ""] for name, value in pruning.items()), *_numbers(result.evaluation)]:
            writer.writerow([*columns_of_cell, *line])
    return file.getvalue()


def _numbers(evaluation: Evaluation) -> Iterable[list[object]]:
    for text in evaluation.texts:
        yield [text.text, "perplexity", text.perplexity, ""]
        if text.against is not None:
            yield [text.text, "perplexity_ratio", text.against.perplexity_ratio, ""]
            yield [text.text, "divergence", text.against.divergence, ""]
            yield [text.text, "top_agreement", text.against.top_agreement, ""]
    for task in evaluation.tasks:
        yield [task.task, task.metric, task.value, task.standard_error]
        if task.against is not None:
            yield [task.task, f"{task.metric}_difference", task.against.difference, task.against.standard_error]


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


def _title(cell: ComparisonCell) -> str:
    rebuilt = REBUILT if cell.rebuilt else ""
    return f"{TITLES[cell.method]}{rebuilt} at {target_title(cell.target)}, seed {cell.seed}"
