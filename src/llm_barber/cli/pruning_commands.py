"""Commands that prune, or say what pruning takes.

Each calls a function with its settings and shows the result; no logic.
"""

import os
from typing import Annotated, Any

import typer

from llm_barber.cli.app import JsonOption, QuietOption, command, print_json, progress_on_stderr, show
from llm_barber.cli.help import OUTPUT
from llm_barber.settings.plan import PlanConfig
from llm_barber.settings.prune import PruneConfig, RebuildConfig
from llm_barber.settings.tools import DemoConfig

DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check and describe the run, write nothing", rich_help_panel=OUTPUT),
]


@command(
    PruneConfig,
    (
        "llm-barber prune meta-llama/Llama-3.2-1B pruned --calibration c4",
        "llm-barber prune ./model pruned --preset best --pattern 2:4",
        "llm-barber prune ./model pruned --initial magnitude --pattern 2:4 --samples 32 --seqlen 512",
    ),
)
def prune(
    config: PruneConfig, dry_run: DryRunOption = False, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Prune MODEL, refine or rebuild its mask, and write OUT, which loads as MODEL does.

    Kept weights stay the dense model's, bit for bit, unless --reconstruct, --preset best or --keep-updates is given.
    With N:M, --preset mask and best first reorder channels inside blocks; the dense model's output stays the same, up
    to rounding.
    """
    _run_or_check(config, dry_run, json, quiet)


@command(
    RebuildConfig,
    (
        "llm-barber rebuild meta-llama/Llama-3.2-1B ./pruned-by-another-tool rebuilt",
        "llm-barber rebuild ./dense ./pruned rebuilt --granularity block --rebuild-ratio 0.1",
    ),
)
def rebuild(
    config: RebuildConfig, dry_run: DryRunOption = False, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Rebuild or refine the mask of PRUNED with the weights of DENSE, and write OUT.

    The sparsity of PRUNED, and its N:M pattern if it has one, is kept. --preset mask tunes its mask instead.
    """
    _run_or_check(config, dry_run, json, quiet)


def _run_or_check(config: PruneConfig | RebuildConfig, dry_run: bool, json: bool, quiet: bool) -> None:
    """Run `prune` or `rebuild`, or describe the run if `dry_run`; the first process shows the result."""
    first = os.environ.get("RANK", "0") == "0"  # torchrun sets RANK in each of its processes
    with progress_on_stderr(quiet, muted=not first) as progress:
        from llm_barber.run import commands
        from llm_barber.run.dry_run import dry_run as check

        run: Any = check if dry_run else commands.prune if isinstance(config, PruneConfig) else commands.rebuild
        result = run(config, progress)
    if first:
        show(result, json, "show_dry_run" if dry_run else "show_run")


@command(
    PlanConfig,
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
    with progress_on_stderr(quiet) as progress:
        from llm_barber.planning.plan import plan as run

        forecast = run(config, progress)
    show(forecast, json, "show_forecast")


@command(DemoConfig, ("llm-barber demo", "llm-barber demo --output /tmp/demo --prompt 'Once upon a time'"))
def demo(config: DemoConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Prune a real model of 135M weights to 50 % by four methods, and show what each does to it.

    It takes one and a half minutes on two cores that compute in bfloat16, and up to four on others. It prints what to
    type next.
    """
    with progress_on_stderr(quiet) as progress:
        from llm_barber.tools.demo import demo as run

        rows = run(config, progress)
    if json:
        print_json([row.model_dump(mode="json") for row in rows])
    else:
        from llm_barber.cli.tables import show_demo

        show_demo(config, rows)
