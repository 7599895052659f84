"""The options that commands share, by the names of the settings, and the panel of `--help` that shows each."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_barber.masking.granularity import Granularity
from llm_barber.settings.base import Format
from llm_barber.settings.presets import (
    GUARD,
    PATTERN_SWAPS,
    PATTERN_TARGET_MIX,
    SOLVED_TARGET_MIX,
    SWAPS,
    TARGET_MIX,
    TUNING_GUARD,
    Allocation,
    Preset,
    Reconstruct,
    Refine,
)
from llm_barber.settings.prune import RELEASED_REBUILD, Initial, PruneConfig

METHOD, WHAT, REFINING, CALIBRATION, TEXT, TASKS = "Method", "What to prune", "Refining", "Calibration", "Text", "Tasks"
COMPUTE, OUTPUT, MACHINE = "Compute", "Output", "Machine"

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; appears when it is complete.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub id (org/name, or org/name@revision) or GGUF file.")
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.", rich_help_panel=OUTPUT),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.", rich_help_panel=OUTPUT)]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress.", rich_help_panel=OUTPUT)]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.", rich_help_panel=OUTPUT)]

Command = Callable[..., None]


def option(kind: Any, panel: str, text: str, *names: str, metavar: str | None = None) -> Any:
    """The annotation of an option: type, panel, what `--help` says of it, its names if the setting's will not do."""
    return Annotated[kind, typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel)]


def _by_method(part: int) -> str:
    """The released experiments' granularities (0) or ratios (1), for people; wanda's is what is said last."""
    usual = RELEASED_REBUILD[Initial.WANDA][part]
    others = [f"{method} {found[part]}" for method, found in RELEASED_REBUILD.items() if found[part] != usual]
    return ", ".join([*others, f"else {usual}"])


