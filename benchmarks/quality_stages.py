"""Stages of `quality.py`: comparisons of methods, settings, numbers of windows, orders of steps."""

import shutil
from pathlib import Path

from quality_settings import (
    CALIBRATION,
    TARGETS,
    TASK_TARGETS,
    TEST,
    VALIDATION,
    RebuildSettings,
    Setup,
)

from llm_barber.checkpoint.folder import locked
from llm_barber.comparison.compare import MARKER, calibration_file, compare, make_runner
from llm_barber.comparison.planned import Cell, cell_settings
from llm_barber.comparison.result import CellResult, Comparison
from llm_barber.evaluation.evaluate import Evaluator
from llm_barber.masking.granularity import Granularity
from llm_barber.progress import Progress
from llm_barber.record.report import RunReport
from llm_barber.run.commands import prune, rebuild
from llm_barber.settings.compare import CompareConfig, CompareRow
from llm_barber.settings.evaluate import EvaluateConfig
from llm_barber.settings.prune import PruneConfig, RebuildConfig

# Settings of the rebuild that are tried at 50 %; the tables use the best on the validation text.
GRANULARITIES = (Granularity.OUTPUT, Granularity.INPUT, Granularity.LINEAR, Granularity.BLOCK)
RATIO = 0.1
RATIOS = {Granularity.OUTPUT: (0.01, 0.03, 0.3), Granularity.BLOCK: (0.01, 0.03, 0.3, 1.0)}
FULL = (CompareRow.MAGNITUDE, CompareRow.WANDA)
CALIBRATION_ROWS = (
    (CompareRow.WANDA, False),
    (CompareRow.WANDA, True),
    (CompareRow.MAGNITUDE, True),
    (CompareRow.MASK, False),
)


