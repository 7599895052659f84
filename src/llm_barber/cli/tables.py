"""Tables of results on stdout: one function for each command."""

import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_barber.checkpoint.channel_order import ORDER_NAME
from llm_barber.checkpoint.companions import PAGE_NAME
from llm_barber.cli.progress import CONTROL
from llm_barber.comparison.result import Comparison
from llm_barber.comparison.tables import headings, tables_by_target
from llm_barber.comparison.written import notes
from llm_barber.evaluation.result import Evaluation
from llm_barber.messages import counted
from llm_barber.model.architecture import kind_of
from llm_barber.planning.forecast import Forecast
from llm_barber.record.report import RunReport
from llm_barber.run.dry_run import DryRun
from llm_barber.settings.tools import DemoConfig, GenerateConfig
from llm_barber.tools.demo import PICTURE, DemoRow, next_commands
from llm_barber.tools.generation import GeneratedText, Generation, Speed
from llm_barber.tools.inspection import Inspection, LinearInspection
from llm_barber.tools.packing import PackReport
from llm_barber.usage import readable_bytes

NOTHING = "–"
UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _print(*parts: str | Table, stderr: bool = False) -> None:
    """Print lines and tables; lines are not wrapped, so that paths can be copied."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def _table(headings: Iterable[str], rows: Iterable[Sequence[str | Text]], title: str | None = None) -> Table:
    """A table whose columns but the first are aligned to the right."""
    table = Table(title=None if title is None else Text(title))
    for number, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def show_run(report: RunReport) -> None:
    """Print the result of a run: totals by kind of linear, reconstruction errors, time and memory."""
    counts = f"{report.pruned:,} of {report.weights:,} weights pruned ({report.sparsity:.2%})"
    titles = ["linear", "sparsity", "swapped", *(["of beneficial pairs"] if report.granularity else [])]
    improved = report.granularity or report.refinement
    rows = []
    for total in report.by_linear():
        swapped = f"{total.grown:,}" if improved else NOTHING
        rows.append((total.name, f"{total.sparsity:.2%}", swapped, f"{total.beneficial_pairs:,}"))
    _print(
        f"{report.output}: {counts}",
        _table(titles, [row[: len(titles)] for row in rows]),
        f"{report.method}; {report.changes}",
    )
    changes = [
        f"{name} {change.before:.4g} → {change.after:.4g} (fell in {change.fell} of {change.layers} layers)"
        for name, change in report.error_changes().items()
    ]
    if changes and improved:
        measured_from = ", from the dense block on the pruned model's activations" if report.tuning else ""
        _print(f"mean reconstruction error{measured_from}: {', '.join(changes)}")
    if report.tuning is not None:
        _print(report.tuning)
    _print(
        f"{report.seconds['total']:.1f} s, peak memory {report.peak_memory / 2**30:.2f} GiB, "
        f"{report.dtype} on {report.device}",
        f"check it: llm-barber inspect {shlex.quote(str(report.output))}",
    )
    if report.settings.get("report"):
        _print(f"look at it: {Path(report.output) / PAGE_NAME}")


def show_dry_run(dry_run: DryRun) -> None:
    """Print the description of a run that was not made."""
    table = Table(title=f"would write {dry_run.output}; nothing was written", show_header=False)
    for key, value in dry_run.rows():
        table.add_row(key, value)
    _print(table)


def show_forecast(forecast: Forecast) -> None:
    """Print a forecast: the model, its work, and the time and memory that were extended from a rehearsal."""
    _print(
        f"{forecast.model}: {forecast.architecture}, {forecast.layers} decoder layers, {forecast.parameters:,} "
        f"parameters, {forecast.weights:,} of them prunable",
        f"{forecast.settings}; {forecast.sequences} × {forecast.tokens} tokens, {forecast.dtype} on {forecast.device}",
        *(f"  {line}" for line in forecast.structure),
        f"work: at least {_amount(forecast.flops)}FLOPs of matrix products; {_amount(forecast.bytes_read)}B read, "
        f"{_amount(forecast.bytes_written)}B written",
    )
    if forecast.least_seconds is not None:
        _print(f"time: at least {duration(forecast.least_seconds)} with these rates")
    if (expected := forecast.expected) is not None:
        windows = " and ".join(map(str, expected.windows))
        rows = [(name, duration(seconds)) for name, seconds in {**expected.stages, "all": expected.seconds}.items()]
        title = f"on this machine, rehearsed with {expected.layers} layers and {windows} windows"
        on_device = "" if expected.device_memory is None else f", {expected.device_memory / 2**30:.1f} GiB of the GPU's"
        table = _table(("stage", "time"), rows, title)
        _print(table, f"peak memory: {expected.host_memory / 2**30:.2f} GiB{on_device}")


def _amount(value: float) -> str:
    """Format a number with three digits and a prefix, to be followed by a unit.

    Example: 16.1e9 -> "16.1 G", 12 -> "12 ".
    """
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} "


def duration(seconds: float) -> str:
    """Format seconds in a unit that suits them.

    Example: 8.31 -> "8.3 s", 720 -> "12 min", 12240 -> "3.4 h".
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_inspection(inspection: Inspection) -> None:
    """Print sparsity by layer and linear, patterns, and the verdict."""
    names = list(dict.fromkeys(kind_of(linear.name) for linear in inspection.linears))
    rows = []
    for index in dict.fromkeys(linear.layer for linear in inspection.linears):
        layer = [linear for linear in inspection.linears if linear.layer == index]
        common = set.intersection(*(set(linear.patterns) for linear in layer))
        zeros = [_share_of_zeros([linear for linear in layer if kind_of(linear.name) == name]) for name in names]
        rows.append((str(index), *zeros, " ".join(sorted(common)) or NOTHING))
    title = f"{inspection.model}: share of zeros in linears {inspection.sparsity:.4%}"
    _print(
        _table(("layer", *map(_short, names), "patterns"), rows, title),
        f"N:M that hold in every linear (N kept of M): {', '.join(inspection.patterns) or 'none'}",
        *_verdict(inspection),
    )


