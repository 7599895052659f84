"""The commands: each one parses, makes a configuration, calls, and shows; no logic."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_barber.cli.options import (
    CALIBRATION,
    METHOD,
    OUTPUT,
    TEXT,
    AllocationOption,
    BatchOption,
    CalibrationOption,
    CompareTextOption,
    DebugOption,
    DeviceOption,
    DryRunOption,
    DtypeOption,
    GranularityOption,
    GuardOption,
    JsonOption,
    LimitOption,
    OutArgument,
    OverwriteOption,
    PresetOption,
    QuietOption,
    RatioOption,
    ReconstructOption,
    RefineOption,
    ReportOption,
    ResumeOption,
    RevisionOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    SwapsOption,
    TargetMixOption,
    TasksFolderOption,
    TasksOption,
    TextOption,
    TunePassesOption,
    WindowsOption,
)
from llm_barber.config import Initial, PruneConfig, RebuildConfig
from llm_barber.masking.granularity import Granularity
from llm_barber.presets import GUARD, SWAPS, TARGET_MIX, TUNE_PASSES, Allocation, Preset

app = typer.Typer(
    name="llm-barber",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Prune a large language model in one shot, then rebuild its mask block by block (arXiv 2408.10631).",
    epilog="Exit codes: 0 done, 1 a problem with files or models, 2 wrong options, 130 interrupted.",
)


@app.command(
    epilog="Examples:\n\nllm-barber prune meta-llama/Llama-3.2-1B pruned --calibration c4\n\n"
    "llm-barber prune ./model pruned --initial magnitude --pattern 2:4 --samples 32 --seqlen 512"
)
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or GGUF file.")],
    out: OutArgument,
    initial: Annotated[
        Initial, typer.Option(help="Method of the initial mask.", rich_help_panel=METHOD)
    ] = Initial.WANDA,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Fraction of weights to remove. (default: 0.5)", rich_help_panel=METHOD, show_default=False),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="N:M", help="Keep N of every M inputs instead, for example 2:4.", rich_help_panel=METHOD),
    ] = None,
    rebuild: Annotated[
        bool | None,
        typer.Option(
            "--rebuild/--no-rebuild",
            help="Rebuild the initial mask. (default: the preset's)",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
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
    allocation: AllocationOption = Allocation.UNIFORM,
    preset: PresetOption = Preset.PAPER,
    refine: RefineOption = None,
    swaps: SwapsOption = SWAPS,
    target_mix: TargetMixOption = TARGET_MIX,
    reconstruct: ReconstructOption = None,
    tune_passes: TunePassesOption = TUNE_PASSES,
    guard: GuardOption = GUARD,
    calibration: CalibrationOption = "builtin",
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 2048,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
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

    config = PruneConfig(
        model=model, output=out, initial=initial, sparsity=sparsity, pattern=pattern, rebuild=rebuild,
        granularity=granularity, rebuild_ratio=rebuild_ratio, initial_granularity=initial_granularity,
        keep_updates=keep_updates, allocation=allocation, preset=preset, refine=refine, swaps=swaps,
        target_mix=target_mix, reconstruct=reconstruct, tune_passes=tune_passes, guard=guard,
        calibration=calibration, samples=samples, seqlen=seqlen, seed=seed,
        batch_size=batch_size, device=device, dtype=dtype, revision=revision, overwrite=overwrite,
        resume=resume, report=report,
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
    granularity: GranularityOption = None,
    rebuild_ratio: RatioOption = None,
    refine: RefineOption = None,
    swaps: SwapsOption = SWAPS,
    target_mix: TargetMixOption = TARGET_MIX,
    reconstruct: ReconstructOption = None,
    tune_passes: TunePassesOption = TUNE_PASSES,
    guard: GuardOption = GUARD,
    calibration: CalibrationOption = "builtin",
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 2048,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    report: ReportOption = True,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Rebuild the mask of PRUNED with the weights of DENSE, write OUT.

    The sparsity of PRUNED, and its N:M pattern if it has one, is kept.
    """
    from llm_barber.pruning import rebuild as run

    config = RebuildConfig(
        dense=dense, pruned=pruned, output=out, initial=initial, pattern=pattern, granularity=granularity,
        rebuild_ratio=rebuild_ratio, refine=refine, swaps=swaps, target_mix=target_mix, reconstruct=reconstruct,
        tune_passes=tune_passes, guard=guard, calibration=calibration, samples=samples, seqlen=seqlen, seed=seed,
        batch_size=batch_size, device=device, dtype=dtype, revision=revision, overwrite=overwrite,
        resume=resume, report=report,
    )  # fmt: skip
    _run_or_plan(run, config, dry_run, json, quiet)


