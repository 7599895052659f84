"""The command that says what a run will cost: parse, make a configuration, call, show; no logic."""

from typing import Annotated, Any

import typer

from llm_barber.cli.app import app
from llm_barber.cli.options import (
    COMPUTE,
    MACHINE,
    METHOD,
    REFINING,
    WHAT,
    DebugOption,
    JsonOption,
    QuietOption,
    shown_in,
    takes,
)


@app.command(
    epilog="Examples:\n\nllm-barber plan meta-llama/Llama-3.1-8B\n\n"
    "llm-barber plan ./model --preset paper --samples 32 --seqlen 512 --json\n\n"
    "llm-barber plan ./config.json --flops 400e12 --bandwidth 2e9 --processes 1,2,4,8"
)
@takes(*shown_in(METHOD), *shown_in(WHAT), *shown_in(REFINING), "calibration", "samples", "seqlen", *shown_in(COMPUTE))
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG", help="Folder with config.json, a config.json, hub id or GGUF file; no weights."
        ),
    ],
    processes: Annotated[
        str,
        typer.Option(
            metavar="N,…",
            help="Numbers of processes, each with a machine of its own, that share the windows; what all of them "
            "repeat, as swaps, is not divided.",
            rich_help_panel=MACHINE,
        ),
    ] = "1",
    flops: Annotated[
        float | None,
        typer.Option(
            metavar="FLOP/S",
            help="Of another machine: matrix products a second as they are reached in the compute dtype, 400e12 for an "
            "H100. (default: this machine, measured for a few seconds)",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    float32_flops: Annotated[
        float | None,
        typer.Option(
            "--float32-flops",
            metavar="FLOP/S",
            help="The same in float32, for swaps and least squares. (default: an eighth of --flops)",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    memory_bandwidth: Annotated[
        float | None,
        typer.Option(
            metavar="BYTES/S",
            help="Of the memory that the device computes from, with --flops. (default: 2e12)",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(
            metavar="BYTES/S",
            help="Between host and device, with --flops. (default: 10e9)",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(
            metavar="BYTES/S",
            help="Between --processes: ten times as fast between the GPUs of one machine. (default: 10e9)",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            metavar="BYTES/S",
            help="Of the disk, reading and writing. (default: measured, of the present folder; with --flops 2e9)",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **settings: Any,
) -> None:
    """Say what prune will take: FLOPs and bytes of each stage, peak memory, time, and what sets the pace.

    From the configuration alone, without weights. With --flops for another machine, a GPU unless --device cpu.
    """
    from llm_barber.cli.progress import ConsoleProgress
    from llm_barber.planning.plan import plan as run
    from llm_barber.planning.table import show_forecast
    from llm_barber.settings.plan import PlanConfig

    settings |= {"processes": processes, "flops": flops, "float32_flops": float32_flops, "network": network}
    config = PlanConfig(model=model, memory_bandwidth=memory_bandwidth, link=link, bandwidth=bandwidth, **settings)
    with ConsoleProgress(quiet) as progress:
        found = run(config, progress)
    if json:
        print(found.to_json(), end="")
    else:
        show_forecast(found)