def _verdict(inspection: Inspection) -> list[str]:
    """Lines that say what a checkpoint was compared with, and what differs by right."""
    lines, dense = [], inspection.compared_with
    if dense is not None:
        natural = sum(linear.zero_in_dense or 0 for linear in inspection.linears)
        lines.append(f"weights that are zero in {dense} too: {natural:,}")
    if inspection.reordered:
        lines.append(f"channels of {dense} were put in the order of {ORDER_NAME}")
    if inspection.rounding is not None:
        lines.append(f"kept weights are {inspection.rounding.words}")
    if inspection.fine_tuned:
        lines.append(f"fine-tuned after pruning: {inspection.fine_tuned} tensors")
    if not inspection.record and dense is None:
        lines.append("no record (barber.json) and no --dense: nothing to check against")
    elif not inspection.problems:
        against = [*(["its record"] if inspection.record else []), *filter(None, [dense])]
        rounded = ", rounded" if inspection.rounding is not None and dense is not None else ""
        lines.append(f"agrees with {' and '.join(against)}{rounded}")
    if inspection.updated is not None:
        kept = sum(linear.weights - linear.zeros for linear in inspection.linears)
        lines.append(
            f"{inspection.updated:,} of {kept:,} kept weights are not those of {dense}, as the record says: where "
            "weights were changed, only zeros and shapes were compared"
        )
    return lines


def _share_of_zeros(linears: list[LinearInspection]) -> str:
    """Format the share of zeros in the weights of some linears."""
    weights = sum(linear.weights for linear in linears)
    return f"{sum(linear.zeros for linear in linears) / weights:.2%}" if weights else NOTHING


def _short(linear: str) -> str:
    """Shorten a linear's name to a heading.

    Example: self_attn.q_proj -> q, attn.c_attn -> c_attn; mlp.c_proj stays, as c alone would say nothing.
    """
    last = linear.rpartition(".")[2]
    return last.removesuffix("_proj") if last != "c_proj" else linear


