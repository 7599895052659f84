"""The options that commands share, by the panel of `--help` that shows them."""

from pathlib import Path
from typing import Annotated

import typer

from llm_barber.config import Initial
from llm_barber.masking.granularity import Granularity
from llm_barber.presets import (
    GUARD,
    PATTERN_SWAPS,
    PATTERN_TARGET_MIX,
    SWAPS,
    TARGET_MIX,
    Allocation,
    Preset,
    Reconstruct,
    Refine,
)
from llm_barber.settings import Format

METHOD, WHAT, REFINING, CALIBRATION, TEXT, TASKS = "Method", "What to prune", "Refining", "Calibration", "Text", "Tasks"
COMPUTE, OUTPUT, MACHINE = "Compute", "Output", "Machine"

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; appears when it is complete.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or GGUF file.")]
InitialOption = Annotated[
    Initial | None,
    typer.Option(help="Method of the initial mask. (default: wanda)", rich_help_panel=METHOD, show_default=False),
]
SparsityOption = Annotated[
    float | None,
    typer.Option(help="Fraction of weights to remove. (default: 0.5)", rich_help_panel=METHOD, show_default=False),
]
PatternOption = Annotated[
    str | None,
    typer.Option(metavar="N:M", help="Keep N of every M inputs instead, for example 2:4.", rich_help_panel=METHOD),
]
RebuildOption = Annotated[
    bool | None,
    typer.Option(
        "--rebuild/--no-rebuild",
        help="Rebuild the initial mask. (default: the preset's)",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
GranularityOption = Annotated[
    Granularity | None,
    typer.Option(
        help="What competes with what: output row, input column, linear, or all linears of a block. "
        "(default: magnitude block, sparsegpt linear, else output)",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
RatioOption = Annotated[
    float | None,
    typer.Option(
        "--rebuild-ratio",
        metavar="R",
        help="Share of the beneficial pairs to swap, 0 to 1. (default: magnitude 0.1, sparsegpt 0.1, else 0.01)",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
PresetOption = Annotated[
    Preset | None,
    typer.Option(
        help="mask: the best with dense weights. best: the best quality, weights change. paper: the published method. "
        "(default: mask; paper where --initial or a setting of the rebuild is given)",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
RebuildPresetOption = Annotated[
    Preset | None,
    typer.Option(
        help="paper: the published rebuild. mask: masks tuned instead, dense weights. best: weights tuned, too. "
        "(default: paper)",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
AllocationOption = Annotated[
    Allocation | None,
    typer.Option(
        help="How sparsity is spread: evenly; owl: less to layers with many outliers; loss: to each linear by what "
        "pruning it costs the model's loss. (default: the preset's)",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Prune only linears in whose name it is found, as model.layers.0.mlp.up_proj; may be given again.",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Leave out linears in whose name it is found; may be given again.",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
SkipLayersOption = Annotated[
    str | None,
    typer.Option(
        metavar="N,…",
        help="Leave out decoder layers: 0,-1 is the first and the last.",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
DenseTailOption = Annotated[
    bool,
    typer.Option(
        "--allow-dense-tail",
        help="Where the M of N:M does not divide a row, leave the inputs after its last whole group dense.",
        rich_help_panel=WHAT,
    ),
]
HeadOption = Annotated[
    bool,
    typer.Option(
        "--prune-head",
        help="Prune the output head, too, by the initial method (and --refine); one that is tied to the embedding gets "
        "weights of its own.",
        rich_help_panel=WHAT,
    ),
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Where the decoder layers are in the model, as model.layers. (default: as known, or found)",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
BlocksOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="YAML, the blocks of a decoder layer in order: NAME: {output: PATH, linears: [PATH, …]}. (default: as "
        "known, or found)",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
SparsitiesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A YAML file with linears' own sparsities, a line each: REGEX: 0.4, or 2:4, or 0 (not pruned). The "
        "first that is found in a name counts; the rest takes --sparsity or --pattern. No --allocation then.",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
RefineOption = Annotated[
    Refine | None,
    typer.Option(
        help="Refine the mask: by exact swaps, which lower the error of every row, or by tuning the masks of each "
        "layer against its output. (default: the preset's)",
        rich_help_panel=REFINING,
        show_default=False,
    ),
]
SwapsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help=f"Swaps a row, at most. (default: {SWAPS}, with N:M {PATTERN_SWAPS})",
        rich_help_panel=REFINING,
        show_default=False,
    ),
]
TargetMixOption = Annotated[
    float | None,
    typer.Option(
        metavar="0…1",
        help="What refining aims at: dense outputs on the pruned model's inputs, 0, or on the dense model's, 1. "
        f"(default: {TARGET_MIX}, or {PATTERN_TARGET_MIX} where masks of N:M are tuned)",
        rich_help_panel=REFINING,
        show_default=False,
    ),
]
ReconstructOption = Annotated[
    Reconstruct | None,
    typer.Option(
        help="Change kept weights to make up for pruned ones: by least squares, or by tuning each layer, after "
        "least squares where masks are not tuned. (default: the preset's)",
        rich_help_panel=REFINING,
        show_default=False,
    ),
]
TunePassesOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Passes over the windows when masks or weights are tuned, at most. (default: 2 to 8, the fewer the more "
        "text; twice as many where both are)",
        rich_help_panel=REFINING,
        show_default=False,
    ),
]
GuardOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help=f"Share of the windows held out to decide what of the refining is kept; 0: all. (default: {GUARD:g})",
        rich_help_panel=REFINING,
        show_default=False,
    ),
]
CalibrationOption = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="builtin, c4, wikitext2 (from the hub), or a .txt, .jsonl, .parquet or .safetensors (input_ids) file.",
        rich_help_panel=CALIBRATION,
    ),
]
SamplesOption = Annotated[int, typer.Option(help="Windows of text.", rich_help_panel=CALIBRATION)]
SeqlenOption = Annotated[int, typer.Option(help="Tokens a window.", rich_help_panel=CALIBRATION)]
SeedOption = Annotated[int, typer.Option(help="Of the choice of windows.", rich_help_panel=CALIBRATION)]
BatchOption = Annotated[
    int | None,
    typer.Option(
        help="Windows computed together, at most; changes no result but tuning.",
        rich_help_panel=COMPUTE,
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …", rich_help_panel=COMPUTE)]
FormatOption = Annotated[
    Format,
    typer.Option(
        help="dense loads everywhere; packed takes fewer bytes, and unpack gives it back.", rich_help_panel=OUTPUT
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Host memory to stay within, like 8GiB: activations that do not fit lie in files beside OUT.",
        rich_help_panel=COMPUTE,
    ),
]
DeviceMemoryOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory of the GPU to stay within, like 8GiB.", rich_help_panel=COMPUTE),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Compute dtype: auto (the fastest the device has), float32, bfloat16, float16. Weights keep theirs.",
        rich_help_panel=COMPUTE,
    ),
]
TextOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|FILE",
        help="wikitext2, ptb, c4 (from the hub), or a file; may be given again. "
        "(default: wikitext2, or none with --tasks)",
        rich_help_panel=TEXT,
        show_default=False,
    ),
]
CompareTextOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|FILE",
        help="wikitext2, ptb, c4 (from the hub), or a file; may be given again. (default: wikitext2)",
        rich_help_panel=TEXT,
        show_default=False,
    ),
]
WindowsOption = Annotated[
    int | None, typer.Option(help="Windows of each text. (default: all)", rich_help_panel=TEXT, show_default=False)
]
TasksOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,…",
        help="Multiple-choice tasks of lm-eval, or paper: boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge, "
        "openbookqa.",
        rich_help_panel=TASKS,
    ),
]
TasksFolderOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Take tasks from FOLDER/NAME.jsonl, not from the hub; all of them without --tasks. Each line: "
        "query, choices, gold, or context_options, continuation, gold.",
        rich_help_panel=TASKS,
    ),
]
LimitOption = Annotated[int | None, typer.Option(help="Examples of each task, at most.", rich_help_panel=TASKS)]
RevisionOption = Annotated[str | None, typer.Option(help="Revision of a hub id.", rich_help_panel=COMPUTE)]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.", rich_help_panel=OUTPUT),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.", rich_help_panel=OUTPUT)]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace OUT once the new one is complete.", rich_help_panel=OUTPUT),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on with an unfinished run of OUT, if there is one.", rich_help_panel=OUTPUT),
]
ReportOption = Annotated[
    bool,
    typer.Option("--report/--no-report", help="Write OUT/report.html, a page with plots.", rich_help_panel=OUTPUT),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress.", rich_help_panel=OUTPUT)]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.", rich_help_panel=OUTPUT)]
