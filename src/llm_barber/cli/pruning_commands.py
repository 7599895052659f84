"""The commands that prune: each parses, makes a configuration, calls, and shows; no logic."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_barber.cli.app import app, print_json
from llm_barber.cli.options import (
    METHOD,
    AllocationOption,
    BatchOption,
    BlocksOption,
    CalibrationOption,
    DebugOption,
    DenseTailOption,
    DeviceMemoryOption,
    DeviceOption,
    DryRunOption,
    DtypeOption,
    ExcludeOption,
    FormatOption,
    GranularityOption,
    GuardOption,
    HeadOption,
    IncludeOption,
    InitialOption,
    JsonOption,
    LayersOption,
    MemoryOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    PatternOption,
    PresetOption,
    QuietOption,
    RatioOption,
    RebuildOption,
    RebuildPresetOption,
    ReconstructOption,
    RefineOption,
    ReportOption,
    ResumeOption,
    RevisionOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    SkipLayersOption,
    SparsitiesOption,
    SparsityOption,
    SwapsOption,
    TargetMixOption,
    TunePassesOption,
)
from llm_barber.config import Initial, PruneConfig, RebuildConfig
from llm_barber.masking.granularity import Granularity
from llm_barber.settings import Format


@app.command(
    epilog="Examples:\n\nllm-barber prune meta-llama/Llama-3.2-1B pruned --calibration c4\n\n"
    "llm-barber prune ./model pruned --initial magnitude --pattern 2:4 --samples 32 --seqlen 512"
)
def prune(
    model: ModelArgument,
    out: OutArgument,
    initial: InitialOption = None,
    sparsity: SparsityOption = None,
    pattern: PatternOption = None,
    rebuild: RebuildOption = None,
    granularity: GranularityOption = None,
    rebuild_ratio: RatioOption = None,
    initial_granularity: Annotated[
        Granularity | None,
        typer.Option(
            help="Comparison group of the initial mask. (default: magnitude and ria linear, else output)",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    keep_updates: Annotated[
        bool,
        typer.Option(
            "--keep-updates",
            help="Keep the updated weights of sparsegpt or alps instead of the dense ones.",
            rich_help_panel=METHOD,
        ),
    ] = False,
    allocation: AllocationOption = None,
    preset: PresetOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    skip_layers: SkipLayersOption = None,
    sparsities: SparsitiesOption = None,
    allow_dense_tail: DenseTailOption = False,
    prune_head: HeadOption = False,
    refine: RefineOption = None,
    swaps: SwapsOption = None,
    target_mix: TargetMixOption = None,
    reconstruct: ReconstructOption = None,
    tune_passes: TunePassesOption = None,
    guard: GuardOption = None,
    calibration: CalibrationOption = "builtin",
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 2048,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    revision: RevisionOption = None,
    layers: LayersOption = None,
    blocks: BlocksOption = None,
    format: FormatOption = Format.DENSE,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    report: ReportOption = True,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Prune MODEL, rebuild or refine its mask, write OUT.

    Kept weights are the dense model's, bit for bit, unless --reconstruct, --preset best or --keep-updates; OUT loads
    with AutoModelForCausalLM.
    """
    from llm_barber.pruning import prune as run

    own_sparsities: Any = sparsities or {}  # a file, and below "0,-1", which the configuration reads
    skipped: Any = skip_layers or ()
    host_size: Any = memory  # as are these
    device_size: Any = device_memory
    own_blocks: Any = blocks or ()
    config = PruneConfig(
        model=model, output=out, initial=initial, sparsity=sparsity, pattern=pattern, rebuild=rebuild,
        granularity=granularity, rebuild_ratio=rebuild_ratio, initial_granularity=initial_granularity,
        keep_updates=keep_updates, allocation=allocation, include=tuple(include or ()), exclude=tuple(exclude or ()),
        skip_layers=skipped, sparsities=own_sparsities, preset=preset, refine=refine, swaps=swaps,
        target_mix=target_mix, reconstruct=reconstruct, tune_passes=tune_passes, guard=guard,
        calibration=calibration, samples=samples, seqlen=seqlen, seed=seed,
        batch_size=batch_size, device=device, dtype=dtype, revision=revision, overwrite=overwrite,
        resume=resume, report=report, memory=host_size, device_memory=device_size,
        format=format, layers=layers, blocks=own_blocks, allow_dense_tail=allow_dense_tail,
        prune_head=prune_head,
    )  # fmt: skip
    _run_or_plan(run, config, dry_run, json, quiet)


