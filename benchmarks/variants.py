"""Compare variants of the steps beyond the paper, to choose the defaults. Resumable.

    python benchmarks/variants.py --data DATA --groups allocation,guard
    python benchmarks/variants.py --data DATA --variant "preset=mask target_mix=0.25" --targets 0.5,2:4

DATA as in `quality.py`: calibrated on C4, measured on the WikiText-2 validation text, and never on the test text.
A variant is a set of settings of `PruneConfig` and of `estimators.py` (`estimator`, `rounds`). It prints perplexity,
divergence and seconds of each. Finished cells are in `benchmarks/results/variants/cells`.
"""

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common import keep, model_folder, show
from estimators import ESTIMATORS, estimated
from quality_settings import CALIBRATION, ROOT, VALIDATION

from llm_barber.checkpoint.folder import claim_folder, locked
from llm_barber.cli.progress import ConsoleProgress
from llm_barber.comparison.compare import MARKER, calibration_file, make_runner
from llm_barber.progress import Progress
from llm_barber.record.report import RunReport
from llm_barber.run.commands import prune
from llm_barber.settings.compare import CompareConfig, target_settings
from llm_barber.settings.presets import REVISIONS, Allocation
from llm_barber.settings.prune import PruneConfig
from llm_barber.settings.refining import RefineSettings, windows_in_key

Variant = dict[str, Any]
WANDA: Variant = {"initial": "wanda", "rebuild": False}
REBUILT: Variant = {"initial": "wanda", "granularity": "output"}
UPDATED: Variant = {"rebuild": False, "keep_updates": True}
SPREAD = ("uniform", "loss")
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
# By group: the variants, and the targets that they are for.
GROUPS: dict[str, tuple[list[Variant], str]] = {
    "allocation": ([{**WANDA, "allocation": allocation} for allocation in ("uniform", "owl", "loss")], "0.5,0.6,0.7"),
    "allocated": (
        [
            *(
                {"initial": initial, **UPDATED, "allocation": how}
                for initial in ("sparsegpt", "alps")
                for how in SPREAD
            ),
            *({"preset": "mask", "allocation": how} for how in SPREAD),
        ],
        "0.5,0.6,0.7",
    ),
    "estimators": (
        [
            WANDA,
            *(
                {**REBUILT, "rebuild_ratio": ratio, "estimator": estimator, "rounds": rounds}
                for estimator in ESTIMATORS
                for ratio, rounds in ((0.01, 1), (0.1, 1), (0.02, 5))
            ),
        ],
        "0.5,2:4",
    ),
    "guard": (
        [{"preset": preset, "guard": guard} for preset in ("mask", "best") for guard in (0.0, 1 / 32, 1 / 8)],
        "0.5,2:4",
    ),
    "mix": ([{"preset": preset, "target_mix": mix} for preset in ("mask", "best") for mix in MIXES], "0.5,2:4"),
    "swap-mix": ([{**WANDA, "refine": "swaps", "target_mix": mix} for mix in MIXES], "0.5,2:4"),
    "least-squares-mix": (
        [{**WANDA, "reconstruct": "least-squares", "target_mix": mix} for mix in MIXES],
        "0.5,2:4",
    ),
    "swaps": ([{**WANDA, "refine": "swaps", "swaps": count} for count in (25, 100, 400, 1600)], "0.5,2:4"),
    "text": ([{"preset": "mask", **text} for text in ({}, {"calibration": "builtin"})], "0.5,2:4"),
    "steps": (
        [
            WANDA,
            {"initial": "wanda", "granularity": "block", "rebuild_ratio": 0.1},
            {**WANDA, "refine": "swaps"},
            {**WANDA, "reconstruct": "least-squares"},
            {"initial": "sparsegpt", **UPDATED},
            {**WANDA, "refine": "swaps", "reconstruct": "least-squares"},
            {"initial": "alps", **UPDATED},
            {**WANDA, "refine": "swaps", "reconstruct": "tune"},
            {**WANDA, "refine": "tune"},
            {**WANDA, "refine": "tune", "reconstruct": "tune"},
        ],
        "0.5,0.6,2:4",
    ),
}


def as_it_differs(variant: Variant, target: str, windows: int, seqlen: int) -> Variant:
    """Remove settings that equal the program's defaults, so that equal variants share a cell."""
    for name in {"guard", "target_mix", "allocation", "reorder", "tune_passes", "tune_windows"} & variant.keys():
        others = {setting: value for setting, value in variant.items() if setting != name}
        if resolved(others, target, windows, seqlen) == resolved(variant, target, windows, seqlen):
            variant = others
    return variant


