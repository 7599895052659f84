"""Command that forecasts a run.

It calls a function with its settings and shows the result; no logic.
"""

from typing import TYPE_CHECKING

from llm_barber.cli.app import command
from llm_barber.cli.options import JsonOption, QuietOption
from llm_barber.settings.plan import PlanConfig

if TYPE_CHECKING:
    from rich.console import Console

    from llm_barber.planning.forecast import Expected, Forecast

UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@command(
    PlanConfig,
    {"model": "MODEL_OR_CONFIG"},
    (
        "llm-barber plan meta-llama/Llama-3.1-8B",
        "llm-barber plan ./model --preset paper --samples 32 --seqlen 512 --json",
        "llm-barber plan ./config.json --tflops 400 --gbps 2",
    ),
    # Settings of `prune` that do not change a forecast.
    python_only=("output", "bos", "seed", "format", "overwrite", "resume", "report"),
)
def plan(config: PlanConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Forecast what prune will take: time, peak memory, least FLOPs, and bytes of weight files.

    It rehearses: a few layers of the model's shapes, with random weights, are pruned on this machine with a few windows
    of text, in a folder for temporary files, and the result is extended to all layers and windows. Only the
    configuration is read. That takes one to three minutes for 1.5 billion weights; let nothing else run meanwhile.
    With --tflops or --gbps nothing is rehearsed: the plan says how long a machine with these rates takes at least.
    """
    from llm_barber.cli.progress import ConsoleProgress

    with ConsoleProgress(quiet) as progress:
        from llm_barber.planning.plan import plan as run

        forecast = run(config, progress)
    if json:
        print(forecast.to_json(), end="")
    else:
        _show(forecast)


def _show(forecast: "Forecast") -> None:
    """Print a forecast."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    lines = [
        f"{forecast.model}: {forecast.architecture}, {forecast.layers} decoder layers, {forecast.parameters:,} "
        f"parameters, {forecast.weights:,} of them prunable",
        f"{forecast.settings}; {forecast.sequences} × {forecast.tokens} tokens, {forecast.dtype} on {forecast.device}",
        *(f"  {line}" for line in forecast.structure),
        f"work: at least {_amount(forecast.flops)}FLOPs of matrix products; {_amount(forecast.bytes_read)}B read, "
        f"{_amount(forecast.bytes_written)}B written",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
    if forecast.least_seconds is not None:
        console.print(f"time: at least {duration(forecast.least_seconds)} with these rates", soft_wrap=True)
    if forecast.expected is not None:
        _show_expected(console, forecast.expected)


def _show_expected(console: "Console", expected: "Expected") -> None:
    """Print the time and memory that were extended from a rehearsal."""
    from rich.table import Table

    windows = " and ".join(map(str, expected.windows))
    table = Table(title=f"on this machine, rehearsed with {expected.layers} layers and {windows} windows")
    table.add_column("stage")
    table.add_column("time", justify="right")
    for name, seconds in expected.stages.items():
        table.add_row(name, duration(seconds))
    table.add_section()
    table.add_row("all", duration(expected.seconds))
    console.print(table)
    on_device = "" if expected.device_memory is None else f", {expected.device_memory / 2**30:.1f} GiB of the GPU's"
    console.print(f"peak memory: {expected.host_memory / 2**30:.2f} GiB{on_device}", soft_wrap=True)


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
