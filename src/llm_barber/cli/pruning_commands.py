"""Commands that prune.

Each calls a function with its settings and shows the result; no logic.
"""

import os
from typing import Any

from llm_barber.cli.app import command, print_json
from llm_barber.cli.options import DryRunOption, JsonOption, QuietOption
from llm_barber.settings.demo import DemoConfig
from llm_barber.settings.prune import PruneConfig, RebuildConfig


@command(
    PruneConfig,
    {"model": "MODEL", "output": "OUT"},
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
    {"dense": "DENSE", "pruned": "PRUNED", "output": "OUT"},
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


@command(DemoConfig, {}, ("llm-barber demo", "llm-barber demo --output /tmp/demo --prompt 'Once upon a time'"))
def demo(config: DemoConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Prune a real model of 135M weights to 50 % by four methods, and show what each does to it.

    It takes one and a half minutes on two cores that compute in bfloat16, and up to four on others. It prints what to
    type next.
    """
    from llm_barber.cli.progress import ConsoleProgress

    with ConsoleProgress(quiet) as progress:
        from llm_barber.tools.demo import demo as run

        rows = run(config, progress)
    if json:
        print_json([row.model_dump(mode="json") for row in rows])
    else:
        from llm_barber.cli.tables import show_demo

        show_demo(config, rows)


def _run_or_check(config: PruneConfig | RebuildConfig, dry_run: bool, json: bool, quiet: bool) -> None:
    """Run `prune` or `rebuild`, or describe the run if `dry_run`; the first process shows the result."""
    from llm_barber.cli.progress import ConsoleProgress

    first = os.environ.get("RANK", "0") == "0"  # torchrun sets RANK in each of its processes
    with ConsoleProgress(quiet, muted=not first) as progress:
        from llm_barber.run import commands
        from llm_barber.run.dry_run import dry_run as check

        result: Any
        if dry_run:
            result = check(config, progress)
        elif isinstance(config, PruneConfig):
            result = commands.prune(config, progress)
        else:
            result = commands.rebuild(config, progress)
    if not first:
        return
    if json:
        print(result.to_json(), end="")
        return
    from llm_barber.cli.tables import show_dry_run, show_run

    (show_dry_run if dry_run else show_run)(result)
