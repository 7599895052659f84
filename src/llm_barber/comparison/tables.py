"""A comparison as rows of text, for Markdown, CSV, the terminal and the page."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from llm_barber.comparison.compare import Comparison, ComparisonCell
from llm_barber.evaluation.evaluate import Evaluation
from llm_barber.settings.compare import Method

TITLES = {
    Method.MAGNITUDE: "magnitude",
    Method.SPARSEGPT: "SparseGPT, dense weights",
    Method.SPARSEGPT_UPDATES: "SparseGPT, its updates",
    Method.WANDA: "Wanda",
    Method.RIA: "RIA",
    Method.DSNOT: "DSnoT on Wanda",
    Method.ALPS: "ALPS, its weights",
    Method.MASK: "preset mask",
    Method.BEST: "preset best",
    Method.PAPER: "preset paper",
    Method.SPARSEGPT_ALLOCATED: "SparseGPT, its updates, allocated",
    Method.ALPS_ALLOCATED: "ALPS, its weights, allocated",
}
REBUILT = " + rebuild"
ACCURACY = "acc"


@dataclass(frozen=True)
class Column:
    """A number of each cell: heading, its value in an evaluation (None: not measured), format, direction."""

    heading: str
    value: Callable[[Evaluation], float | None]
    form: str
    lower_is_better: bool


@dataclass(frozen=True)
class Row:
    """A row of a block: its title, formatted numbers, and which of them are the best of their columns."""

    title: str
    cells: tuple[str, ...]
    best: tuple[bool, ...]


@dataclass(frozen=True)
class Block:
    """The rows of a sparsity or pattern."""

    title: str
    rows: tuple[Row, ...]


def target_title(target: str) -> str:
    """50 % or 2:4."""
    return target if ":" in target else f"{100 * float(target):g} %"


def columns(dense: Evaluation) -> list[Column]:
    """Perplexity and KL divergence of each text, accuracy of each task, and their mean."""
    found = []
    for index, text in enumerate(dense.texts):
        name = text.text.rpartition("/")[2].removesuffix(".txt")
        found.append(Column(f"{name} perplexity", partial(_perplexity, index), ".2f", True))
        found.append(Column(f"{name} KL", partial(_divergence, index), ".3f", True))
    tasks = [task.task for task in dense.tasks if task.metric == ACCURACY]
    for name in tasks:
        found.append(Column(f"{name} %", partial(_percent, (name,)), ".1f", False))
    if len(tasks) > 1:
        found.append(Column("mean %", partial(_percent, tuple(tasks)), ".1f", False))
    return found


def headings(comparison: Comparison) -> list[str]:
    """Of all columns after the method's."""
    return [*(column.heading for column in columns(comparison.dense)), "seconds", "peak GiB"]


def blocks(comparison: Comparison) -> list[Block]:
    """A block of rows for each target; means, with ± the sample standard deviation over seeds if there are several."""
    found = []
    measured = columns(comparison.dense)
    targets = dict.fromkeys(cell.target for cell in comparison.cells)
    for target in targets:
        groups: dict[tuple[Method, bool], list[ComparisonCell]] = {}
        for cell in comparison.cells:
            if cell.target == target:
                groups.setdefault((cell.method, cell.rebuilt), []).append(cell)
        values = [[_known(column, group) for column in measured] for group in groups.values()]
        bests = [
            (min if column.lower_is_better else max)((_mean(row[i]) for row in values if row[i]), default=None)
            for i, column in enumerate(measured)
        ]
        dense = [f"{column.value(comparison.dense):{column.form}}" for column in measured]
        rows = [Row("dense", (*dense, "–", "–"), (False,) * (len(measured) + 2))]
        for ((method, rebuilt), group), numbers in zip(groups.items(), values, strict=True):
            done = [cell.result for cell in group if cell.result]
            cells = [_mean_and_spread(row, column.form) for row, column in zip(numbers, measured, strict=True)]
            cells.append(_mean_and_spread([one.seconds for one in done], ".1f", spread=False))
            cells.append(_mean_and_spread([one.peak_memory / 2**30 for one in done], ".2f", spread=False))
            best = [bool(row) and _mean(row) == one for row, one in zip(numbers, bests, strict=True)]
            rows.append(Row(TITLES[method] + (REBUILT if rebuilt else ""), tuple(cells), (*best, False, False)))
        found.append(Block(target_title(target), tuple(rows)))
    return found


def perplexities(comparison: Comparison) -> dict[tuple[Method, bool], dict[str, float]]:
    """Mean perplexity over seeds on the first text, by method and whether it was rebuilt, then by target."""
    found: dict[tuple[Method, bool], dict[str, list[float]]] = {}
    for cell in comparison.cells:
        if cell.result is not None and cell.result.evaluation.texts:
            points = found.setdefault((cell.method, cell.rebuilt), {})
            points.setdefault(cell.target, []).append(cell.result.evaluation.texts[0].perplexity)
    return {row: {target: _mean(values) for target, values in points.items()} for row, points in found.items()}


