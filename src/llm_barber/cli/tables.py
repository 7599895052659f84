"""Tables of results on stdout: one function for each command."""

import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llm_barber.checkpoint.channel_order import ORDER_NAME
from llm_barber.checkpoint.companions import PAGE_NAME
from llm_barber.comparison.result import Comparison
from llm_barber.comparison.tables import headings, tables_by_target
from llm_barber.comparison.written import notes
from llm_barber.evaluation.result import Evaluation
from llm_barber.model.architecture import kind_of
from llm_barber.record.report import RunReport
from llm_barber.run.dry_run import DryRun
from llm_barber.settings.demo import DemoConfig
from llm_barber.tools.demo import PICTURE, DemoRow, next_commands
from llm_barber.tools.inspection import Inspection, LinearInspection
from llm_barber.tools.packing import PackReport
from llm_barber.usage import readable_bytes


def show_run(report: RunReport) -> None:
    """Print the result of a run: totals by kind of linear, reconstruction errors, time and memory."""
    console = Console(highlight=False, markup=False)
    counts = f"{report.pruned:,} of {report.weights:,} weights pruned ({report.sparsity:.2%})"
    console.print(f"{report.output}: {counts}", soft_wrap=True)
    table = Table()
    headings = ["linear", "sparsity", "swapped", *(["of beneficial pairs"] if report.granularity else [])]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "linear" else "right")
    for total in report.by_linear():
        swapped = f"{total.grown:,}" if report.granularity or report.refinement else "–"
        row = [total.name, f"{total.sparsity:.2%}", swapped, f"{total.beneficial_pairs:,}"]
        table.add_row(*row[: len(headings)])
    console.print(table)
    console.print(f"{report.method}; {report.changes}", soft_wrap=True)
    changes = [
        f"{name} {change.before:.4g} → {change.after:.4g} (fell in {change.fell} of {change.layers} layers)"
        for name, change in report.error_changes().items()
    ]
    if changes and (report.granularity or report.refinement):
        measured_from = ", from the dense block on the pruned model's activations" if report.tuning else ""
        console.print(f"mean reconstruction error{measured_from}: {', '.join(changes)}", soft_wrap=True)
    if report.tuning is not None:
        console.print(report.tuning, soft_wrap=True)
    console.print(
        f"{report.seconds['total']:.1f} s, peak memory {report.peak_memory / 2**30:.2f} GiB, "
        f"{report.dtype} on {report.device}"
    )
    console.print(f"check it: llm-barber inspect {shlex.quote(str(report.output))}", soft_wrap=True)
    if report.settings.get("report"):
        console.print(f"look at it: {Path(report.output) / PAGE_NAME}", soft_wrap=True)


def show_dry_run(dry_run: DryRun) -> None:
    """Print the description of a run that was not made."""
    console = Console(highlight=False, markup=False)
    table = Table(title=f"would write {dry_run.output}; nothing was written", show_header=False)
    for key, value in dry_run.rows():
        table.add_row(key, value)
    console.print(table)