def resolved(
    variant: Variant, target: str, windows: int, seqlen: int
) -> tuple[RefineSettings | None, Allocation, bool]:
    """Resolve a variant's settings and the defaults of the others, as the program does."""
    with estimated(variant) as settings:
        config = PruneConfig(model="model", output=Path("out"), **target_settings(target), **settings)
    refined = RefineSettings.of(config, config.target, windows, seqlen)
    if refined is not None and not config.prune_head:
        refined = replace(refined, head_mix=0)  # of nothing
    return refined, config.allocated_by, config.reorders


def words(variant: Variant) -> str:
    """A variant as NAME=VALUE NAME=VALUE …"""
    return " ".join(f"{name}={value}" for name, value in variant.items())


def read_variant(text: str) -> Variant:
    """Parse NAME=VALUE NAME=VALUE …; `PruneConfig` reads the values."""
    if wrong := [part for part in text.split() if "=" not in part]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not NAME=VALUE")
    return dict(part.split("=", 1) for part in text.split())


def make_model(progress: Progress, settings: Variant, folder: Path) -> RunReport:
    """Prune the model of the settings into a folder."""
    with estimated(settings) as prune_settings:
        return prune(PruneConfig(output=folder, overwrite=True, report=False, **prune_settings), progress)


def read_options() -> tuple[argparse.Namespace, list[tuple[Variant, str]]]:
    """Read the command line: its options, and the variants with a target each that it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--model", help="an ordinary checkpoint (default: SmolLM2-135M from its package)")
    parser.add_argument("--groups", default="", help=f"of {', '.join(GROUPS)}")
    parser.add_argument(
        "--variant",
        type=read_variant,
        action="append",
        default=[],
        help="NAME=VALUE …, settings of prune; again for more",
    )
    parser.add_argument("--targets", help="sparsities and patterns (default: 0.5, or the group's)")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := [group for group in options.groups.split(",") if group and group not in GROUPS]:
        parser.error(f"--groups: no {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    groups = [GROUPS[group] for group in options.groups.split(",") if group]
    groups += [(options.variant, "0.5")] if options.variant else []
    if not groups:
        parser.error("no --groups and no --variant: nothing to do")
    cells = [
        (variant, target)
        for variants, targets in groups
        for target in (options.targets or targets).split(",")
        for variant in variants
        if not (":" in target and "allocation" in variant)  # N:M is the same in every linear
    ]
    return options, cells


def main() -> None:
    options, cells = read_options()
    model = str(Path(model_folder(options.model)).resolve())
    os.chdir(options.data)  # so that results name texts as they lie in DATA
    config = CompareConfig(
        model=model, output=ROOT / "benchmarks" / "results" / "variants", calibration=CALIBRATION, text=(VALIDATION,),
        samples=options.samples, seqlen=options.seqlen, windows=options.windows, text_seqlen=1024,
        seeds=(options.seed,),
    )  # fmt: skip
    claim_folder(config.output, MARKER, "made by benchmarks/variants.py, which keeps finished cells here and goes on")
    rows = []
    with ConsoleProgress() as progress, locked(config.output / MARKER):
        runner = make_runner(config, model, progress)
        calibration = str(calibration_file(config, runner, model, options.seed, progress))
        dense = runner.dense(progress).texts[0].perplexity
        text = {"samples": options.samples, "seqlen": options.seqlen, "seed": options.seed}
        for variant, target in cells:
            differing = as_it_differs(variant, target, options.samples, options.seqlen)
            settings = {**target_settings(target), **differing}
            read = text if "calibration" in settings else {"calibration": calibration}
            key = {**settings, "seed": options.seed, "revisions": REVISIONS}
            refined, _, reordered = resolved(differing, target, options.samples, options.seqlen)
            if reordered:
                key["reorder"] = True
            if refined is not None and refined.of_layers:
                key |= windows_in_key(refined.sequences_a_step)
            make = partial(make_model, progress, {"model": model, **read, **settings})
            result = runner.run(f"variant-{target.replace(':', 'of')}", key, make, progress)
            evaluation = result.evaluation.texts[0]
            kl = "–" if evaluation.against is None else f"{evaluation.against.divergence:.3f}"
            rows.append([words(variant), target, f"{evaluation.perplexity:.2f}", kl, f"{result.seconds:.0f}"])
    title = f"{Path(model).name}, {options.samples} × {options.seqlen} tokens, seed {options.seed}; dense {dense:.2f}"
    headings = ["variant", "target", "perplexity", "KL", "seconds"]
    keep("variants", {"title": title, "headings": headings, "rows": rows})
    show(title, headings, rows)


if __name__ == "__main__":
    main()