def show_evaluation(evaluation: Evaluation) -> None:
    """Print perplexities, task accuracies, and the texts, dtype and device that they depend on."""
    computed = f"{evaluation.dtype} on {evaluation.device}"
    both = evaluation.against is not None
    if evaluation.texts:
        rows = []
        for result in evaluation.texts:
            row, other = [result.text, f"{result.perplexity:.3f}"], result.against
            if other is not None:
                row += [f"{other.perplexity:.3f}", f"{other.perplexity_ratio:.4f}"]
                row += [f"{other.divergence:.4f}", f"{other.top_agreement:.2%}"]
            rows.append(row)
        compared = ("against", "ratio", "KL divergence", "same next token") if both else ()
        title = f"perplexity of {evaluation.model} (lower is better)"
        _print(_table(("text", "perplexity", *compared), rows, title))
    if both:
        _print(f"against: {evaluation.against}")
    if evaluation.tasks:
        rows = []
        for task in evaluation.tasks:
            value = f"{task.value:.3f} ± {task.standard_error:.3f}"
            row = [task.task, task.metric, value, str(task.examples)]
            if task.against is not None:
                difference = f"{task.against.difference:+.3f} ± {task.against.standard_error:.3f}"
                row += [f"{task.against.value:.3f}", difference]
            rows.append(row)
        title = f"accuracy of {evaluation.model} (higher is better, ± standard error)"
        differences = ("against", "difference") if both else ()
        _print(_table(("task", "metric", "value", "examples", *differences), rows, title))
    sources = [
        f"{task.task}: {task.source}, {task.shots} shots{f', sha256 {task.sha256[:16]}' if task.sha256 else ''}, "
        f"{computed}"
        for task in evaluation.tasks
    ]
    _print(*dict.fromkeys(sources))
    for result in evaluation.texts:
        bos = "each with" if result.begins_with_bos else "without"
        windows = f"{result.windows} windows of {result.seqlen} tokens, {bos} BOS"
        _print(f"{result.text}: {windows}, {computed}, sha256 {result.sha256[:16]}")


def show_comparison(comparison: Comparison, folder: Path) -> None:
    """Print the tables of a comparison, its notes, and the path of its page."""
    for part in tables_by_target(comparison):
        rows: list[list[str | Text]] = [
            [row.title, *(Text(cell, "bold" if best else "") for cell, best in zip(row.cells, row.best, strict=True))]
            for row in part.rows
        ]
        _print(_table(("method", *headings(comparison)), rows, f"{part.title}: {comparison.model}"))
    _print(*notes(comparison), f"tables, plot and page: {folder / 'comparison.html'}")


def show_packing(report: PackReport, unpacks: bool) -> None:
    """Print the size of the packed or unpacked model beside the size before, and the rounding."""
    packed = ", ".join(f"{count} as {encoding}" for encoding, count in report.packed.items()) or "none"
    matrices = f"matrices that were packed: {packed}; dense before" if unpacks else f"packed matrices: {packed}; dense"
    _print(
        f"{report.output}: {readable_bytes(report.bytes_after)}, {report.bytes_after / report.bytes_before:.1%} of "
        f"{readable_bytes(report.bytes_before)}; {matrices}: {report.left_dense}"
    )
    if report.rounding is not None:
        warning = "this is not the model that was packed" if unpacks else "this is another model than the one packed"
        _print(f"{warning}: kept weights are {report.rounding.words}")


def show_demo(config: DemoConfig, rows: list[DemoRow]) -> None:
    """Print the table of the demonstration, each model with its command, and commands to type next."""
    cells = [
        (
            row.name,
            f"{row.perplexity:.2f}",
            f"{row.sparsity:.1%}",
            NOTHING if row.seconds is None else f"{row.seconds:.1f}",
            NOTHING if row.peak_memory is None else f"{row.peak_memory / 2**30:.2f} GiB",
        )
        for row in rows
    ]
    titles = ("model", "perplexity", "sparsity", "seconds", "peak memory")
    _print(_table(titles, cells, "perplexity on held-out WikiText-2 windows (lower is better)"))
    for row in rows:
        _print(f"{row.name} ({row.folder}): {row.description}", f"  {row.sentence}")
        if row.arguments:
            _print(f"  $ {_command(row.arguments)}")
    _print(f"picture: {config.output / PICTURE}", f"page of the last run: {Path(rows[-1].folder) / PAGE_NAME}", "next:")
    for purpose, arguments in next_commands(config, rows):
        _print(f"  # {purpose}", f"  $ {_command(arguments)}")


