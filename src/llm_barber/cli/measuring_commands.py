"""The commands that measure and compare: each parses, makes a configuration, calls, and shows; no logic."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llm_barber.cli.app import app, names, print_json
from llm_barber.cli.options import (
    CALIBRATION,
    METHOD,
    OUTPUT,
    TASKS,
    TEXT,
    DebugOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    shown_in,
    takes,
)

MEASURED = shown_in(TEXT, TASKS)
BosOption = Annotated[
    bool,
    typer.Option(
        "--bos/--no-bos",
        help="Let each window (compare: of calibration, too) begin as the tokenizer has texts begin, with a BOS token; "
        "--no-bos: wherever it is cut, as published numbers of such models have it.",
        rich_help_panel=TEXT,
    ),
]


@app.command(
    epilog="Examples:\n\nllm-barber evaluate pruned --against meta-llama/Llama-3.2-1B\n\n"
    "llm-barber evaluate pruned --text wikitext2 --text my-text.txt --windows 32 --seqlen 1024 --json\n\n"
    "llm-barber evaluate pruned --tasks paper --against meta-llama/Llama-3.2-1B\n\n"
    "llm-barber evaluate pruned --tasks-folder ./tasks --tasks arc_easy,hellaswag --limit 500"
)
@takes(*MEASURED, "batch_size", "device", "dtype", "layers", "blocks")
def evaluate(
    model: ModelArgument,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="wikitext2, ptb, c4 (from the hub), or a file; may be given again. "
            "(default: wikitext2, or none with --tasks)",
            rich_help_panel=TEXT,
        ),
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.", rich_help_panel=TEXT)] = 2048,
    bos: BosOption = True,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="Compare with this model: perplexity ratio, KL divergence, agreement of the most likely next token, "
            "differences of accuracies with their standard errors.",
            rich_help_panel=TEXT,
        ),
    ] = None,
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
    **settings: Any,
) -> None:
    """Measure the perplexity of MODEL, its accuracy on tasks, and how far its predictions are from another model's.

    Perplexity: windows without overlap, mean over tokens. Tasks: zero-shot, through lm-eval (pip install
    'llm-barber\\[eval]'). Both are computed one decoder layer at a time.
    """
    from llm_barber.cli.progress import ConsoleProgress
    from llm_barber.cli.tables import show_evaluation
    from llm_barber.evaluation.evaluate import evaluate as run
    from llm_barber.page.write import keep_with_model
    from llm_barber.settings.evaluate import EvaluateConfig

    settings |= {"text": text or None, "tasks": names(settings.get("tasks"))}
    config = EvaluateConfig(model=model, against=against, seqlen=seqlen, bos=bos, **settings)
    with ConsoleProgress(quiet) as progress:
        result = run(config, progress)
        if keep:
            keep_with_model(result, progress)
    if json:
        print_json(result.model_dump(mode="json"))
    else:
        show_evaluation(result)


@app.command(
    epilog="Examples:\n\nllm-barber compare meta-llama/Llama-3.2-1B comparison --calibration c4 --tasks paper\n\n"
    "llm-barber compare ./model comparison --methods wanda,sparsegpt --targets 0.5,2:4 --samples 32 --seqlen 512"
)
@takes(
    "granularity", "rebuild_ratio", "allow_dense_tail", "layers", "blocks", "calibration", "samples", "seqlen",
    *MEASURED, "batch_size", "device", "dtype", "revision",
)  # fmt: skip
def compare(
    model: ModelArgument,
    output: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder for results; a comparison that is there goes on where it stopped."),
    ],
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="Rows of the table: methods, and the presets mask and best, which take longest; also paper, alps, and "
            "sparsegpt-allocated and alps-allocated, whose sparsity is spread over linears as the presets spread it.",
            rich_help_panel=METHOD,
        ),
    ] = "magnitude,sparsegpt,sparsegpt-updates,wanda,ria,dsnot,mask,best",
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
    seeds: Annotated[
        str,
        typer.Option(
            metavar="SEED,…",
            help="Of the choice of windows; several give means and spreads.",
            rich_help_panel=CALIBRATION,
        ),
    ] = "0",
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="wikitext2, ptb, c4 (from the hub), or a file; may be given again. (default: wikitext2)",
            rich_help_panel=TEXT,
        ),
    ] = None,
    text_seqlen: Annotated[int, typer.Option(help="Tokens a window of the texts.", rich_help_panel=TEXT)] = 2048,
    bos: BosOption = True,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Leave the pruned models in OUT/models.", rich_help_panel=OUTPUT)
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **settings: Any,
) -> None:
    """Prune MODEL with the usual methods, or --methods, without and with rebuild; measure each, and print one table.

    OUT gets the tables (comparison.md, .csv, .json), a plot of perplexity against sparsity (.svg) and a page (.html).
    Finished cells are kept: started again after an interruption, or with more methods, it does what is missing.
    """
    from llm_barber.cli.progress import ConsoleProgress
    from llm_barber.cli.tables import show_comparison
    from llm_barber.comparison.compare import compare as run
    from llm_barber.errors import ModelError
    from llm_barber.settings.compare import CompareConfig

    settings |= {"text": text or None, "tasks": names(settings.get("tasks"))}
    settings |= {"methods": names(methods), "targets": names(targets), "seeds": names(seeds)}
    config = CompareConfig(
        model=model, output=output, rebuild=rebuild, text_seqlen=text_seqlen, keep_models=keep_models, **settings
    )
    with ConsoleProgress(quiet) as progress:
        comparison = run(config, progress)
    if json:
        print_json(comparison.model_dump(mode="json"))
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
        typer.Option(metavar="FILE", help="Write this file. (default: OUT/report.html)"),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Make the page of a finished run: settings, errors, swaps, sparsity, time, and its evaluation if there is one.

    One HTML file that needs no network. prune and rebuild make it, too, unless --no-report.
    """
    from llm_barber.page.write import write_page

    print(write_page(folder, output))
