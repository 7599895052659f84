"""Held-out quality of every method on real models: makes the generated pages of `docs/results`. Resumable.

    python benchmarks/quality.py --data DATA [--model FOLDER --name NAME] [--seeds 0,1,2]

DATA has text/c4-sample.txt (calibration), text/wikitext2-validation.txt (choosing), text/wikitext2-raw-test.txt
(reporting) and tasks/arc_easy.jsonl, tasks/hellaswag.jsonl. Finished cells are in `benchmarks/results/NAME/cells` and
are not done again.
"""

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from common import model_folder
from quality_page import write_page

from llm_barber.checkpoint.folder import locked
from llm_barber.cli.progress import ConsoleProgress
from llm_barber.comparison.compare import MARKER, calibration_file, compare, make_runner
from llm_barber.comparison.planned import Cell, cell_settings
from llm_barber.comparison.result import CellResult, Comparison
from llm_barber.comparison.tables import markdown
from llm_barber.evaluation.evaluate import Evaluator
from llm_barber.masking.granularity import Granularity
from llm_barber.progress import Progress
from llm_barber.record.report import RunReport
from llm_barber.run.commands import prune, rebuild
from llm_barber.settings.compare import PEERS, CompareConfig, Method
from llm_barber.settings.evaluate import EvaluateConfig
from llm_barber.settings.prune import PruneConfig, RebuildConfig

ROOT = Path(__file__).parent.parent
CALIBRATION, VALIDATION, TEST = "text/c4-sample.txt", "text/wikitext2-validation.txt", "text/wikitext2-raw-test.txt"
TASKS = ("arc_easy", "hellaswag")
TARGETS = ("0.5", "0.6", "0.7", "2:4", "4:8")
TASK_TARGETS = ("0.5", "2:4")
# Settings of the rebuild that are tried at 50 %; the best on the validation text is used in the tables.
GRANULARITIES = (Granularity.OUTPUT, Granularity.INPUT, Granularity.LINEAR, Granularity.BLOCK)
RATIO = 0.1
RATIOS = {Granularity.OUTPUT: (0.01, 0.03, 0.3), Granularity.BLOCK: (0.01, 0.03, 0.3, 1.0)}
FULL = (Method.MAGNITUDE, Method.WANDA)
CALIBRATION_SEQUENCES = (4, 8, 16, 32, 64, 128)
CALIBRATION_ROWS = (
    (Method.WANDA, False),
    (Method.WANDA, True),
    (Method.MAGNITUDE, True),
    (Method.MASK, False),
)
DEFAULT_NAME, DEFAULT_TITLE = "smollm2-135m", "SmolLM2-135M-Instruct (from a 4-bit GGUF)"
# Beyond the paper and its peers: ADMM as a baseline, and what the presets are.
BEYOND = (Method.ALPS, Method.MASK, Method.BEST)
REBUILT = "+rebuild"
STAGES = ("choice", "first", "order", "sequences", "main", "rows")


@dataclass(frozen=True)
class Rows:
    """What is asked for by itself: a method at some targets with some seeds; with `rebuild` its masks rebuilt, too."""

    method: Method
    targets: tuple[str, ...]
    seeds: tuple[int, ...]
    rebuild: bool

    @classmethod
    def read(cls, given: str, seeds: tuple[int, ...]) -> "Rows":
        """From METHOD[+rebuild]=TARGET,…[@SEED,…]."""
        row, _, own = given.partition("@")
        method, _, targets = row.partition("=")
        name = method.removesuffix(REBUILT)
        found = cls(Method(name), tuple(targets.split(",")), _numbers(own) if own else seeds, name != method)
        if unknown := set(found.targets) - set(TARGETS):
            raise ValueError(f"no target {', '.join(map(repr, sorted(unknown)))}")
        if found.rebuild and found.method.preset is not None:
            raise ValueError(f"{found.method} is a preset, which rebuilds or does not")
        return found

    def __str__(self) -> str:
        method = f"{self.method}{REBUILT * self.rebuild}"
        return f"{method}={','.join(self.targets)}@{','.join(map(str, self.seeds))}"