def notes(comparison: Comparison) -> list[str]:
    """What the numbers depend on, and what could not be done, a sentence each."""
    settings = comparison.settings
    seeds = ", ".join(map(str, settings["seeds"]))
    found = [
        f"Model: {comparison.model}.",
        f"Calibration: {settings['calibration']}, {settings['samples']} windows of {settings['seqlen']} tokens, "
        f"seed{'s' if len(settings['seeds']) > 1 else ''} {seeds}"
        + (" (mean ± sample standard deviation over seeds)." if len(settings["seeds"]) > 1 else "."),
    ]
    found += [
        f"{text.text}: {text.windows} windows of {text.seqlen} tokens, "
        f"{'each with' if text.begins_with_bos else 'without'} BOS, "
        f"sha256 {text.sha256[:16]}; KL: mean Kullback-Leibler divergence of the pruned model's "
        "next-token distribution from the dense model's, nats a token."
        for text in comparison.dense.texts
    ]
    found += [
        f"{task.task}: accuracy on {task.examples} examples, {task.shots} shots, {task.source}; "
        f"standard error of the dense model's {100 * task.standard_error:.1f} %."
        for task in comparison.dense.tasks
        if task.metric == ACCURACY
    ]
    if settings["task_seeds"] is not None and settings["task_seeds"] < len(settings["seeds"]):
        measured = settings["seeds"][: settings["task_seeds"]]
        found.append(f"Tasks: calibration seed{'s' if len(measured) > 1 else ''} {', '.join(map(str, measured))} only.")
    swaps = dict.fromkeys(
        f"{TITLES[cell.method]}{' (N:M)' if ':' in cell.target else ''}: "
        f"within each {cell.result.granularity}, ratio {cell.result.rebuild_ratio:g}"
        for cell in comparison.cells
        if cell.rebuilt and cell.result and cell.result.rebuild_ratio is not None
    )
    if swaps:
        found.append(f"Rebuild: {'; '.join(swaps)}.")
    unchanged = dict.fromkeys(
        f"{TITLES[cell.method]} at {target_title(cell.target)}"
        for cell in comparison.cells
        if cell.rebuilt and cell.result and not cell.result.swapped
    )
    if unchanged:
        found.append(f"The rebuild swapped nothing: {'; '.join(unchanged)}.")
    found.append(
        "Seconds: of pruning, from the first layer read to the last written; peak memory: of the process meanwhile, "
        "with what it keeps to measure with; bold: the best of its block. "
        f"{comparison.dtype} on {comparison.device}; "
        + ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
        + "."
    )
    machines = dict.fromkeys(cell.result.machine or "not noted" for cell in comparison.cells if cell.result)
    found.append(f"Machine{'s' if len(machines) > 1 else ''}: {'; '.join(machines)}.")
    found += [f"Not done: {_title(cell)}: {cell.failure}." for cell in comparison.failures]
    return found


def markdown(comparison: Comparison) -> str:
    """The tables of all blocks, and the notes."""
    lines = [f"# {comparison.model}: methods side by side", ""]
    for block in blocks(comparison):
        lines += [f"## {block.title}", "", *markdown_table(["method", *headings(comparison)], block.rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(comparison)), ""])


def markdown_table(heads: Sequence[str], rows: Iterable[Row]) -> list[str]:
    """Lines of a table, the best in bold."""
    titles = [head.replace("|", "\\|") for head in heads]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for row in rows:
        cells = [f"**{cell}**" if best else cell for cell, best in zip(row.cells, row.best, strict=True)]
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    return lines


def comma_separated(comparison: Comparison) -> str:
    """A line a cell and metric of every number, for other programs (CSV)."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "rebuilt", "target", "seed", "text_or_task", "metric", "value", "standard_error"])
    for line in _numbers(comparison.dense):
        writer.writerow(["dense", False, "", "", *line])
    for cell in comparison.cells:
        if cell.result is None:
            continue
        result = cell.result
        where = [cell.method.value, cell.rebuilt, cell.target, cell.seed]
        own = {
            "sparsity": result.sparsity,
            "swapped": result.swapped,
            "seconds": round(result.seconds, 3),
            "peak_memory": result.peak_memory,
        }
        for line in [*(["", name, value, ""] for name, value in own.items()), *_numbers(result.evaluation)]:
            writer.writerow([*where, *line])
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


def _divergence(index: int, evaluation: Evaluation) -> float:
    compared = evaluation.texts[index].against
    return math.nan if compared is None else compared.divergence


def _percent(names: Sequence[str], evaluation: Evaluation) -> float | None:
    """Mean accuracy of some tasks."""
    found = [task.value for task in evaluation.tasks if task.task in names and task.metric == ACCURACY]
    return 100 * _mean(found) if found else None


def _known(column: Column, cells: Iterable[ComparisonCell]) -> list[float]:
    """A column's values of the cells that have one."""
    values = [column.value(cell.result.evaluation) for cell in cells if cell.result]
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_and_spread(values: Sequence[float], form: str, spread: bool = True) -> str:
    """Mean, ± sample standard deviation where there are several."""
    if not values:
        return "–"
    mean = _mean(values)
    if len(values) == 1 or not spread:
        return f"{mean:{form}}"
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:{form}} ± {deviation:{form}}"


def _title(cell: ComparisonCell) -> str:
    rebuilt = REBUILT if cell.rebuilt else ""
    return f"{TITLES[cell.method]}{rebuilt} at {target_title(cell.target)}, seed {cell.seed}"