def show_inspection(inspection: Inspection) -> None:
    """Print sparsity by layer and linear, patterns, and the verdict."""
    console = Console(highlight=False, markup=False)
    names = list(dict.fromkeys(kind_of(linear.name) for linear in inspection.linears))
    table = Table(title=f"{inspection.model}: share of zeros in linears {inspection.sparsity:.4%}")
    table.add_column("layer", justify="right")
    for name in names:
        table.add_column(_short(name), justify="right")
    table.add_column("patterns")
    for index in dict.fromkeys(linear.layer for linear in inspection.linears):
        layer = [linear for linear in inspection.linears if linear.layer == index]
        common = set.intersection(*(set(linear.patterns) for linear in layer))
        table.add_row(
            str(index),
            *(_share_of_zeros([linear for linear in layer if kind_of(linear.name) == name]) for name in names),
            " ".join(sorted(common)) or "–",
        )
    console.print(table)
    console.print(f"N:M that hold in every linear (N kept of M): {', '.join(inspection.patterns) or 'none'}")
    if inspection.compared_with is not None:
        natural = sum(linear.zero_in_dense or 0 for linear in inspection.linears)
        console.print(f"weights that are zero in {inspection.compared_with} too: {natural:,}", soft_wrap=True)
    if inspection.reordered:
        console.print(f"channels of {inspection.compared_with} were put in the order of {ORDER_NAME}", soft_wrap=True)
    if inspection.rounding is not None:
        console.print(f"kept weights are {inspection.rounding.words}", soft_wrap=True)
    if inspection.fine_tuned:
        console.print(f"fine-tuned after pruning: {inspection.fine_tuned} tensors", soft_wrap=True)
    if not inspection.record and inspection.compared_with is None:
        console.print("no record (barber.json) and no --dense: nothing to check against")
    elif not inspection.problems:
        against = [*(["its record"] if inspection.record else []), *filter(None, [inspection.compared_with])]
        rounded = ", rounded" if inspection.rounding is not None and inspection.compared_with is not None else ""
        console.print(f"agrees with {' and '.join(against)}{rounded}", soft_wrap=True)
    if inspection.updated is not None:
        kept = sum(linear.weights - linear.zeros for linear in inspection.linears)
        console.print(
            f"{inspection.updated:,} of {kept:,} kept weights are not those of {inspection.compared_with}, as the "
            "record says: where weights were changed, only zeros and shapes were compared",
            soft_wrap=True,
        )