@app.command(
    epilog="Examples:\n\nllm-barber inspect pruned\n\nllm-barber inspect pruned --dense meta-llama/Llama-3.2-1B --json"
)
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or GGUF file.")],
    dense: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="Verify that every kept weight equals this model's, bit for bit."),
    ] = None,
    revision: RevisionOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what is pruned in MODEL, which N:M patterns hold, and whether it is as its record says.

    Exits with 1 when something is not.
    """
    from llm_barber.console import ConsoleProgress, show_inspection
    from llm_barber.errors import VerificationError
    from llm_barber.inspection import InspectConfig
    from llm_barber.inspection import inspect as run

    with ConsoleProgress(quiet) as progress:
        inspection = run(InspectConfig(model=model, dense=dense, revision=revision), progress)
    if json:
        record = inspection.model_dump(mode="json")
        _print_json({**record, "sparsity": inspection.sparsity, "patterns": inspection.patterns})
    else:
        show_inspection(inspection)
    if inspection.problems:
        shown = "; ".join(inspection.problems[:5])
        more = len(inspection.problems) - 5
        raise VerificationError(
            shown + (f"; and {more} more" if more > 0 else ""),
            "the folder was changed, or is not of that dense model",
        )


@app.command(
    epilog="Examples:\n\nllm-barber evaluate pruned --against meta-llama/Llama-3.2-1B\n\n"
    "llm-barber evaluate pruned --text wikitext2 --text my-text.txt --windows 32 --seqlen 1024 --json\n\n"
    "llm-barber evaluate pruned --tasks paper --against meta-llama/Llama-3.2-1B\n\n"
    "llm-barber evaluate pruned --tasks-folder ./tasks --tasks arc_easy,hellaswag --limit 500"
)
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or GGUF file.")],
    text: TextOption = None,
    windows: WindowsOption = None,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.", rich_help_panel=TEXT)] = 2048,
    tasks: TasksOption = None,
    tasks_folder: TasksFolderOption = None,
    limit: LimitOption = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="Compare with this model: perplexity ratio, KL divergence, agreement of the most likely next token, "
            "differences of accuracies with their standard errors.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    keep: Annotated[
        bool,
        typer.Option(
            "--keep/--no-keep",
            help="Keep the result in MODEL/evaluation.json and its report.html, if llm-barber made MODEL.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure the perplexity of MODEL, its accuracy on tasks, and how far its predictions are from another model's.

    Perplexity: windows without overlap, mean over tokens. Tasks: zero-shot, through lm-eval (pip install
    'llm-barber\\[eval]'). Both are computed one decoder layer at a time.
    """
    from llm_barber.console import ConsoleProgress, show_evaluation
    from llm_barber.evaluation.evaluate import EvaluateConfig
    from llm_barber.evaluation.evaluate import evaluate as run
    from llm_barber.page.write import keep_with_model

    config = EvaluateConfig(
        model=model, against=against, text=tuple(text) if text else None, windows=windows, seqlen=seqlen,
        tasks=_names(tasks), tasks_folder=tasks_folder, limit=limit, batch_size=batch_size, device=device, dtype=dtype,
    )  # fmt: skip
    with ConsoleProgress(quiet) as progress:
        result = run(config, progress)
        if keep:
            keep_with_model(result, progress)
    if json:
        _print_json(result.model_dump(mode="json"))
    else:
        show_evaluation(result)


