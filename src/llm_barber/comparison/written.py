"""A comparison's files, and the sentences about what its numbers depend on."""

import csv
import io
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from llm_barber.checkpoint.durable import write_durably
from llm_barber.comparison.page import comparison_page, comparison_picture
from llm_barber.comparison.paired import ACCURACY, answers
from llm_barber.comparison.result import DENSE, Comparison
from llm_barber.comparison.tables import (
    PAIRED,
    TITLES,
    Row,
    TargetTable,
    headings,
    row_title,
    tables_by_target,
    target_title,
)
from llm_barber.evaluation.result import Evaluation


def write_files(comparison: Comparison, folder: Path) -> None:
    """Write `comparison.json`, `.csv`, `.md`, `.svg` and `.html`, each whole or not at all."""
    tables, sentences = tables_by_target(comparison), notes(comparison)
    contents = {
        "json": comparison.model_dump_json(indent=1) + "\n",
        "csv": comma_separated(comparison),
        "md": markdown(comparison),
        "svg": comparison_picture(comparison),
        "html": comparison_page(comparison, tables, sentences),
    }
    for ending, content in contents.items():
        path = folder / f"comparison.{ending}"
        if content is None:  # an earlier comparison had something to draw
            path.unlink(missing_ok=True)
        else:
            write_durably(path, content.encode())


def notes(comparison: Comparison) -> list[str]:
    """Sentences about all that the numbers depend on, and about the cells that could not be finished."""
    settings = comparison.settings
    seeds, of_seeds = _seeds(settings["seeds"]), settings["seeds"][: settings["task_seeds"]]
    lines = [
        f"Model: {comparison.model}.",
        f"Calibration: {settings['calibration']}, {settings['samples']} windows of {settings['seqlen']} tokens, {seeds}"
        + (" (mean ± sample standard deviation over seeds)." if len(settings["seeds"]) > 1 else "."),
    ]
    for text in comparison.dense.texts:
        lines.append(
            f"{text.text}: {text.windows} windows of {text.seqlen} tokens, "
            f"{'each with' if text.begins_with_bos else 'without'} BOS, sha256 {text.sha256[:16]}; KL: mean "
            "Kullback-Leibler divergence of the pruned model's next-token distribution from the dense model's, nats a "
            "token."
        )
    accuracies = [task for task in comparison.dense.tasks if task.metric == ACCURACY]
    for task in accuracies:
        lines.append(
            f"{task.task}: accuracy on {task.examples} examples, {task.shots} shots, {task.source}; standard error of "
            f"the dense model's {100 * task.standard_error:.1f} %."
        )
    if accuracies and of_seeds != settings["seeds"]:
        lines.append(f"Tasks: calibration {_seeds(of_seeds)} only.")
    if left_out := {task.task for task in accuracies} - answers([comparison.dense]).keys():
        lines.append(
            f"No differences paired by example on: {', '.join(sorted(left_out))}. Which of the dense model's answers "
            "are right is not known: the task scores probabilities."
        )
    lines += _notes_on_rebuilds(comparison)
    lines.append(
        "Seconds: pruning, from the first layer read to the last written. Peak memory: the whole process meanwhile, "
        "with the dense model's predictions. Bold in the tables of methods: the best of its column. "
        f"{comparison.dtype} on {comparison.device}; "
        + ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
        + "."
    )
    if machines := dict.fromkeys(cell.result.machine or "not noted" for cell in comparison.cells if cell.result):
        lines.append(f"Machine{'s' if len(machines) > 1 else ''}: {'; '.join(machines)}.")
    for cell in comparison.failures:
        title = f"{row_title(cell.method, cell.rebuilt)} at {target_title(cell.target)}, seed {cell.seed}"
        lines.append(f"Not done: {title}: {cell.failure}.")
    return lines


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _notes_on_rebuilds(comparison: Comparison) -> list[str]:
    """Sentences about the settings of the rebuilds, and about the rebuilds that changed nothing."""
    rebuilt = [(cell, cell.result) for cell in comparison.cells if cell.rebuilt and cell.result]
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
    wrap = partial(textwrap.fill, width=100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, *(wrap(f"- {note}") for note in notes(comparison)), ""])


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
    writer.writerows([DENSE, False, "", "", *line] for line in _numbers(comparison.dense))
    for cell in comparison.cells:
        if cell.result is not None:
            of_cell = [cell.method.value, cell.rebuilt, cell.target, cell.seed]
            pruning = cell.result.model_dump(include={"sparsity", "swapped", "seconds", "peak_memory"})
            writer.writerows([*of_cell, "", name, value, ""] for name, value in pruning.items())
            writer.writerows([*of_cell, *line] for line in _numbers(cell.result.evaluation))
    return file.getvalue()


def _numbers(evaluation: Evaluation) -> Iterable[list[object]]:
    for text in evaluation.texts:
        compared = text.against.model_dump(exclude={"perplexity"}) if text.against else {}
        for metric, value in {"perplexity": text.perplexity, **compared}.items():
            yield [text.text, metric, value, ""]
    for task in evaluation.tasks:
        yield [task.task, task.metric, task.value, task.standard_error]