OPTIONS: dict[str, Any] = {
    "initial": option(Initial | None, METHOD, "Method of the initial mask. (default: wanda)"),
    "sparsity": option(float | None, METHOD, "Fraction of weights to remove. (default: 0.5)"),
    "pattern": option(str | None, METHOD, "Keep N of every M inputs instead, for example 2:4.", metavar="N:M"),
    "rebuild": option(
        bool | None,
        METHOD,
        "Rebuild the initial mask, or not; prune: given, it means --preset paper, unless another is. "
        "(default: the preset's)",
        "--rebuild/--no-rebuild",
    ),
    "granularity": option(
        Granularity | None,
        METHOD,
        "What competes with what: output row, input column, linear, or all linears of a block. "
        f"(default: {_by_method(0)}; with N:M output)",
    ),
    "rebuild_ratio": option(
        float | None,
        METHOD,
        f"Share of the beneficial pairs to swap, 0 to 1. (default: {_by_method(1)})",
        "--rebuild-ratio",
        metavar="R",
    ),
    "initial_granularity": option(
        Granularity | None,
        METHOD,
        "Comparison group of the initial mask. (default: magnitude, ria and alps linear, else output)",
    ),
    "keep_updates": option(
        bool,
        METHOD,
        "Keep the updated weights of sparsegpt or alps instead of the dense ones.",
        "--keep-updates",
    ),
    "allocation": option(
        Allocation | None,
        METHOD,
        "How sparsity is spread: evenly; owl: less to layers with many outliers; loss: to each linear by what "
        "pruning it costs the model's loss. (default: the preset's)",
    ),
    "preset": option(
        Preset | None,
        METHOD,
        "mask: the best with dense weights. best: the best quality, weights change. paper: the published method. "
        "(default: mask; paper where --initial or a setting of the rebuild is given)",
    ),
    "include": option(
        list[str] | None,
        WHAT,
        "Prune only linears in whose name it is found, as model.layers.0.mlp.up_proj; may be given again.",
        metavar="REGEX",
    ),
    "exclude": option(
        list[str] | None, WHAT, "Leave out linears in whose name it is found; may be given again.", metavar="REGEX"
    ),
    "skip_layers": option(str | None, WHAT, "Leave out decoder layers: 0,-1 is the first and the last.", metavar="N,…"),
    "sparsities": option(
        Path | None,
        WHAT,
        "A YAML file with linears' own sparsities, a line each: REGEX: 0.4, or 2:4, or 0 (not pruned); a number in "
        "place of REGEX is a decoder layer's. The first that fits counts; the rest takes --sparsity or --pattern. No "
        "--allocation then.",
        metavar="FILE",
    ),
    "allow_dense_tail": option(
        bool,
        WHAT,
        "Where the M of N:M does not divide a row, leave the inputs after its last whole group dense.",
        "--allow-dense-tail",
    ),
    "prune_head": option(
        bool,
        WHAT,
        "Prune the output head, too, by the initial method, then, where layers' masks are refined, by swaps, and where "
        "weights are changed, by least squares. One that is tied to the embedding gets weights of its own.",
        "--prune-head",
    ),
    "layers": option(
        str | None,
        WHAT,
        "Where the decoder layers are in the model, as model.layers. (default: as known, or found)",
        metavar="PATH",
    ),
    "blocks": option(
        Path | None,
        WHAT,
        "YAML, the blocks of a decoder layer in order: NAME: {output: PATH, linears: [PATH, …]}. (default: as "
        "known, or found)",
        metavar="FILE",
    ),
    "refine": option(
        Refine | None,
        REFINING,
        "Refine the mask: by exact swaps, which lower the error of every row, or by tuning the masks of each "
        "layer against its output. (default: the preset's)",
    ),
    "swaps": option(
        int | None,
        REFINING,
        f"With --refine swaps: swaps a row, at most. (default: {SWAPS}, with N:M {PATTERN_SWAPS})",
        metavar="N",
    ),
    "target_mix": option(
        float | None,
        REFINING,
        "What refining aims at: dense outputs on the pruned model's inputs, 0, or on the dense model's, 1. "
        f"(default: {TARGET_MIX}; {PATTERN_TARGET_MIX} where masks of N:M are tuned, {SOLVED_TARGET_MIX} for least "
        "squares alone)",
        metavar="0…1",
    ),
    "reconstruct": option(
        Reconstruct | None,
        REFINING,
        "Change kept weights to make up for pruned ones: by least squares, or by tuning each layer, after "
        "least squares where masks are not tuned. least-squares goes with --refine swaps or none. "
        "(default: the preset's)",
    ),
    "tune_passes": option(
        int | None,
        REFINING,
        "Passes over the windows when masks or weights are tuned. (default: 2 to 8, the fewer the more "
        "text; twice as many where both are)",
        metavar="N",
    ),
    "guard": option(
        float | None,
        REFINING,
        "Share of the windows held out to decide what of the refining is kept; 0: none are, and all of it is kept. "
        f"(default: {GUARD:g}, and {TUNING_GUARD:g} where masks are tuned)",
        metavar="SHARE",
    ),
    "calibration": option(
        str,
        CALIBRATION,
        "builtin, c4, wikitext2 (from the hub), or a .txt, .jsonl, .parquet or .safetensors (input_ids) file.",
        metavar="NAME|FILE",
    ),
    "samples": option(int, CALIBRATION, "Windows of text; a .safetensors file has as many as it has."),
    "seqlen": option(int, CALIBRATION, "Tokens a window; those of a .safetensors file are as long as they are."),
    "bos": option(
        bool,
        CALIBRATION,
        "Let each window begin as the tokenizer has texts begin, with a BOS token; --no-bos: wherever it is cut.",
        "--bos/--no-bos",
    ),
    "seed": option(int, CALIBRATION, "Of the choice of windows."),
    "batch_size": option(int | None, COMPUTE, "Windows computed together, at most; it can change bfloat16 rounding."),
    "device": option(str, COMPUTE, "auto, cpu, cuda, cuda:1 …"),
    "dtype": option(
        str,
        COMPUTE,
        "Compute dtype: auto (the fastest the device has), float32, bfloat16, float16. Weights keep theirs.",
    ),
    "format": option(Format, OUTPUT, "dense loads everywhere; packed takes fewer bytes, and unpack gives it back."),
    "memory": option(
        str | None,
        COMPUTE,
        "Host memory to stay within, like 8GiB: activations that do not fit lie in files beside OUT.",
        metavar="SIZE",
    ),
    "device_memory": option(
        str | None,
        COMPUTE,
        "Memory of the GPU to stay within, like 8GiB. (default: what is free; of a GPU that plan is told of, 80 GB)",
        metavar="SIZE",
    ),
    "activations_off_device": option(
        bool,
        COMPUTE,
        "Keep calibration activations in host memory, even where the GPU has room for them.",
        "--activations-off-device",
    ),
    "revision": option(str | None, COMPUTE, "Revision of a hub id."),
    "windows": option(int | None, TEXT, "Windows of each text. (default: all)"),
    "tasks": option(
        str | None,
        TASKS,
        "Multiple-choice tasks of lm-eval, or paper: boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge, "
        "openbookqa.",
        metavar="NAME,…",
    ),
    "tasks_folder": option(
        Path | None,
        TASKS,
        "Take tasks from FOLDER/NAME.jsonl, not from the hub; all of them without --tasks. Each line: "
        "query, choices, gold, or context_options, continuation, gold.",
        metavar="FOLDER",
    ),
    "limit": option(int | None, TASKS, "Examples of each task, at most."),
    "overwrite": option(bool, OUTPUT, "Replace OUT once the new one is complete.", "--overwrite"),
    "resume": option(bool, OUTPUT, "Go on with an unfinished run of OUT, if there is one.", "--resume"),
    "report": option(bool, OUTPUT, "Write OUT/report.html, a page with plots.", "--report/--no-report"),
}


def shown_in(*panels: str) -> tuple[str, ...]:
    """The names of the options that these panels of `--help` show."""
    return tuple(name for name, one in OPTIONS.items() if one.__metadata__[0].rich_help_panel in panels)


def takes(*names: str, **defaults: Any) -> Callable[[Command], Command]:
    """Give a command options of the table, before those of its own: they are its keyword arguments then.

    What is not given is left out, so that the configuration's default holds.

    Args:
        names: of options.
        defaults: of those whose default is another than `prune`'s.
    """

    def decorate(command: Command) -> Command:
        own = [one for one in inspect.signature(command).parameters.values() if one.kind is not one.VAR_KEYWORD]
        shared = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, _default(name)),
                annotation=OPTIONS[name],
            )
            for name in names
        ]

        @wraps(command)
        def with_what_is_given(**settings: Any) -> None:
            command(**{name: one for name, one in settings.items() if one is not None or name not in names})

        arguments = sum(one.default is one.empty for one in own)
        parameters = [one.replace(kind=one.KEYWORD_ONLY) for one in own]
        parameters[arguments:arguments] = shared
        with_what_is_given.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_what_is_given.__annotations__ = {one.name: one.annotation for one in parameters}
        return with_what_is_given

    return decorate


def _default(name: str) -> Any:
    """What `--help` shows: the setting's default, unless that is to find another, or empty."""
    field = PruneConfig.model_fields.get(name)
    return None if field is None or field.default in ((), {}) else field.default
