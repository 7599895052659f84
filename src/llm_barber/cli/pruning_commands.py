"""The commands that prune: each parses, makes a configuration, calls, and shows; no logic."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_barber.cli.app import app, print_json
from llm_barber.cli.options import (
    CALIBRATION,
    COMPUTE,
    METHOD,
    OUTPUT,
    REFINING,
    WHAT,
    DebugOption,
    DryRunOption,
    JsonOption,
    ModelArgument,
    OutArgument,
    QuietOption,
    shown_in,
    takes,
)
from llm_barber.settings.demo import FULL_WINDOWS, QUICK_WINDOWS, DemoConfig
from llm_barber.settings.presets import Preset
from llm_barber.settings.prune import Initial, PruneConfig, RebuildConfig

OF_ANY_RUN = (*shown_in(CALIBRATION), *shown_in(COMPUTE), *shown_in(OUTPUT))


@app.command(
    epilog="Examples:\n\nllm-barber prune meta-llama/Llama-3.2-1B pruned --calibration c4\n\n"
    "llm-barber prune ./model pruned --preset best --pattern 2:4\n\n"
    "llm-barber prune ./model pruned --initial magnitude --pattern 2:4 --samples 32 --seqlen 512"
)
@takes(*shown_in(METHOD), *shown_in(WHAT), *shown_in(REFINING), *OF_ANY_RUN)
def prune(
    model: ModelArgument,
    output: OutArgument,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **settings: Any,
) -> None:
    """Prune MODEL, rebuild or refine its mask, write OUT.

    Kept weights are the dense model's, bit for bit, unless --reconstruct, --preset best or --keep-updates. OUT loads
    as MODEL does.
    """
    from llm_barber.run.commands import prune as run

    _run_or_check(run, PruneConfig(model=model, output=output, **settings), dry_run, json, quiet)


@app.command(
    epilog="Examples:\n\nllm-barber rebuild meta-llama/Llama-3.2-1B ./pruned-by-another-tool rebuilt\n\n"
    "llm-barber rebuild ./dense ./pruned rebuilt --granularity block --rebuild-ratio 0.1"
)
@takes("rebuild", "granularity", "rebuild_ratio", "layers", "blocks", *shown_in(REFINING), *OF_ANY_RUN)
def rebuild(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The dense model: folder, hub id or GGUF file.")],
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="The same model, pruned by any tool.")],
    output: OutArgument,
    pruned_revision: Annotated[
        str | None,
        typer.Option(help="Revision of PRUNED, if it is a hub id; --revision is DENSE's.", rich_help_panel=COMPUTE),
    ] = None,
    initial: Annotated[
        Initial | None,
        typer.Option(
            help="Method that pruned it, for the default granularity and ratio. (default: its record's, else wanda)",
            rich_help_panel=METHOD,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="N:M|unstructured",
            help="Pattern to keep up. (default: found in PRUNED)",
            rich_help_panel=METHOD,
        ),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="paper: the published rebuild. mask: masks tuned instead, dense weights. best: weights tuned, too. "
            "(default: paper)",
            rich_help_panel=METHOD,
        ),
    ] = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **settings: Any,
) -> None:
    """Rebuild or refine the mask of PRUNED with the weights of DENSE, write OUT.

    The sparsity of PRUNED, and its N:M pattern if it has one, is kept. --preset mask tunes its mask instead.
    """
    from llm_barber.run.commands import rebuild as run

    settings |= {"initial": initial, "pattern": pattern, "preset": preset, "pruned_revision": pruned_revision}
    config = RebuildConfig(dense=dense, pruned=pruned, output=output, **settings)
    _run_or_check(run, config, dry_run, json, quiet)


@app.command(epilog="Examples:\n\nllm-barber demo\n\nllm-barber demo --output /tmp/demo --prompt 'Once upon a time'")
@takes("seqlen", "device", seqlen=512)
def demo(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the models go.")] = Path("demo-output"),
    model: Annotated[
        str | None,
        typer.Option(help="Another model. (default: SmolLM2-135M from its package)"),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="More text and more tuning; several times as long.")] = False,
    samples: Annotated[
        int | None, typer.Option(help=f"Calibration windows. (default: {QUICK_WINDOWS}; --full: {FULL_WINDOWS})")
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            help=f"WikiText-2 windows to measure perplexity on. (default: {QUICK_WINDOWS}; --full: {FULL_WINDOWS})"
        ),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Beginning of a text that each model continues.")] = (
        "The capital of France is"
    ),
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **settings: Any,
) -> None:
    """Prune a real model of 135M weights to 50 % by four methods, and show what each does to it.

    It takes about a minute or two on two processors, and prints what to type next.
    """
    settings |= {"output": output, "model": model, "full": full, "samples": samples, "windows": windows}
    config = DemoConfig(prompt=prompt, **settings)
    if not quiet:  # the libraries take seconds to import
        typer.echo("loading PyTorch and transformers", err=True)
    from llm_barber.cli.progress import ConsoleProgress
    from llm_barber.cli.tables import show_demo
    from llm_barber.tools.demo import demo as run

    with ConsoleProgress(quiet) as progress:
        rows = run(config, progress)
    if json:
        print_json([row.model_dump(mode="json") for row in rows])
    else:
        show_demo(config, rows)


def _run_or_check(
    run: Callable[..., Any], config: PruneConfig | RebuildConfig, dry_run: bool, json: bool, quiet: bool
) -> None:
    from llm_barber.cli.progress import ConsoleProgress
    from llm_barber.cli.tables import show_dry_run, show_run
    from llm_barber.run.dry_run import dry_run as check

    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    with ConsoleProgress(quiet, muted=not first) as progress:
        result: Any = (check if dry_run else run)(config, progress)
    if not first:
        return
    if json:
        print(result.to_json(), end="")
    elif dry_run:
        show_dry_run(result)
    else:
        show_run(result)
