"""A comparison as Markdown and as CSV, and the sentences about what its numbers depend on."""

import csv
import io
from collections.abc import Iterable, Sequence

from llm_barber.comparison.paired import ACCURACY, answers, tasks_without_answers
from llm_barber.comparison.result import DENSE, Comparison, ComparisonCell
from llm_barber.comparison.tables import (
    PAIRED,
    TITLES,
    Row,
    TargetTable,
    cells_by_row,
    differences_on_tasks,
    evaluations_by_row,
    headings,
    row_title,
    tables_by_target,
    target_title,
)
from llm_barber.evaluation.result import Evaluation


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
        "with the dense model's predictions. Bold in the tables of methods: the best of its column. "
        f"{comparison.dtype} on {comparison.device}; "
        + ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
        + ".",
    ]
    if left_out := tasks_without_answers(comparison.dense):
        lines.append(
            f"No differences paired by example on: {', '.join(sorted(left_out))}. Which of the dense model's answers "
            "are right is not known: the task scores probabilities, or an earlier version kept no answers."
        )
    if unpaired := _rows_without_answers(comparison):
        lines.append(
            f"Without differences on tasks: {', '.join(unpaired)}. Their cells are of a version that kept no answers "
            "by example; remove them to measure again."
        )
    machines = dict.fromkeys(cell.result.machine or "not noted" for cell in comparison.cells if cell.result)
    if machines:
        lines.append(f"Machine{'s' if len(machines) > 1 else ''}: {'; '.join(machines)}.")
    return lines + [f"Not done: {_title(cell)}: {cell.failure}." for cell in comparison.failures]


def _rows_without_answers(comparison: Comparison) -> list[str]:
    """Titles of the rows that a table of differences lacks, although they were measured on tasks."""
    titles: dict[str, None] = {}
    left_out = tasks_without_answers(comparison.dense)
    for target in dict.fromkeys(cell.target for cell in comparison.cells):
        evaluations = evaluations_by_row(comparison, target)
        measured = {title: row for title, row in evaluations.items() if any(each.tasks for each in row)}
        found = {title: answers(row, left_out) for title, row in measured.items()}
        if any(found.values()):
            titles |= dict.fromkeys(title for title, row_answers in found.items() if row_answers is None)
    return list(titles)


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
        lines += section(table, headings(comparison))
    return "\n".join([*lines, *(f"- {note}" for note in notes(comparison)), ""])


def section(table: TargetTable, headings: Sequence[str]) -> list[str]:
    """Lines of Markdown: a target's table and, where its rows have answers to tasks, their differences."""
    lines = [f"## {table.title}", "", *markdown_table(["method", *headings], table.rows), ""]
    if table.paired:
        lines += [PAIRED, "", *markdown_table(["row − column", *table.paired.headings], table.paired.rows), ""]
    return lines


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
        writer.writerow([DENSE, False, "", "", *line])
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
    for target in dict.fromkeys(cell.target for cell in comparison.cells):
        first = {title: cells[0] for title, cells in cells_by_row(comparison, target).items()}
        for (title, earlier), difference in differences_on_tasks(comparison, target).items():
            cell, other = first[title], first.get(earlier)
            less = DENSE if other is None else f"{other.method.value}{'-rebuilt' * other.rebuilt}"
            line = [f"{ACCURACY}_less_{less}", difference.mean, difference.standard_error]
            writer.writerow([cell.method.value, cell.rebuilt, target, "", "mean of tasks", *line])
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


def _title(cell: ComparisonCell) -> str:
    return f"{row_title(cell)} at {target_title(cell.target)}, seed {cell.seed}"