def with_kept_rows(path: Path, asked: tuple[Rows, ...]) -> tuple[Rows, ...]:
    """Those that a model's part of the page has already, and those that are asked for now; all are kept in the file."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    every = list(dict.fromkeys([*kept, *map(str, asked)]))
    if every:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    return tuple(Rows.read(one, ()) for one in every)


class Quality:
    """The settings of one model's benchmark, and its stages.

    Args:
        model: folder.
        name: of the results.
        seeds: calibration seeds of the main tables.
        samples: calibration windows.
        seqlen: tokens a calibration window.
        windows: windows of each text.
        limit: examples of each task; 0: no tasks.
        targets: sparsities and patterns.
        settings: of the rebuild, where they were chosen on another model.
    """

    def __init__(
        self,
        model: str,
        name: str,
        seeds: tuple[int, ...],
        samples: int = 16,
        seqlen: int = 512,
        windows: int = 16,
        limit: int = 300,
        targets: tuple[str, ...] = TARGETS,
        settings: dict[Method, tuple[Granularity, float]] | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.output = ROOT / "benchmarks" / "results" / name
        self.common = {
            "model": model,
            "output": self.output,
            "calibration": CALIBRATION,
            "samples": samples,
            "seqlen": seqlen,
            "text": (TEST,),
            "windows": windows,
            "text_seqlen": 1024,
            "seeds": seeds[:1],
        }
        self.choosing = {**self.common, "text": (TEST, VALIDATION)}
        self.evaluators: dict[EvaluateConfig, Evaluator] = {}
        self.seeds = seeds
        self.limit = limit
        self.targets = targets
        self.counts = CALIBRATION_SEQUENCES
        self.methods: tuple[Method, ...] = PEERS
        self.more_rows: tuple[Rows, ...] = ()
        self.settings = settings

    def compare(self, config: CompareConfig, progress: Progress) -> Comparison:
        """A part of the work, with what other parts of it have already computed."""
        return compare(config, progress, write=False, evaluator=lambda: self.evaluator(config, progress))

    def evaluator(self, config: CompareConfig, progress: Progress) -> Evaluator:
        """One for all parts that measure alike."""
        evaluation = config.evaluation(self.model)
        if evaluation not in self.evaluators:
            self.evaluators = {evaluation: Evaluator(evaluation, progress)}
        return self.evaluators[evaluation]

    def choice_cells(self) -> list[tuple[Method, Granularity, float]]:
        """Every setting of the rebuild that is tried."""
        cells = []
        for method in (Method.MAGNITUDE, Method.WANDA, Method.SPARSEGPT, Method.RIA, Method.DSNOT):
            granularities = GRANULARITIES if method in FULL else (Granularity.OUTPUT, Granularity.BLOCK)
            cells += [(method, granularity, RATIO) for granularity in granularities]
            if method in FULL:
                cells += [(method, granularity, ratio) for granularity, ratios in RATIOS.items() for ratio in ratios]
        return cells

    def choice(self, progress: Progress) -> dict[tuple[Method, Granularity, float], CellResult]:
        """All of them at 50 %, first seed."""
        found = {}
        for method, granularity, ratio in self.choice_cells():
            config = CompareConfig(
                **self.choosing, methods=(method,), targets=("0.5",), rebuild_settings={method: (granularity, ratio)}
            )
            comparison = self.compare(config, progress)
            found[method, granularity, ratio] = _only(comparison, True)
        return found

    def chosen(self, progress: Progress) -> dict[Method, tuple[Granularity, float]]:
        """The setting of each method with the lowest perplexity on the validation text."""
        if self.settings is not None:
            return self.settings
        found = self.choice(progress)
        best = {}
        for method in dict.fromkeys(key[0] for key in found):
            candidates = {key[1:]: found[key].evaluation.texts[1].perplexity for key in found if key[0] is method}
            best[method] = min(candidates, key=candidates.__getitem__)
        best[Method.SPARSEGPT_UPDATES] = best[Method.SPARSEGPT]
        return best

    def first(self, progress: Progress) -> Comparison:
        """All methods at all targets with the first seed: the tables, should there be no time for the others."""
        return self.main(progress, self.seeds[:1])

    def rows(self, progress: Progress) -> list[Comparison]:
        """Those that are asked for by themselves: as many targets and seeds as there is time for."""
        return [self.table(progress, one.seeds, (one.method,), one.targets, one.rebuild) for one in self.more_rows]

    def main(self, progress: Progress, seeds: tuple[int, ...] | None = None) -> Comparison:
        """All methods at all targets, all seeds."""
        return self.table(progress, seeds)

    def table(
        self,
        progress: Progress,
        seeds: tuple[int, ...] | None,
        methods: tuple[Method, ...] | None = None,
        targets: tuple[str, ...] | None = None,
        rebuild: bool = True,
    ) -> Comparison:
        """Rows at all targets, rebuilt, too, if that is wanted; tasks for the first seed, at some targets."""
        tasks = {"tasks": TASKS, "tasks_folder": Path("tasks"), "limit": self.limit, "task_seeds": 1}
        targets = targets or self.targets
        chosen = self.chosen(progress) if rebuild else {}
        with_tasks = [target for target in targets if target in TASK_TARGETS and self.limit]
        parts = []
        for target in sorted(targets, key=lambda target: target not in with_tasks):
            # N:M with the released experiments' settings: chosen at 50 %, they ruin it.
            own = {**self.common, "rebuild": rebuild}
            own |= {"rebuild_settings": {} if ":" in target else chosen}
            own |= {"targets": (target,), "seeds": seeds or self.seeds}
            own |= {"methods": methods or self.methods}
            parts.append(self.compare(CompareConfig(**own, **(tasks if target in with_tasks else {})), progress))
        return parts[0].model_copy(update={"cells": tuple(cell for part in parts for cell in part.cells)})

    def sequences(self, progress: Progress) -> dict[tuple[Method, bool, int], CellResult]:
        """Some rows at 50 %, first seed, by the number of calibration sequences."""
        chosen = self.chosen(progress)
        found = {}
        for count in self.counts:
            for method, rebuilt in CALIBRATION_ROWS:
                config = CompareConfig(
                    **{**self.common, "samples": count},
                    methods=(method,),
                    targets=("0.5",),
                    rebuild=rebuilt,
                    rebuild_settings=chosen if rebuilt else {},
                )
                found[method, rebuilt, count] = _only(self.compare(config, progress), rebuilt)
        return found

    def order(self, progress: Progress) -> dict[Method, tuple[CellResult, CellResult]]:
        """Initial mask and rebuild layer by layer in one pass, and one run after the other, as released; 50 %."""
        chosen = self.chosen(progress)
        found = {}
        for method in (Method.MAGNITUDE, Method.WANDA, Method.SPARSEGPT):
            settings = {"rebuild_settings": {method: chosen[method]}}
            config = CompareConfig(**self.common, methods=(method,), targets=("0.5",), **settings)
            fused = _only(self.compare(config, progress), True)
            found[method] = (fused, self._one_after_the_other(config, method, chosen[method], progress))
        return found

    def _one_after_the_other(
        self, config: CompareConfig, method: Method, chosen: tuple[Granularity, float], progress: Progress
    ) -> CellResult:
        with locked(config.output / MARKER):
            return self._run_both(config, method, chosen, progress)

    def _run_both(
        self, config: CompareConfig, method: Method, chosen: tuple[Granularity, float], progress: Progress
    ) -> CellResult:
        runner = make_runner(config, self.model, progress, lambda: self.evaluator(config, progress))
        seed = self.seeds[0]
        calibration = str(calibration_file(config, runner, self.model, seed, progress))
        cell = Cell(method, True, "0.5", seed)

        def make(target: Path) -> RunReport:
            first = target.with_name(f"{target.name}-initial")
            shutil.rmtree(first, ignore_errors=True)
            before = prune(
                PruneConfig(model=self.model, output=first, initial=method.initial, sparsity=0.5, rebuild=False,
                            calibration=calibration),
                progress,
            )  # fmt: skip
            report = rebuild(
                RebuildConfig(dense=self.model, pruned=str(first), output=target, granularity=chosen[0],
                              rebuild_ratio=chosen[1], calibration=calibration),
                progress,
            )  # fmt: skip
            shutil.rmtree(first)
            seconds = {**report.seconds, "total": report.seconds["total"] + before.seconds["total"]}
            return report.model_copy(update={"seconds": seconds})

        settings = {**cell_settings(config, cell), "order": "one after the other"}
        return runner.run(f"{cell.name}-released-order", settings, make, progress)


def _only(comparison: Comparison, rebuilt: bool) -> CellResult:
    (result,) = [cell.result for cell in comparison.cells if cell.rebuilt is rebuilt]
    if result is None:
        raise SystemExit(f"a cell failed: {comparison.failures[0].failure}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and tasks/")
    parser.add_argument("--model", help="an ordinary checkpoint (default: SmolLM2-135M from its package)")
    parser.add_argument("--name", help="of the results; needed with --model")
    parser.add_argument("--title", help="of its part of the page (default: the name)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--limit", type=int, default=300, help="examples of each task; 0: no tasks")
    parser.add_argument("--methods", default=",".join(PEERS), help="rows of the main tables; '': none")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument(
        "--rows",
        metavar="METHOD[+rebuild]=TARGET,…[@SEED,…]",
        action="append",
        default=[],
        help="more rows, beside those that the page has already; again for others; '': none (default: ALPS and the "
        "presets, all targets, first seed)",
    )
    parser.add_argument("--counts", default=",".join(map(str, CALIBRATION_SEQUENCES)), help="of calibration sequences")
    parser.add_argument("--settings-of", metavar="NAME", help="take the rebuild's settings from that model's results")
    parser.add_argument("--only", choices=STAGES)
    options = parser.parse_args()
    if options.model and not options.name:
        parser.error("--model needs a --name for its results")
    name, title = options.name or DEFAULT_NAME, options.title or options.name or DEFAULT_TITLE
    model = str(Path(model_folder(options.model)).resolve())
    os.chdir(options.data)  # so that results name texts as they lie in DATA
    quality = Quality(
        model, name, _numbers(options.seeds), options.samples, options.seqlen,
        options.windows, options.limit, tuple(options.targets.split(",")),
        read_settings(options.settings_of) if options.settings_of else None,
    )  # fmt: skip
    quality.counts = _numbers(options.counts)
    quality.methods = tuple(Method(name) for name in options.methods.split(",") if name)
    given = options.rows or [f"{method}={options.targets}" for method in BEYOND]
    try:
        quality.more_rows = tuple(Rows.read(one, quality.seeds[:1]) for one in given if one)
    except ValueError as error:
        parser.error(f"--rows: {error}")
    if not options.only:
        quality.more_rows = with_kept_rows(quality.output / "rows.json", quality.more_rows)
        if not quality.methods and not quality.more_rows:
            parser.error("no --methods and no --rows: nothing to do")
    with ConsoleProgress() as progress:
        if options.only:
            found = getattr(quality, options.only)(progress)
            if options.only == "rows":
                print(markdown(together(found).model_copy(update={"model": title})))
            return
        parts: list[Comparison] = []
        choice, sequences, order = {}, {}, {}
        if quality.settings is None:
            quality.first(progress)
            order, sequences = quality.order(progress), quality.sequences(progress)
            choice = quality.choice(progress)
            write_settings(name, quality.chosen(progress))
        if quality.methods:
            parts.append(quality.main(progress))
        parts += quality.rows(progress)
    comparison = together(parts)
    kept = quality.output / "llm-compressor.json"
    elsewhere = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    write_page(
        ROOT / "docs" / "results", name, title, comparison, choice, sequences, order, options.settings_of, elsewhere
    )
    print(markdown(comparison.model_copy(update={"model": title})))


def together(parts: list[Comparison]) -> Comparison:
    """As one: its cells by target, each once."""
    each = {(cell.method, cell.rebuilt, cell.target, cell.seed): cell for part in parts for cell in part.cells}
    cells = sorted(each.values(), key=lambda cell: TARGETS.index(cell.target))
    seeds = sorted(set().union(*(part.settings["seeds"] for part in parts)))
    settings = {**parts[0].settings, "seeds": seeds, "task_seeds": 1}
    return parts[0].model_copy(update={"cells": tuple(cells), "settings": settings})


def _numbers(given: str) -> tuple[int, ...]:
    return tuple(int(number) for number in given.split(","))


def write_settings(name: str, settings: dict[Method, tuple[Granularity, float]]) -> None:
    """Keep the chosen settings of the rebuild, for other models."""
    path = ROOT / "benchmarks" / "results" / name / "settings.json"
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def read_settings(name: str) -> dict[Method, tuple[Granularity, float]]:
    """What `write_settings` kept."""
    kept = json.loads((ROOT / "benchmarks" / "results" / name / "settings.json").read_text(encoding="utf-8"))
    return {Method(method): (Granularity(granularity), ratio) for method, (granularity, ratio) in kept.items()}


if __name__ == "__main__":
    main()
