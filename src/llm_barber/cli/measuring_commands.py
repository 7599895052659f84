"""Commands that measure and compare.

Each calls a function with its settings and shows the result; no logic.
"""

from typing import Annotated

import typer

from llm_barber.cli.app import command, print_json
from llm_barber.cli.options import OUTPUT, JsonOption, QuietOption, VerboseOption
from llm_barber.errors import InterruptedTextError, ModelError
from llm_barber.settings.compare import CompareConfig
from llm_barber.settings.evaluate import EvaluateConfig
from llm_barber.settings.generate import GenerateConfig
from llm_barber.settings.report import ReportConfig

KeepOption = Annotated[
    bool,
    typer.Option(
        "--keep/--no-keep",
        help="Keep the result in MODEL/evaluation.json and report.html, if llm-barber made MODEL (default: on)",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


@command(
    EvaluateConfig,
    {"model": "MODEL"},
    (
        "llm-barber evaluate pruned --against meta-llama/Llama-3.2-1B",
        "llm-barber evaluate pruned --text wikitext2 --text my-text.txt --windows 32 --seqlen 1024 --json",
        "llm-barber evaluate pruned --tasks paper --against meta-llama/Llama-3.2-1B",
        "llm-barber evaluate pruned --tasks-folder ./tasks --tasks arc_easy,hellaswag --limit 500",
    ),
)
def evaluate(
    config: EvaluateConfig, keep: KeepOption = True, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Measure the perplexity of MODEL, its accuracy on tasks, and its distance from another model.

    Perplexity is exp of the mean loss over the tokens of windows without overlap. Tasks are zero-shot, through lm-eval
    (the extra `eval`). Both are computed one decoder layer at a time.
    """
    from llm_barber.cli.progress import ConsoleProgress

    with ConsoleProgress(quiet) as progress:
        from llm_barber.evaluation.evaluate import evaluate as run
        from llm_barber.page.write import keep_with_model

        result = run(config, progress)
        if keep:
            keep_with_model(result, progress)
    if json:
        print_json(result.model_dump(mode="json"))
    else:
        from llm_barber.cli.tables import show_evaluation

        show_evaluation(result)


@command(
    GenerateConfig,
    {"model": "MODEL", "prompt": "PROMPT"},
    (
        "llm-barber generate packed 'Why is the sky blue?'",
        "llm-barber generate packed 'Why is the sky blue?' --against meta-llama/Llama-3.2-1B-Instruct",
        "llm-barber generate pruned - --no-chat --temperature 0.8 --seed 1 < beginning.txt",
    ),
)
def generate(
    config: GenerateConfig, json: JsonOption = False, quiet: QuietOption = False, verbose: VerboseOption = False
) -> None:
    """Let MODEL continue PROMPT, and measure its speed and memory, alone or in turn with the dense model.

    The text goes to stdout as it is written, speed and memory to stderr. With --against both texts and a table go to
    stdout. A model is warmed up before it is timed.
    """
    from llm_barber.cli.progress import ConsoleProgress

    with ConsoleProgress(quiet, verbose=verbose) as progress:
        from llm_barber.tools.generate import generate as run

        streamed = config.against is None and not json
        generation = run(config, progress, progress.write if streamed else None)
    if json:
        ratios = {"prefill_ratio": generation.prefill_ratio, "decode_ratio": generation.decode_ratio}
        print_json({**generation.model_dump(mode="json"), **ratios})
    else:
        from llm_barber.cli.generation_tables import show_generation

        show_generation(generation, config)
    if generation.interrupted:
        raise InterruptedTextError(
            f"interrupted after {len(generation.generated.tokens)} of {config.max_new_tokens} tokens",
            "text and speed above are those of the tokens that were written",
        )


@command(
    CompareConfig,
    {"model": "MODEL", "output": "OUT"},
    (
        "llm-barber compare meta-llama/Llama-3.2-1B comparison --calibration c4 --tasks paper",
        "llm-barber compare ./model comparison --methods wanda,sparsegpt --targets 0.5,2:4 --samples 32 --seqlen 512",
    ),
    python_only=("rebuild_settings", "task_seeds"),
)
def compare(config: CompareConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Prune MODEL with several methods, without and with rebuild, measure each, and print one table.

    OUT gets the tables (comparison.md, .csv, .json), a plot of perplexity against sparsity (.svg) and a page (.html).
    Finished cells are kept: started again, after an interruption or with more methods, it computes what is missing.
    """
    from llm_barber.cli.progress import ConsoleProgress

    with ConsoleProgress(quiet) as progress:
        from llm_barber.comparison.compare import compare as run

        comparison = run(config, progress)
    if json:
        print_json(comparison.model_dump(mode="json"))
    else:
        from llm_barber.cli.tables import show_comparison

        show_comparison(comparison, config.output)
    if comparison.failures:
        raise ModelError(
            f"{len(comparison.failures)} of {len(comparison.cells)} cells could not be done: "
            f"{comparison.failures[0].failure}",
            f"{comparison.failures[0].hint}; {'`cells` has' if json else 'the last notes have'} all errors, "
            "and the other cells are kept",
        )


@command(ReportConfig, {"folder": "OUT"}, ("llm-barber report pruned", "llm-barber report pruned --output pruned.html"))
def report(config: ReportConfig) -> None:
    """Write the page of a finished run: settings, errors, swaps, sparsity, time, and its evaluation if there is one.

    The page is one HTML file that needs no network. prune and rebuild write it, too, unless --no-report.
    """
    from llm_barber.page.write import report as run

    print(run(config))
