"""Compare methods: prune a model in many ways, measure every result, and keep it."""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_barber.checkpoint.durable import save_tensors, write_durably
from llm_barber.checkpoint.folder import check_claimable, claim_folder, locked
from llm_barber.checkpoint.hub import warn_of_revision
from llm_barber.checkpoint.output import clear, work_folder
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.comparison.cells import Cell, Keys, cell_settings, digest, has_tasks, plan_cells, read_stored
from llm_barber.comparison.result import DENSE, CellResult, Comparison, ComparisonCell, DenseResult
from llm_barber.comparison.written import write_files
from llm_barber.errors import BarberError, SettingsError, UnfinishedRunError
from llm_barber.evaluation.evaluate import Evaluator
from llm_barber.evaluation.result import Evaluation
from llm_barber.evaluation.tasks import find_tasks
from llm_barber.evaluation.texts import check_text
from llm_barber.loading.configuration import check_positions, load_config
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.model.device import resolve_device
from llm_barber.progress import Progress, Silent
from llm_barber.run.commands import prune
from llm_barber.settings.base import takes
from llm_barber.settings.compare import CompareConfig
from llm_barber.settings.prune import PruneConfig
from llm_barber.text.calibration import check_calibration, load_calibration, token_shape
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX
from llm_barber.usage import machine, reset_peak_memory, versions

MARKER = "COMPARISON.txt"
CELLS = "cells"
MODELS = "models"
WORK = "work"  # the model of the cell at hand


@takes(CompareConfig)
def compare(config: CompareConfig, progress: Progress | None = None) -> Comparison:
    """Prune and measure every cell that is not finished; write tables, plot and page to `config.output`.

    All cells share the calibration tokens of a seed, the texts and tasks, and the dense model's predictions. They do
    not share decoder layers, since each cell's layers see the activations of its own pruned layers.

    Args:
        config: the settings.
        progress: told of each stage.

    Raises:
        BarberError: model, text, tasks or output are wrong. The error of a single cell is noted in the result.
    """
    progress = progress or Silent()
    resolve_device(config.device)  # what is wrong is reported before a model is downloaded
    find_tasks(config.tasks, config.tasks_folder, config.limit)
    for name in config.evaluation(config.model).texts:
        check_text(name)
    check_calibration(config.calibration)
    check_claimable(config.output, MARKER)
    warn_of_revision("revision", config.revision, config.model, progress)
    source = CheckpointSource(config.model, config.revision)
    model_config = load_config(source).get_text_config()
    of_tokens = config.calibration.endswith(TOKEN_FILE_SUFFIX)
    samples, seqlen = token_shape(config.calibration) if of_tokens else (config.samples, config.seqlen)
    check_positions(model_config, seqlen, None if of_tokens else "seqlen")
    if config.evaluation(config.model).texts:
        check_positions(model_config, config.text_seqlen, "text_seqlen")
    claim_folder(config.output, MARKER, "made by `llm-barber compare`, which keeps finished cells here and goes on")
    with locked(config.output / MARKER):
        runner = CellRunner(config, source.folder, progress)
        return runner.run({**config.model_dump(mode="json"), "samples": samples, "seqlen": seqlen})