def _command(arguments: tuple[str, ...]) -> str:
    """Make a command line that the user's shell understands, with the program as the shell finds it."""
    program, name = sys.argv[0], "llm-barber"
    if Path(program).name != name:
        return shlex.join([sys.executable, "-m", "llm_barber", *arguments])
    installed = shutil.which(name)
    on_path = installed is not None and Path(installed).exists() and Path(installed).samefile(program)
    return shlex.join([name if on_path else program, *arguments])


def show_generation(generation: Generation, config: GenerateConfig) -> None:
    """Print speed and memory of one model on stderr, or two models on stdout."""
    if config.against is None:
        _show_speed(generation, config.max_new_tokens)
    else:
        _show_both(generation)


def _show_speed(generation: Generation, most_tokens: int) -> None:
    """End the line of the text, and print speed and memory below it, on stderr.

    `most_tokens`: that the text was allowed to have.
    """
    result = generation.generated
    if not result.text.endswith("\n"):
        print(flush=True)
    lines = [""]
    if not result.text.strip():
        lines.append("the model wrote no text")
    elif not result.ended and not generation.interrupted:
        full = len(result.tokens) < most_tokens
        reason = "the model's context is full" if full else "--max-new-tokens lets it write more"
        lines.append(f"stopped after {counted(len(result.tokens), 'token')}: {reason}")
    for name, speed in (("prefill", result.prefill), ("decode", result.decode)):
        if speed is not None:
            lines.append(f"{name}: {counted(speed.tokens, 'token')} at {speed.per_second:,.1f} tokens/s")
    grown = "" if result.peak_memory is None else f"; the process grew by {readable_bytes(result.peak_memory)}"
    lines.append(f"memory: weights {readable_bytes(result.weight_bytes)}{grown}")
    _print(*lines, _computed(generation), stderr=True)


def _show_both(generation: Generation) -> None:
    """Print both texts side by side, a table of speeds and memory with ratios, and what they were measured on."""
    results = [result for result in (generation.generated, generation.against) if result is not None]
    names = [result.model for result in results]
    texts = Table(show_lines=True)
    for name in names:
        texts.add_column(Text(name), ratio=1, overflow="fold")
    texts.add_row(*(Text(_shown(result)) for result in results))

    def row(title: str, values: Sequence[float | None], readable: Callable[[float], str]) -> list[str]:
        """A value of each model, and the first model's share of the second's."""
        cells = [NOTHING if value is None else readable(value) for value in values]
        if len(values) > 1:
            first, second = values
            cells.append(f"{first / second:.2f}" if first is not None and second else NOTHING)
        return [title, *cells]

    def speeds(name: str) -> list[float | None]:
        measured: list[Speed | None] = [getattr(result, name) for result in results]
        return [None if speed is None else speed.per_second for speed in measured]

    rows = [
        row("decode, tokens/s", speeds("decode"), lambda value: f"{value:,.1f}"),
        row("prefill, tokens/s", speeds("prefill"), lambda value: f"{value:,.1f}"),
        row("weights", [result.weight_bytes for result in results], readable_bytes),
        row("memory growth", [result.peak_memory for result in results], readable_bytes),
    ]
    table = _table(("", *names, *(["ratio"] if len(results) > 1 else [])), rows)
    _print(texts, table, *_notes(generation))


def _notes(generation: Generation) -> list[str]:
    """Lines that say on what the numbers were measured."""
    template = " with the chat template" if generation.chat else ""
    prefill, decoding = generation.generated.prefill, generation.generated.decode
    rounds, tokens = len(prefill.seconds), 1 + (decoding.tokens if decoding else 0)
    times = f"fastest of {rounds} rounds" if rounds > 1 else "one round"
    return [
        f"prompt: {counted(prefill.tokens, 'token')}{template}",
        f"speeds: {times} of {counted(tokens, 'token')}, in turn",
        _computed(generation),
    ]


def _computed(generation: Generation) -> str:
    result = generation.generated
    packed = f"; {result.packed_linears:,} of {result.linears:,} linears packed in memory"
    return f"{generation.dtype} on {generation.machine}{packed if result.packed_linears else ''}"


def _shown(result: GeneratedText) -> str:
    """A model's text for a cell; it ends with an ellipsis if the model did not end it."""
    text = CONTROL.sub("\ufffd", result.text.strip())
    if not text:
        return "(no text)"
    return text if result.ended else f"{text} …"
