"""Measure the held-out quality of every method on a model, and write its page. Resumable.

    python benchmarks/quality.py --data DATA [--model FOLDER --name NAME] [--seeds 0,1,2]

DATA has text/c4-sample.txt (calibration), text/wikitext2-validation.txt (choosing), text/wikitext2-raw-test.txt
(reporting) and tasks/NAME.jsonl, a file for each of --tasks. It prints the tables of perplexity, divergence and tasks,
and writes them to `docs/results/NAME.md`. Finished cells are in `benchmarks/results/NAME/cells` and are not computed
again.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from common import model_folder
from quality_page import Results, write_page
from quality_settings import (
    BEYOND,
    CALIBRATION_SEQUENCES,
    DEFAULT_NAME,
    DEFAULT_TITLE,
    ROOT,
    TARGETS,
    TASKS,
    Rows,
    Setup,
    read_numbers,
    read_settings,
    with_kept_rows,
    write_settings,
)
from quality_stages import Quality, together

from llm_barber.cli.progress import ConsoleProgress
from llm_barber.comparison.written import markdown
from llm_barber.progress import Progress
from llm_barber.settings.compare import PEERS, CompareRow

STAGES = ("choice", "first", "order", "sequences", "main", "rows")


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    setup = read_setup(parser, options)
    title = options.title or options.name or DEFAULT_TITLE
    os.chdir(options.data)  # so that results name texts as they lie in DATA
    quality = Quality(setup)
    with ConsoleProgress() as progress:
        if options.only:
            stage = getattr(quality, options.only)(progress)
            if options.only == "rows":
                print(markdown(together(stage).model_copy(update={"model": title})))
            return
        results = run_stages(quality, options.settings_of, progress)
    write_page(ROOT / "docs" / "results", setup.name, title, results)
    print(markdown(results.comparison.model_copy(update={"model": title})))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and tasks/")
    parser.add_argument("--model", help="an ordinary checkpoint (default: SmolLM2-135M from its package)")
    parser.add_argument("--name", help="of the results; needed with --model")
    parser.add_argument("--title", help="of the page (default: the name)")
    parser.add_argument("--seeds", default="0,1,2", help="calibration seeds")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text, of 1024 tokens")
    parser.add_argument("--limit", type=int, default=300, help="examples of each task; 0: no tasks")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names; paper: the seven of arXiv 2408.10631")
    parser.add_argument("--methods", default=",".join(PEERS), help="rows of the main tables; '': none")
    parser.add_argument("--targets", default=",".join(TARGETS), help="sparsities and N:M patterns")
    parser.add_argument(
        "--rows",
        metavar="METHOD[+rebuild]=TARGET,…[@SEED,…]",
        action="append",
        default=[],
        help="extra rows, beside those that the page has already; repeat for more; '': none (default: ALPS and the "
        "presets, all targets, first seed)",
    )
    parser.add_argument("--counts", default=",".join(map(str, CALIBRATION_SEQUENCES)), help="of calibration sequences")
    parser.add_argument("--settings-of", metavar="NAME", help="take the rebuild's settings from that model's results")
    parser.add_argument("--only", choices=STAGES, help="run one stage, and write no page")
    return parser


def read_setup(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Setup:
    """Resolve the options; the parser ends the program where they are wrong."""
    if options.model and not options.name:
        parser.error("--model needs a --name for its results")
    seeds = read_numbers(options.seeds)
    rows = options.rows or [f"{method}={options.targets}" for method in BEYOND]
    try:
        extra_rows = tuple(Rows.read(text, seeds[:1]) for text in rows if text)
    except ValueError as error:
        parser.error(f"--rows: {error}")
    setup = Setup(
        model=str(Path(model_folder(options.model)).resolve()),
        name=options.name or DEFAULT_NAME,
        seeds=seeds,
        samples=options.samples,
        seqlen=options.seqlen,
        windows=options.windows,
        limit=options.limit,
        tasks=tuple(options.tasks.split(",")),
        targets=tuple(options.targets.split(",")),
        counts=read_numbers(options.counts),
        methods=tuple(CompareRow(name) for name in options.methods.split(",") if name),
        rows=extra_rows,
        rebuild_settings=read_settings(options.settings_of) if options.settings_of else None,
    )
    if options.only:
        return setup
    setup = replace(setup, rows=with_kept_rows(setup.output / "rows.json", extra_rows))
    if not setup.methods and not setup.rows:
        parser.error("no --methods and no --rows: nothing to do")
    return setup


def run_stages(quality: Quality, settings_of: str | None, progress: Progress) -> Results:
    """Run all stages; where the rebuild's settings are another model's, only the tables."""
    setup = quality.setup
    parts = []
    choice, sequences, order = {}, {}, {}
    if setup.rebuild_settings is None:
        quality.first(progress)
        order, sequences = quality.order(progress), quality.sequences(progress)
        choice = quality.choice(progress)
        write_settings(setup.name, quality.chosen(progress))
    if setup.methods:
        parts.append(quality.main(progress))
    parts += quality.rows(progress)
    kept = setup.output / "llm-compressor.json"
    elsewhere = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    return Results(together(parts), choice, sequences, order, settings_of, elsewhere)


if __name__ == "__main__":
    main()