class Quality:
    """The stages of one model's benchmark; finished cells are not computed again."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.common = {
            "model": setup.model,
            "output": setup.output,
            "calibration": CALIBRATION,
            "samples": setup.samples,
            "seqlen": setup.seqlen,
            "text": (TEST,),
            "windows": setup.windows,
            "text_seqlen": 1024,
            "seeds": setup.seeds[:1],
        }
        self.choosing = {**self.common, "text": (TEST, VALIDATION)}
        self.evaluators: dict[EvaluateConfig, Evaluator] = {}

    def compare(self, config: CompareConfig, progress: Progress) -> Comparison:
        """Compare some rows, with the cells that other stages have computed."""
        return compare(config, progress, write=False, evaluator=lambda: self.evaluator(config, progress))

    def evaluator(self, config: CompareConfig, progress: Progress) -> Evaluator:
        """The evaluator of all stages that measure the same."""
        evaluation = config.evaluation(self.setup.model)
        if evaluation not in self.evaluators:
            self.evaluators = {evaluation: Evaluator(evaluation, progress)}
        return self.evaluators[evaluation]

    def choice_cells(self) -> list[tuple[CompareRow, Granularity, float]]:
        """The settings of the rebuild that are tried, by method."""
        cells = []
        for method in (
            CompareRow.MAGNITUDE,
            CompareRow.WANDA,
            CompareRow.SPARSEGPT,
            CompareRow.RIA,
            CompareRow.DSNOT,
        ):
            granularities = GRANULARITIES if method in FULL else (Granularity.OUTPUT, Granularity.BLOCK)
            cells += [(method, granularity, RATIO) for granularity in granularities]
            if method in FULL:
                cells += [(method, granularity, ratio) for granularity, ratios in RATIOS.items() for ratio in ratios]
        return cells

    def choice(self, progress: Progress) -> dict[tuple[CompareRow, Granularity, float], CellResult]:
        """Measure the settings that are tried, at 50 % with the first seed."""
        results = {}
        for method, granularity, ratio in self.choice_cells():
            config = CompareConfig(
                **self.choosing, methods=(method,), targets=("0.5",), rebuild_settings={method: (granularity, ratio)}
            )
            comparison = self.compare(config, progress)
            results[method, granularity, ratio] = _only(comparison, True)
        return results

    def chosen(self, progress: Progress) -> dict[CompareRow, tuple[Granularity, float]]:
        """Choose each method's setting with the lowest perplexity on the validation text."""
        if self.setup.rebuild_settings is not None:
            return self.setup.rebuild_settings
        results = self.choice(progress)
        best: RebuildSettings = {}
        for method in dict.fromkeys(key[0] for key in results):
            candidates = {key[1:]: results[key].evaluation.texts[1].perplexity for key in results if key[0] is method}
            best[method] = min(candidates, key=candidates.__getitem__)
        best[CompareRow.SPARSEGPT_UPDATES] = best[CompareRow.SPARSEGPT]
        return best

    def first(self, progress: Progress) -> Comparison:
        """All methods at all targets with the first seed: the tables, if there is no time for other seeds."""
        return self.main(progress, self.setup.seeds[:1])

    def rows(self, progress: Progress) -> list[Comparison]:
        """The extra rows."""
        return [
            self.table(progress, rows.seeds, (rows.method,), rows.targets, rows.rebuild) for rows in self.setup.rows
        ]

    def main(self, progress: Progress, seeds: tuple[int, ...] | None = None) -> Comparison:
        """All methods at all targets, all seeds."""
        return self.table(progress, seeds)

    def table(
        self,
        progress: Progress,
        seeds: tuple[int, ...] | None,
        methods: tuple[CompareRow, ...] | None = None,
        targets: tuple[str, ...] | None = None,
        rebuild: bool = True,
    ) -> Comparison:
        """Rows at all targets, with `rebuild` rebuilt, too; tasks for the first seed, at some targets."""
        tasks = {"tasks": self.setup.tasks, "tasks_folder": Path("tasks"), "limit": self.setup.limit, "task_seeds": 1}
        targets = targets or self.setup.targets
        chosen = self.chosen(progress) if rebuild else {}
        with_tasks = [target for target in targets if target in TASK_TARGETS and self.setup.limit]
        parts = []
        for target in sorted(targets, key=lambda target: target not in with_tasks):
            # N:M has the settings of the released experiments: those chosen at 50 % ruin it.
            settings = {**self.common, "rebuild": rebuild}
            settings |= {"rebuild_settings": {} if ":" in target else chosen}
            settings |= {"targets": (target,), "seeds": seeds or self.setup.seeds}
            settings |= {"methods": methods or self.setup.methods}
            parts.append(self.compare(CompareConfig(**settings, **(tasks if target in with_tasks else {})), progress))
        return parts[0].model_copy(update={"cells": tuple(cell for part in parts for cell in part.cells)})

    def sequences(self, progress: Progress) -> dict[tuple[CompareRow, bool, int], CellResult]:
        """Some rows at 50 %, first seed, by the number of calibration sequences."""
        chosen = self.chosen(progress)
        results = {}
        for count in self.setup.counts:
            for method, rebuilt in CALIBRATION_ROWS:
                config = CompareConfig(
                    **{**self.common, "samples": count},
                    methods=(method,),
                    targets=("0.5",),
                    rebuild=rebuilt,
                    rebuild_settings=chosen if rebuilt else {},
                )
                results[method, rebuilt, count] = _only(self.compare(config, progress), rebuilt)
        return results

    def order(self, progress: Progress) -> dict[CompareRow, tuple[CellResult, CellResult]]:
        """Initial mask and rebuild in one pass over the layers, and in two runs as released; 50 %."""
        chosen = self.chosen(progress)
        results = {}
        for method in (CompareRow.MAGNITUDE, CompareRow.WANDA, CompareRow.SPARSEGPT):
            settings = {"rebuild_settings": {method: chosen[method]}}
            config = CompareConfig(**self.common, methods=(method,), targets=("0.5",), **settings)
            fused = _only(self.compare(config, progress), True)
            results[method] = (fused, self._two_runs(config, method, chosen[method], progress))
        return results

    def _two_runs(
        self, config: CompareConfig, method: CompareRow, chosen: tuple[Granularity, float], progress: Progress
    ) -> CellResult:
        with locked(config.output / MARKER):
            return self._run_both(config, method, chosen, progress)

    def _run_both(
        self, config: CompareConfig, method: CompareRow, chosen: tuple[Granularity, float], progress: Progress
    ) -> CellResult:
        runner = make_runner(config, self.setup.model, progress, lambda: self.evaluator(config, progress))
        seed = self.setup.seeds[0]
        calibration = str(calibration_file(config, runner, self.setup.model, seed, progress))
        cell = Cell(method, True, "0.5", seed)

        def make(target: Path) -> RunReport:
            first = target.with_name(f"{target.name}-initial")
            shutil.rmtree(first, ignore_errors=True)
            before = prune(
                PruneConfig(model=self.setup.model, output=first, initial=method.initial, sparsity=0.5, rebuild=False,
                            calibration=calibration),
                progress,
            )  # fmt: skip
            report = rebuild(
                RebuildConfig(dense=self.setup.model, pruned=str(first), output=target, granularity=chosen[0],
                              rebuild_ratio=chosen[1], calibration=calibration, overwrite=True),
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


def together(parts: list[Comparison]) -> Comparison:
    """Join comparisons: their cells by target, each once."""
    unique = {(cell.method, cell.rebuilt, cell.target, cell.seed): cell for part in parts for cell in part.cells}
    cells = sorted(unique.values(), key=lambda cell: TARGETS.index(cell.target))
    seeds = sorted(set().union(*(part.settings["seeds"] for part in parts)))
    settings = {**parts[0].settings, "seeds": seeds, "task_seeds": 1}
    return parts[0].model_copy(update={"cells": tuple(cells), "settings": settings})
