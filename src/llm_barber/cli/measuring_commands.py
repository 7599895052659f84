"""Commands that measure, compare, look at models and write copies of them.

Each calls a function with its settings and shows the result; no logic.
"""

from typing import Annotated

import typer

from llm_barber.cli.app import JsonOption, QuietOption, command, print_json, progress_on_stderr, show
from llm_barber.cli.help import OUTPUT
from llm_barber.errors import InterruptedTextError, ModelError, VerificationError
from llm_barber.settings.compare import CompareConfig, EvaluateConfig
from llm_barber.settings.tools import (
    ConvertConfig,
    GenerateConfig,
    InspectConfig,
    PackConfig,
    ReportConfig,
    UnpackConfig,
)

KeepOption = Annotated[
    bool,
    typer.Option(
        "--keep/--no-keep",
        help="Keep the result in MODEL/evaluation.json and report.html, if llm-barber made MODEL (default: on)",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Say which instructions and packed linears are used",
        rich_help_panel=OUTPUT,
    ),
]
SHOWN_PROBLEMS = 5


@command(
    InspectConfig,
    ("llm-barber inspect pruned", "llm-barber inspect pruned --dense meta-llama/Llama-3.2-1B --json"),
)
def inspect(config: InspectConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Show sparsity and N:M patterns of MODEL, and check it against its record and a dense model.

    The exit code is 1 if something differs.
    """
    with progress_on_stderr(quiet) as progress:
        from llm_barber.tools.inspection import inspect as run

        inspection = run(config, progress)
    show(inspection, json, "show_inspection", also=("sparsity", "patterns"))
    if inspection.problems:
        shown = "; ".join(inspection.problems[:SHOWN_PROBLEMS])
        more = len(inspection.problems) - SHOWN_PROBLEMS
        raise VerificationError(
            shown + (f"; and {more} more" if more > 0 else ""),
            f"the folder was changed{'' if config.dense is None else ', or is not of that dense model'}",
        )


@command(
    PackConfig,
    ("llm-barber pack pruned packed", "llm-barber pack pruned packed-int8 --values int8"),
)
def pack(config: PackConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Store the pruned model PRUNED in fewer bytes, as kept values and their positions.

    At 50 % sparsity the pruned linears of a bfloat16 model take 56 % of their bytes. inspect, evaluate and generate
    read PACKED, and so does transformers after llm_barber.register(). Other programs need it unpacked. --values int8
    rounds kept weights, to 32 % of the bytes. That changes the model: check it with evaluate --against PRUNED.
    """
    _run_packing(config, json, quiet)


@command(UnpackConfig, ("llm-barber unpack packed unpacked",))
def unpack(config: UnpackConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Restore the files that were packed, bit for bit.

    A model with int8 values becomes a dense model whose weights are rounded.
    """
    _run_packing(config, json, quiet)


@command(
    ConvertConfig,
    ("llm-barber convert ./model-with-pytorch_model.bin converted",),
)
def convert(config: ConvertConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Convert pickled weights to safetensors, without running the code that pickles can hold.

    The other commands do not read pickles.
    """
    with progress_on_stderr(quiet) as progress:
        from llm_barber.tools.convert import convert as run

        report = run(config, progress)
    if json:
        print_json(report.model_dump(mode="json"))
    else:
        print(f"{report.output}: {report.tensors} tensors, {report.bytes:,} bytes, from {report.files} files")


def _run_packing(config: UnpackConfig, json: bool, quiet: bool) -> None:
    """Pack or unpack a checkpoint, and show the result."""
    with progress_on_stderr(quiet) as progress:
        from llm_barber.tools import packing

        report = packing.pack(config, progress) if isinstance(config, PackConfig) else packing.unpack(config, progress)
    show(report, json, "show_packing", not isinstance(config, PackConfig))


@command(
    EvaluateConfig,
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
    with progress_on_stderr(quiet) as progress:
        from llm_barber.evaluation.evaluate import evaluate as run
        from llm_barber.page.write import keep_with_model

        result = run(config, progress)
        if keep:
            keep_with_model(result, progress)
    show(result, json, "show_evaluation")


@command(
    GenerateConfig,
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
    with progress_on_stderr(quiet, verbose=verbose) as progress:
        from llm_barber.tools.generate import generate as run

        streamed = config.against is None and not json
        generation = run(config, progress, progress.write if streamed else None)
    show(generation, json, "show_generation", config, also=("prefill_ratio", "decode_ratio"))
    if generation.interrupted:
        raise InterruptedTextError(
            f"interrupted after {len(generation.generated.tokens)} of {config.max_new_tokens} tokens",
            "text and speed above are those of the tokens that were written",
        )


@command(
    CompareConfig,
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
    with progress_on_stderr(quiet) as progress:
        from llm_barber.comparison.compare import compare as run

        comparison = run(config, progress)
    show(comparison, json, "show_comparison", config.output)
    if comparison.failures:
        raise ModelError(
            f"{len(comparison.failures)} of {len(comparison.cells)} cells could not be done: "
            f"{comparison.failures[0].failure}",
            f"{comparison.failures[0].hint}; {'`cells` has' if json else 'the last notes have'} all errors, "
            "and the other cells are kept",
        )


@command(ReportConfig, ("llm-barber report pruned", "llm-barber report pruned --output pruned.html"))
def report(config: ReportConfig) -> None:
    """Write the page of a finished run: settings, errors, swaps, sparsity, time, and its evaluation if there is one.

    The page is one HTML file that needs no network. prune and rebuild write it, too, unless --no-report.
    """
    from llm_barber.page.write import report as run

    print(run(config))
