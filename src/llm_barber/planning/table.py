"""Print a plan: the work of each stage, then time and memory for each number of processes."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from llm_barber.messages import counted
from llm_barber.planning.forecast import Forecast, ProcessesForecast, StageForecast

# Names of the stages, wherever people read them; `Costs` and JSON have the keys.
STAGE_NAMES = {
    "embed": "embed, copy what is outside the layers", "reorder": "reorder channels",
    "allocate": "allocate the sparsity", "initial": "initial mask",
    "rebuild": "rebuild", "refine": "refine", "tune": "tune", "propagate": "propagate", "read": "read",
    "write": "write", "keep": "keep activations for --resume", "head": "output head",
}  # fmt: skip
UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show_forecast(forecast: Forecast) -> None:
    """Print a forecast."""
    console = Console(highlight=False, markup=False)
    console.print(
        f"{forecast.model}: {forecast.architecture}, {forecast.layers} decoder layers, {forecast.parameters:,} "
        f"parameters, {forecast.weights:,} of them prunable\n{forecast.settings}; {forecast.sequences} × "
        f"{forecast.tokens} tokens, {forecast.dtype} on {forecast.device}, "
        f"{counted(forecast.batch_size, 'window')} at a time",
        soft_wrap=True,
    )
    for line in forecast.structure:
        console.print(f"  {line}", soft_wrap=True)
    console.print(_stages_table(forecast.runs[0]))
    console.print(_processes_table(forecast.runs))
    if forecast.runs[0].device_memory is not None:
        sizes = ", ".join(f"{run.on_device / 2**30:.1f}" for run in forecast.runs)
        console.print(f"activations that stay on the device are counted there: {sizes} GiB", soft_wrap=True)
    console.print(_rates_line(forecast), soft_wrap=True)


def _stages_table(run: ProcessesForecast) -> Table:
    busiest = "" if run.processes == 1 else f", the busiest of {run.processes} processes"
    table = Table(title=f"work by stage{busiest}")
    for heading in ("stage", "FLOPs", "read", "written", "time", "mostly"):
        table.add_column(heading, justify="left" if heading in ("stage", "mostly") else "right")
    for stage in run.stages:
        if stage.seconds or stage.bytes_written:
            table.add_row(STAGE_NAMES[stage.name], *stage_cells(stage))
    table.add_section()
    table.add_row(
        "all",
        amount(sum(stage.flops for stage in run.stages)),
        f"{amount(sum(stage.bytes_read for stage in run.stages))}B",
        f"{amount(sum(stage.bytes_written for stage in run.stages))}B",
        duration(run.seconds),
        run.bottleneck,
    )
    return table


def _processes_table(runs: Sequence[ProcessesForecast]) -> Table:
    table = Table(title="time and memory of each process" if len(runs) > 1 else None)
    with_device = runs[0].device_memory is not None
    with_files = any(run.in_files for run in runs)
    headings = ["processes", "time", "speed-up", "host memory", *(["in files"] if with_files else [])]
    headings += ["device memory"] if with_device else []
    for heading in (*headings, "bottleneck"):
        table.add_column(heading, justify="left" if heading == "bottleneck" else "right")
    for run in runs:
        device = [] if run.device_memory is None else [f"{run.device_memory / 2**30:.1f} GiB"]
        files = [f"{run.in_files / 2**30:.1f} GiB"] if with_files else []
        table.add_row(
            str(run.processes), duration(run.seconds), f"{runs[0].seconds / run.seconds:.2f}",
            f"{run.host_memory / 2**30:.1f} GiB", *files, *device, run.bottleneck,
        )  # fmt: skip
    return table


def _rates_line(forecast: Forecast) -> str:
    rates = forecast.rates
    several = any(run.processes > 1 for run in forecast.runs)
    network = f", {amount(rates['reduced'])}B/s between processes" if several else ""
    on_gpu = forecast.runs[0].device_memory is not None
    launches = f", {rates['launches']:,.0f} kernels/s started" if on_gpu else ""
    return (
        f"{'this machine, as measured just now' if forecast.measured else 'a machine with'}: "
        f"{amount(rates['products'])}FLOP/s, {amount(rates['grams'])}FLOP/s of Gram matrices, "
        f"{amount(rates['moved'])}B/s of memory, {amount(rates['copied'])}B/s to the device, "
        f"{amount(rates['read'])}B/s read, {amount(rates['written'])}B/s written{network}{launches}"
    )


def stage_cells(stage: StageForecast) -> tuple[str, str, str, str, str]:
    """A stage's FLOPs, bytes read and written, time, and its main resource; a dash for nothing."""
    kinds = stage.seconds_by_kind
    return (
        amount(stage.flops) if stage.flops else "–",
        f"{amount(stage.bytes_read)}B" if stage.bytes_read else "–",
        f"{amount(stage.bytes_written)}B" if stage.bytes_written else "–",
        duration(stage.seconds) if stage.seconds else "–",
        max(kinds, key=kinds.__getitem__) if stage.seconds else "–",
    )


def amount(value: float) -> str:
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