@app.command(
    epilog="Examples:\n\nllm-barber compare meta-llama/Llama-3.2-1B comparison --calibration c4 --tasks paper\n\n"
    "llm-barber compare ./model comparison --methods wanda,sparsegpt --targets 0.5,2:4 --samples 32 --seqlen 512"
)
def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or GGUF file.")],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder for results; a comparison that is there goes on where it stopped."),
    ],
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,…", help="Rows of the table; also alps, mask, best (presets).", rich_help_panel=METHOD
        ),
    ] = "magnitude,sparsegpt,sparsegpt-updates,wanda,ria,dsnot",
    targets: Annotated[
        str,
        typer.Option(
            metavar="TARGET,…", help="Sparsities and N:M patterns: one block of rows each.", rich_help_panel=METHOD
        ),
    ] = "0.5,0.6,0.7,2:4,4:8",
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild/--no-rebuild", help="Each method also with its mask rebuilt.", rich_help_panel=METHOD),
    ] = True,
    granularity: GranularityOption = None,
    rebuild_ratio: RatioOption = None,
    calibration: CalibrationOption = "builtin",
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 2048,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="SEED,…",
            help="Of the choice of windows; several give means and spreads.",
            rich_help_panel=CALIBRATION,
        ),
    ] = "0",
    text: CompareTextOption = None,
    windows: WindowsOption = None,
    text_seqlen: Annotated[int, typer.Option(help="Tokens a window of the texts.", rich_help_panel=TEXT)] = 2048,
    tasks: TasksOption = None,
    tasks_folder: TasksFolderOption = None,
    limit: LimitOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Leave the pruned models in OUT/models.", rich_help_panel=OUTPUT)
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Prune MODEL with every method, without and with rebuild, measure each, and print one table.

    OUT gets the tables (comparison.md, .csv, .json), a plot of perplexity against sparsity (.svg) and a page (.html).
    Finished cells are kept: started again after an interruption, or with more methods, it does what is missing.
    """
    from llm_barber.comparison.compare import CompareConfig
    from llm_barber.comparison.compare import compare as run
    from llm_barber.console import ConsoleProgress, show_comparison
    from llm_barber.errors import ModelError

    lists: dict[str, Any] = {"methods": _names(methods), "targets": _names(targets), "seeds": _names(seeds)}
    config = CompareConfig(
        model=model, output=out, **lists, rebuild=rebuild,
        granularity=granularity, rebuild_ratio=rebuild_ratio, calibration=calibration, samples=samples, seqlen=seqlen,
        text=tuple(text) if text else None, windows=windows, text_seqlen=text_seqlen,
        tasks=_names(tasks), tasks_folder=tasks_folder, limit=limit, batch_size=batch_size, device=device, dtype=dtype,
        revision=revision, keep_models=keep_models,
    )  # fmt: skip
    with ConsoleProgress(quiet) as progress:
        comparison = run(config, progress)
    if json:
        _print_json(comparison.model_dump(mode="json"))
    else:
        show_comparison(comparison, config.output)
    if comparison.failures:
        raise ModelError(
            f"{len(comparison.failures)} of {len(comparison.cells)} cells could not be done: "
            f"{comparison.failures[0].failure}",
            "the table names them; the others are kept",
        )


@app.command(epilog="Examples:\n\nllm-barber report pruned\n\nllm-barber report pruned --output pruned.html")
def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that prune or rebuild wrote.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write this file. (default: OUT/report.html)", show_default=False),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Make the page of a finished run: settings, errors, swaps, sparsity, time, and its evaluation if there is one.

    One HTML file that needs no network. prune and rebuild make it, too, unless --no-report.
    """
    from llm_barber.page.write import write_page

    print(write_page(folder, output))


@app.command(epilog="Example:\n\nllm-barber pack pruned packed")
def pack(
    model: Annotated[str, typer.Argument(metavar="OUT", help="The folder of a pruned model.")],
    packed: Annotated[Path, typer.Argument(metavar="PACKED", help="Folder to write; appears when it is complete.")],
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Store a pruned model in fewer bytes: kept values and their places. At 50 % of bfloat16 about 57 % of the bytes.

    inspect and evaluate read PACKED; other programs need it unpacked.
    """
    from llm_barber.packing import pack as run

    _run_packing(run, model, packed, overwrite, json, quiet)


@app.command(epilog="Example:\n\nllm-barber unpack packed unpacked")
def unpack(
    packed: Annotated[str, typer.Argument(metavar="PACKED", help="A folder that pack wrote.")],
    out: OutArgument,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the files that were packed, bit for bit."""
    from llm_barber.packing import unpack as run

    _run_packing(run, packed, out, overwrite, json, quiet)


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
        _print_json([row.model_dump(mode="json") for row in rows])
    else:
        show_demo(rows)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from llm_barber import __version__

        print(__version__)
        raise typer.Exit


def _run_or_plan(
    run: Callable[..., Any], config: PruneConfig | RebuildConfig, dry_run: bool, json: bool, quiet: bool
) -> None:
    from llm_barber.console import ConsoleProgress, show_plan, show_run
    from llm_barber.plan import plan

    with ConsoleProgress(quiet) as progress:
        result: Any = (plan if dry_run else run)(config, progress)
    if json:
        print(result.to_json(), end="")
    elif dry_run:
        show_plan(result)
    else:
        show_run(result)


def _run_packing(run: Callable[..., Any], model: str, output: Path, overwrite: bool, json: bool, quiet: bool) -> None:
    from llm_barber.console import ConsoleProgress, show_packing
    from llm_barber.packing import PackConfig

    with ConsoleProgress(quiet) as progress:
        report = run(PackConfig(model=model, output=output, overwrite=overwrite), progress)
    if json:
        _print_json(report.model_dump(mode="json"))
    else:
        show_packing(report)


def _names(given: str | None) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(name.strip() for name in (given or "").split(",") if name.strip())


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1))
