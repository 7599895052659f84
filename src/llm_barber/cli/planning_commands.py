"""The command that says what a run will cost: parse, make a configuration, call, show; no logic."""

from typing import Annotated, Any

import typer

from llm_barber.cli.app import app
from llm_barber.cli.options import (
    MACHINE,
    AllocationOption,
    BatchOption,
    BlocksOption,
    DebugOption,
    DenseTailOption,
    DeviceOption,
    DtypeOption,
    GranularityOption,
    GuardOption,
    HeadOption,
    InitialOption,
    JsonOption,
    LayersOption,
    PatternOption,
    PresetOption,
    QuietOption,
    RatioOption,
    RebuildOption,
    ReconstructOption,
    RefineOption,
    RevisionOption,
    SamplesOption,
    SeqlenOption,
    SparsityOption,
    SwapsOption,
    TargetMixOption,
    TunePassesOption,
)


@app.command(
    epilog="Examples:\n\nllm-barber plan meta-llama/Llama-3.1-8B\n\n"
    "llm-barber plan ./model --preset paper --samples 32 --seqlen 512 --json\n\n"
    "llm-barber plan ./config.json --flops 400e12 --bandwidth 2e9 --processes 1,2,4,8"
)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG", help="Folder with config.json, a config.json, hub id or GGUF file; no weights."
        ),
    ],
    initial: InitialOption = None,
    sparsity: SparsityOption = None,
    pattern: PatternOption = None,
    rebuild: RebuildOption = None,
    granularity: GranularityOption = None,
    rebuild_ratio: RatioOption = None,
    allocation: AllocationOption = None,
    preset: PresetOption = None,
    refine: RefineOption = None,
    swaps: SwapsOption = None,
    target_mix: TargetMixOption = None,
    reconstruct: ReconstructOption = None,
    tune_passes: TunePassesOption = None,
    guard: GuardOption = None,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 2048,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
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
            show_default=False,
        ),
    ] = None,
    float32_flops: Annotated[
        float | None,
        typer.Option(
            "--float32-flops",
            metavar="FLOP/S",
            help="The same in float32, for Gram matrices and swaps. (default: an eighth of --flops)",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    memory_bandwidth: Annotated[
        float | None,
        typer.Option(
            metavar="BYTES/S",
            help="Of the memory that the device computes from, with --flops. (default: 2e12)",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(
            metavar="BYTES/S",
            help="Between processes; with --flops between host and device, too. (default: 10e9)",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            metavar="BYTES/S",
            help="Of the disk, reading and writing. (default: measured, of the present folder; with --flops 2e9)",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    revision: RevisionOption = None,
    allow_dense_tail: DenseTailOption = False,
    prune_head: HeadOption = False,
    layers: LayersOption = None,
    blocks: BlocksOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what prune will take: FLOPs and bytes of each stage, peak memory, time, and what sets the pace.

    From the configuration alone, without weights. With --flops for another machine, a GPU unless --device cpu.
    """
    from llm_barber.console import ConsoleProgress
    from llm_barber.planning.forecast import PlanConfig, forecast
    from llm_barber.planning.table import show_forecast

    counts: Any = processes  # "1,2", which the configuration reads
    own_blocks: Any = blocks or ()  # a file, as well
    config = PlanConfig(
        model=model, initial=initial, sparsity=sparsity, pattern=pattern, rebuild=rebuild, granularity=granularity,
        rebuild_ratio=rebuild_ratio, allocation=allocation, preset=preset, refine=refine, swaps=swaps,
        target_mix=target_mix, reconstruct=reconstruct, tune_passes=tune_passes, guard=guard, samples=samples,
        seqlen=seqlen, batch_size=batch_size, device=device, dtype=dtype, processes=counts, flops=flops,
        float32_flops=float32_flops, memory_bandwidth=memory_bandwidth, link=link, bandwidth=bandwidth,
        revision=revision, layers=layers, blocks=own_blocks, allow_dense_tail=allow_dense_tail,
        prune_head=prune_head,
    )  # fmt: skip
    with ConsoleProgress(quiet) as progress:
        found = forecast(config, progress)
    if json:
        print(found.to_json(), end="")
    else:
        show_forecast(found)