def show_evaluation(evaluation: Evaluation) -> None:
    """Print perplexities, task accuracies, and the texts, dtype and device that they depend on."""
    console = Console(highlight=False, markup=False)
    table = Table(title=f"perplexity of {evaluation.model} (lower is better)")
    headings = ["text", "perplexity"]
    if evaluation.against is not None:
        headings += ["against", "ratio", "KL divergence", "same next token"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for result in evaluation.texts:
        cells = [result.text, f"{result.perplexity:.3f}"]
        if result.against is not None:
            compared = result.against
            cells += [
                f"{compared.perplexity:.3f}",
                f"{compared.perplexity_ratio:.4f}",
                f"{compared.divergence:.4f}",
                f"{compared.top_agreement:.2%}",
            ]
        table.add_row(*cells)
    if evaluation.texts:
        console.print(table)
    if evaluation.against is not None:
        console.print(f"against: {evaluation.against}", soft_wrap=True)
    _show_tasks(console, evaluation)
    for result in evaluation.texts:
        console.print(
            f"{result.text}: {result.windows} windows of {result.seqlen} tokens, "
            f"{'each with' if result.begins_with_bos else 'without'} BOS, {evaluation.dtype} on {evaluation.device}, "
            f"sha256 {result.sha256[:16]}",
            soft_wrap=True,
        )


def _show_tasks(console: Console, evaluation: Evaluation) -> None:
    """Print the accuracy of each task, and the tasks' sources."""
    if not evaluation.tasks:
        return
    table = Table(title=f"accuracy of {evaluation.model} (higher is better, ± standard error)")
    headings = ["task", "metric", "value", "examples"]
    if evaluation.against is not None:
        headings += ["against", "difference"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task in evaluation.tasks:
        cells = [task.task, task.metric, f"{task.value:.3f} ± {task.standard_error:.3f}", str(task.examples)]
        if task.against is not None:
            compared = task.against
            cells += [f"{compared.value:.3f}", f"{compared.difference:+.3f} ± {compared.standard_error:.3f}"]
        table.add_row(*cells)
    console.print(table)
    for source in dict.fromkeys(
        f"{task.task}: {task.source}, {task.shots} shots"
        + (f", sha256 {task.sha256[:16]}" if task.sha256 else "")
        + f", {evaluation.dtype} on {evaluation.device}"
        for task in evaluation.tasks
    ):
        console.print(source, soft_wrap=True)


def show_comparison(comparison: Comparison, folder: Path) -> None:
    """Print the tables of a comparison, its notes, and the path of its page."""
    console = Console(highlight=False)
    for part in tables_by_target(comparison):
        table = Table(title=escape(f"{part.title}: {comparison.model}"))
        table.add_column("method")
        for heading in headings(comparison):
            table.add_column(escape(heading), justify="right")
        for row in part.rows:
            cells = [f"[bold]{cell}[/]" if best else cell for cell, best in zip(row.cells, row.best, strict=True)]
            table.add_row(row.title, *cells)
        console.print(table)
    for note in notes(comparison):
        console.print(note, soft_wrap=True, markup=False)
    console.print(f"tables, plot and page: {folder / 'comparison.html'}", soft_wrap=True, markup=False)


def show_packing(report: PackReport, unpacks: bool) -> None:
    """Print the size of the packed or unpacked model beside the size before, and the rounding."""
    console = Console(highlight=False, markup=False)
    packed = ", ".join(f"{count} as {encoding}" for encoding, count in report.packed.items()) or "none"
    matrices = f"matrices that were packed: {packed}; dense before" if unpacks else f"packed matrices: {packed}; dense"
    console.print(
        f"{report.output}: {readable_bytes(report.bytes_after)}, {report.bytes_after / report.bytes_before:.1%} of "
        f"{readable_bytes(report.bytes_before)}; {matrices}: {report.left_dense}",
        soft_wrap=True,
    )
    if report.rounding is not None:
        warning = "this is not the model that was packed" if unpacks else "this is another model than the one packed"
        console.print(f"{warning}: kept weights are {report.rounding.words}", soft_wrap=True)


def show_demo(config: DemoConfig, rows: list[DemoRow]) -> None:
    """Print the table of the demonstration, each model with its command, and commands to type next."""
    console = Console(highlight=False, markup=False)
    table = Table(title="perplexity on held-out WikiText-2 windows (lower is better)")
    for heading in ("model", "perplexity", "sparsity", "seconds", "peak memory"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.perplexity:.2f}",
            f"{row.sparsity:.1%}",
            "–" if row.seconds is None else f"{row.seconds:.1f}",
            "–" if row.peak_memory is None else f"{row.peak_memory / 2**30:.2f} GiB",
        )
    console.print(table)
    for row in rows:
        console.print(f"{row.name} ({row.folder}): {row.description}", style="bold", soft_wrap=True)
        console.print(f"  {row.sentence}", soft_wrap=True)
        if row.arguments:
            console.print(f"  $ {_command(row.arguments)}", soft_wrap=True)
    console.print(f"picture: {config.output / PICTURE}", soft_wrap=True)
    console.print(f"page of the last run: {Path(rows[-1].folder) / PAGE_NAME}", soft_wrap=True)
    console.print("next:", style="bold")
    for purpose, arguments in next_commands(config, rows):
        console.print(f"  # {purpose}", soft_wrap=True)
        console.print(f"  $ {_command(arguments)}", soft_wrap=True)


def _command(arguments: tuple[str, ...]) -> str:
    """Make a command line that the user's shell understands, with the program as the shell finds it."""
    program, name = sys.argv[0], "llm-barber"
    if Path(program).name != name:
        return shlex.join([sys.executable, "-m", "llm_barber", *arguments])
    installed = shutil.which(name)
    on_path = installed is not None and Path(installed).exists() and Path(installed).samefile(program)
    return shlex.join([name if on_path else program, *arguments])


def _share_of_zeros(linears: list[LinearInspection]) -> str:
    """Format the share of zeros in the weights of some linears."""
    weights = sum(linear.weights for linear in linears)
    return f"{sum(linear.zeros for linear in linears) / weights:.2%}" if weights else "–"


def _short(linear: str) -> str:
    """Shorten a linear's name to a heading.

    Example: self_attn.q_proj -> q, attn.c_attn -> c_attn; mlp.c_proj stays, as c alone would say nothing.
    """
    last = linear.rpartition(".")[2]
    return last.removesuffix("_proj") if last != "c_proj" else linear