class CellRunner:
    """Prunes and measures cells, and stores their results in the output's `cells/NAME-DIGEST.json`.

    Args:
        config: the settings.
        folder: of the dense model.
        progress: told of each stage.
    """

    def __init__(self, config: CompareConfig, folder: Path, progress: Progress) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self.keys = Keys(config, folder)
        (config.output / CELLS).mkdir(exist_ok=True)

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator, made when it is first needed: a finished comparison needs none."""
        return Evaluator(self.config.evaluation(str(self.folder)), self.progress)

    def run(self, settings: dict[str, Any]) -> Comparison:
        """Do the cells that are missing, and write the files of the comparison, which has these settings.

        Stopped before the end, the files have all cells that are finished; before any is, older files stay.
        """
        cells = list(plan_cells(self.config))
        missing = [cell for cell in cells if self.stored(cell) is None]
        self._clear_work(missing)
        # Made before anything is measured: a text that is too short is reported at once, and no cell's time has it.
        calibrations = {seed: self._calibration(seed) for seed in dict.fromkeys(cell.seed for cell in missing)}
        dense = self._dense()
        failures: dict[Cell, BarberError] = {}
        began = time.monotonic()
        try:
            for number, cell in enumerate(missing):
                minutes = (time.monotonic() - began) / max(1, number) * (len(missing) - number) / 60
                time_left = f", ETA {minutes:.0f} min" if number else ""
                self.progress.stage(f"cell {number + 1} of {len(missing)}: {cell.name}{time_left}")
                try:
                    self._measure(cell, calibrations[cell.seed])
                except SettingsError:
                    raise
                except BarberError as error:
                    self.progress.warn(f"{cell.name}: {error}")
                    failures[cell] = error
        finally:
            comparison = self._comparison(cells, failures, settings, dense)
            self._clear_work([cell for cell in missing if self.stored(cell) is None])
            if comparison.cells:
                write_files(comparison, self.config.output)
        self._warn_of_other_cells(comparison)
        return comparison

    def stored(self, cell: Cell) -> CellResult | None:
        """The stored result of a cell; None: it is not finished, or its model is asked for and was not kept."""
        key = self.keys.cell(cell)
        if self.config.keep_models and not self._target(cell).is_dir():
            return None
        return read_stored(self._file(cell.name, key), CellResult, key)

    def _file(self, name: str, key: dict[str, Any]) -> Path:
        return self.config.output / CELLS / f"{name}-{digest(key)}.json"

    def _target(self, cell: Cell) -> Path:
        """Folder of a cell's pruned model."""
        name = self._file(cell.name, self.keys.cell(cell)).stem
        return self.config.output / (MODELS if self.config.keep_models else WORK) / name

    def _clear_work(self, missing: Sequence[Cell]) -> None:
        """Remove models in the work folder that this comparison does not go on with; a link is left alone."""
        work = self.config.output / WORK
        targets = [self._target(cell) for cell in missing]
        with suppress(OSError):  # what cannot be removed is in no cell's way
            if not work.is_symlink():
                clear(work, {target.name for target in targets} | {work_folder(target).name for target in targets})
                work.rmdir()

    def _calibration(self, seed: int) -> Path:
        """The file of a seed's calibration tokens, made once, so that other programs can use the same tokens."""
        config = self.config
        if config.calibration.endswith(TOKEN_FILE_SUFFIX):
            return Path(config.calibration)
        name = f"calibration-seed{seed}-{digest(self.keys.calibration(seed))}{TOKEN_FILE_SUFFIX}"
        path = config.output / name
        if not path.exists():
            self.progress.stage(f"reading calibration text {config.calibration}")
            tokens = load_calibration(
                config.calibration, lambda: load_tokenizer(self.folder), config.samples, config.seqlen, seed, config.bos
            )
            temporary = path.with_name(f"{path.name}.tmp")
            save_tensors({"input_ids": tokens.input_ids}, temporary)
            temporary.rename(path)
        return path

    def _dense(self) -> Evaluation:
        """The dense model's evaluation, stored like a cell's."""
        key = self.keys.dense()
        path = self._file(DENSE, key)
        result = read_stored(path, DenseResult, key)
        if result is None:
            self.progress.stage("measuring the dense model")
            evaluation = self.evaluator.measure(str(self.folder), self.progress)
            result = DenseResult(key=key, evaluation=evaluation.model_copy(update={"model": DENSE, "against": DENSE}))
            write_durably(path, result.model_dump_json().encode())
        return result.evaluation

    def _measure(self, cell: Cell, calibration: Path) -> None:
        """Prune and measure a cell, or go on with what an interrupted comparison began; store the result."""
        config, target, key = self.config, self._target(cell), self.keys.cell(cell)
        evaluator = self.evaluator
        settings = PruneConfig(
            model=str(self.folder),
            output=target,
            calibration=str(calibration),
            batch_size=config.batch_size,
            device=config.device,
            dtype=config.dtype,
            overwrite=True,
            resume=not (config.keep_models and target.exists()),  # that model may be of an earlier program
            report=False,
            layers=config.layers,
            blocks=config.blocks,
            bos=config.bos,
            **cell_settings(config, cell),
        )
        reset_peak_memory()
        try:
            report = prune(settings, self.progress)
        except UnfinishedRunError as error:
            self.progress.warn(f"{cell.name} starts again: {error}")
            report = prune(settings.model_copy(update={"resume": False}), self.progress)
        evaluation = evaluator.measure(str(target), self.progress, has_tasks(config, cell))
        result = CellResult(
            name=cell.name,
            key=key,
            sparsity=report.sparsity,
            swapped=report.swapped,
            granularity=report.granularity,
            rebuild_ratio=report.rebuild_ratio,
            errors={block: (change.before, change.after) for block, change in report.error_changes().items()},
            seconds=report.seconds["total"],
            peak_memory=report.peak_memory,
            peak_device_memory=report.peak_device_memory,
            machine=machine(evaluator.device),
            # The folder is gone, or has another name on another machine.
            evaluation=evaluation.model_copy(update={"model": cell.name, "against": DENSE}),
        )
        write_durably(self._file(cell.name, key), result.model_dump_json().encode())
        if not config.keep_models:
            shutil.rmtree(target)

    def _comparison(
        self, cells: Sequence[Cell], failures: dict[Cell, BarberError], settings: dict[str, Any], dense: Evaluation
    ) -> Comparison:
        """The comparison of the cells that are finished, or failed."""
        results: list[ComparisonCell] = []
        for cell in cells:
            if cell in failures:
                error = failures[cell]
                results.append(ComparisonCell(**asdict(cell), failure=str(error), hint=str(error.hint)))
            elif (result := self.stored(cell)) is not None:
                results.append(ComparisonCell(**asdict(cell), result=result))
        return Comparison(
            model=self.config.model,
            settings=settings,
            device=dense.device,
            dtype=dense.dtype,
            versions=versions(),
            dense=dense,
            cells=tuple(results),
        )

    def _warn_of_other_cells(self, comparison: Comparison) -> None:
        stored = {path.stem for path in (self.config.output / CELLS).glob("*.json")}
        shown = sum(cell.result is not None for cell in comparison.cells)
        others = sum(not name.startswith(f"{DENSE}-") for name in stored) - shown
        if others:
            self.progress.warn(
                f"{self.config.output} keeps cells of other calls, too ({others}), and its tables have this call's: "
                "name all methods and targets in one call to see them together; finished cells are not done again"
            )