@app.command(
    epilog="Examples:\n\nllm-barber rebuild meta-llama/Llama-3.2-1B ./pruned-by-another-tool rebuilt\n\n"
    "llm-barber rebuild ./dense ./pruned rebuilt --granularity block --rebuild-ratio 0.1"
)
def rebuild(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The dense model: folder, hub id or GGUF file.")],
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="The same model, pruned by any tool.")],
    out: OutArgument,
    initial: Annotated[
        Initial | None,
        typer.Option(
            help="Method that pruned it, for the default granularity and ratio. (default: its record's, else wanda)",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="N:M|unstructured",
            help="Pattern to keep up. (default: found in PRUNED)",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    rebuild: RebuildOption = None,
    granularity: GranularityOption = None,
    rebuild_ratio: RatioOption = None,
    preset: RebuildPresetOption = None,
    refine: RefineOption = None,
    swaps: SwapsOption = None,
    target_mix: TargetMixOption = None,
    reconstruct: ReconstructOption = None,
    tune_passes: TunePassesOption = None,
    guard: GuardOption = None,
    calibration: CalibrationOption = "builtin",
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 2048,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    revision: RevisionOption = None,
    layers: LayersOption = None,
    blocks: BlocksOption = None,
    format: FormatOption = Format.DENSE,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    report: ReportOption = True,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Rebuild or refine the mask of PRUNED with the weights of DENSE, write OUT.

    The sparsity of PRUNED, and its N:M pattern if it has one, is kept. --preset mask tunes its mask instead.
    """
    from llm_barber.pruning import rebuild as run

    host_size: Any = memory  # "8GiB", which the configuration reads
    device_size: Any = device_memory
    own_blocks: Any = blocks or ()
    config = RebuildConfig(
        dense=dense, pruned=pruned, output=out, initial=initial, pattern=pattern, rebuild=rebuild,
        granularity=granularity, rebuild_ratio=rebuild_ratio, preset=preset,
        refine=refine, swaps=swaps, target_mix=target_mix, reconstruct=reconstruct,
        tune_passes=tune_passes, guard=guard, calibration=calibration, samples=samples, seqlen=seqlen, seed=seed,
        batch_size=batch_size, device=device, dtype=dtype, revision=revision, overwrite=overwrite,
        resume=resume, report=report, memory=host_size, device_memory=device_size,
        format=format, layers=layers, blocks=own_blocks,
    )  # fmt: skip
    _run_or_plan(run, config, dry_run, json, quiet)


@app.command(epilog="Examples:\n\nllm-barber demo\n\nllm-barber demo --output /tmp/demo --prompt 'Once upon a time'")
def demo(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the models go.")] = Path("demo-output"),
    model: Annotated[
        str | None,
        typer.Option(help="Another model. (default: SmolLM2-135M from its package)", show_default=False),
    ] = None,
    samples: SamplesOption = 32,
    seqlen: SeqlenOption = 512,
    windows: Annotated[int, typer.Option(help="WikiText-2 windows to measure perplexity on.")] = 32,
    prompt: Annotated[str, typer.Option(help="What each model goes on from.")] = "The capital of France is",
    device: DeviceOption = "auto",
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Prune a real model of 135M weights to 50 % in three ways, and show what each does to it."""
    from llm_barber.console import ConsoleProgress, show_demo
    from llm_barber.demo import DemoConfig
    from llm_barber.demo import demo as run

    config = DemoConfig(
        output=output,
        model=model,
        samples=samples,
        seqlen=seqlen,
        windows=windows,
        prompt=prompt,
        device=device,
    )
    with ConsoleProgress(quiet) as progress:
        rows = run(config, progress)
    if json:
        print_json([row.model_dump(mode="json") for row in rows])
    else:
        show_demo(rows)


def _run_or_plan(
    run: Callable[..., Any], config: PruneConfig | RebuildConfig, dry_run: bool, json: bool, quiet: bool
) -> None:
    from llm_barber.console import ConsoleProgress, show_plan, show_run
    from llm_barber.plan import plan

    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    with ConsoleProgress(quiet or not first) as progress:
        result: Any = (plan if dry_run else run)(config, progress)
    if not first:
        return
    if json:
        print(result.to_json(), end="")
    elif dry_run:
        show_plan(result)
    else:
        show_run(result)
