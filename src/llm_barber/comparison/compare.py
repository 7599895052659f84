"""Methods side by side: every method, without and with rebuild, at every sparsity and pattern, on the same work."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llm_barber.checkpoint.durable import save_tensors
from llm_barber.checkpoint.folder import claim_folder, locked
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.comparison.cells import CALIBRATION, CellResult, CellRunner, fingerprint, source_fingerprint
from llm_barber.comparison.planned import Cell, cell_key, cell_settings, plan_cells, with_tasks
from llm_barber.errors import BarberError, SettingsError
from llm_barber.evaluation.evaluate import Evaluation, Evaluator
from llm_barber.evaluation.tasks import find_tasks
from llm_barber.evaluation.texts import check_text
from llm_barber.loading.opening import load_tokenizer
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.progress import Progress, Silent
from llm_barber.run.commands import prune
from llm_barber.settings.compare import CompareConfig, Method
from llm_barber.settings.prune import PruneConfig
from llm_barber.text.calibration import load_calibration, token_shape
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX
from llm_barber.text.windows import beginning_of_texts
from llm_barber.usage import versions

MARKER = "COMPARISON.txt"


class ComparisonCell(BaseModel):
    """A cell, and what came out of it, or why nothing did."""

    model_config = ConfigDict(frozen=True)

    method: Method
    rebuilt: bool
    target: str
    seed: int
    result: CellResult | None = None
    failure: str | None = None


class Comparison(BaseModel):
    """A whole comparison: the dense model's evaluation and all cells so far."""

    model_config = ConfigDict(frozen=True)

    model: str
    settings: dict[str, Any]
    device: str
    dtype: str
    versions: dict[str, str]
    dense: Evaluation
    cells: tuple[ComparisonCell, ...]

    @property
    def failures(self) -> list[ComparisonCell]:
        """Cells that could not be done."""
        return [cell for cell in self.cells if cell.failure is not None]


def compare(
    config: CompareConfig,
    progress: Progress | None = None,
    write: bool = True,
    evaluator: Callable[[], Evaluator] | None = None,
) -> Comparison:
    """Prune and measure every cell, or take it up from an earlier run; writes tables, plot and page to `config.output`.

    Work that is shared: the calibration tokens of a seed, the texts and tasks, and what the dense model predicts. The
    decoder layers are not, since each cell's layers see the activations of its own pruned ones.

    Args:
        config: the settings.
        progress: told of each stage.
        write: write tables, plot and page, too; cells are kept in any case.
        evaluator: gives one of `config.evaluation(folder)`, for what it has already computed; asked if it is needed.
            None: a new one.

    Raises:
        BarberError: model, text, tasks or output are wrong. A single cell that cannot be done is noted in the result.
    """
    from llm_barber.comparison.render import write_files  # with matplotlib

    progress = progress or Silent()
    folder = str(CheckpointSource(config.model, config.revision).folder)
    device = resolve_device(config.device)
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    # What is wrong with texts and tasks is told before anything is written.
    find_tasks(config.tasks, config.tasks_folder, config.limit)
    for name in config.evaluation(folder).texts:
        check_text(name)
    claim_folder(config.output, MARKER, "made by `llm-barber compare`, which keeps finished cells here and goes on")
    with locked(config.output / MARKER):
        runner = make_runner(config, folder, progress, evaluator)
        cells = list(plan_cells(config))
        missing = [cell for cell in cells if not _finished(runner, config, cell)]
        shape: tuple[int, ...] = (config.samples, config.seqlen)
        if config.calibration.endswith(TOKEN_FILE_SUFFIX):  # whose windows are as they are, computed anew or not
            shape = token_shape(config.calibration)
        calibrations: dict[int, Path] = {}  # by seed
        for seed in dict.fromkeys(cell.seed for cell in missing):
            # Made before anything is measured: a text that is too short is told now, and no cell's time has it.
            calibrations[seed] = calibration_file(config, runner, folder, seed, progress)
        dense = runner.dense(progress)
        results: list[ComparisonCell] = []

        def comparison() -> Comparison:
            return Comparison(
                model=config.model,
                settings={**config.model_dump(mode="json"), "samples": shape[0], "seqlen": shape[1]},
                device=str(device),
                dtype=dtype,
                versions=versions(),
                dense=dense,
                cells=tuple(results),
            )

        began, measured = time.monotonic(), 0
        try:
            for number, cell in enumerate(cells, 1):
                if cell in missing:
                    left = ""
                    if measured:  # kept cells take no time
                        seconds = (time.monotonic() - began) / measured * (len(missing) - measured)
                        left = f", ETA {seconds / 60:.0f} min"
                    progress.stage(f"cell {number} of {len(cells)}: {cell.name}{left}")
                    measured += 1
                results.append(_run_cell(runner, config, folder, cell, calibrations.get(cell.seed), progress))
        finally:
            if write and results:  # stopped before the first cell: older tables stay
                write_files(comparison(), config.output)
        others = runner.count - sum(one.result is not None for one in results)
        if write and others:
            progress.warn(
                f"{config.output} keeps cells of other calls, too ({others}), and its tables have this call's: "
                "name all methods and targets in one call to see them together; finished cells are not done again"
            )
    return comparison()


def make_runner(
    config: CompareConfig, folder: str, progress: Progress, evaluator: Callable[[], Evaluator] | None = None
) -> CellRunner:
    """The runner of a comparison's cells; what they all depend on is in its keys.

    Args:
        config: the settings.
        folder: the dense model's.
        progress: told of each stage.
        evaluator: as in `compare`.
    """
    evaluation = config.evaluation(folder)
    device = resolve_device(config.device)
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    tasks = [
        [task.name, task.sha256, config.limit] for task in find_tasks(config.tasks, config.tasks_folder, config.limit)
    ]
    common: dict[str, Any] = {
        "model": fingerprint(Path(folder)),
        CALIBRATION: [
            config.calibration,
            source_fingerprint(config.calibration),
            config.samples,
            config.seqlen,
        ],
        "texts": [[name, source_fingerprint(name)] for name in evaluation.texts],
        "windows": [config.windows, config.text_seqlen],
        "compute": [str(device), dtype],
        "version": versions()["llm-barber"],
    }
    if _begins_texts(folder):
        common["bos"] = config.bos
    if config.layers or config.blocks:
        common["structure"] = [config.layers, [asdict(block) for block in config.blocks]]
    return CellRunner(
        config.output, evaluator or (lambda: Evaluator(evaluation, progress)), common, tasks, config.keep_models
    )


def _run_cell(
    runner: CellRunner,
    config: CompareConfig,
    folder: str,
    cell: Cell,
    calibration: Path | None,
    progress: Progress,
) -> ComparisonCell:
    values: dict[str, Any] = {
        "method": cell.method, "rebuilt": cell.rebuilt, "target": cell.target, "seed": cell.seed,
    }  # fmt: skip

    def make(target: Path) -> Any:
        return prune(
            PruneConfig(
                model=folder,
                output=target,
                calibration=str(calibration),
                batch_size=config.batch_size,
                device=config.device,
                dtype=config.dtype,
                overwrite=True,
                report=False,
                layers=config.layers,
                blocks=config.blocks,
                bos=config.bos,
                **cell_settings(config, cell),
            ),
            progress,
        )

    try:
        return ComparisonCell(
            **values, result=runner.run(cell.name, cell_key(config, cell), make, progress, with_tasks(config, cell))
        )
    except SettingsError:
        raise
    except BarberError as error:
        progress.warn(f"{cell.name}: {error}")
        return ComparisonCell(**values, failure=str(error))


def _finished(runner: CellRunner, config: CompareConfig, cell: Cell) -> bool:
    return runner.finished(cell.name, cell_key(config, cell), with_tasks(config, cell)) is not None


def _begins_texts(folder: str) -> bool:
    """Does the model's tokenizer put a BOS token in front of texts?"""
    tokenizer = load_tokenizer(Path(folder))
    return tokenizer is not None and len(beginning_of_texts(tokenizer)) > 0


def calibration_file(config: CompareConfig, runner: CellRunner, folder: str, seed: int, progress: Progress) -> Path:
    """The calibration tokens of a seed, made once: other programs can be run on the very same ones."""
    if config.calibration.endswith(TOKEN_FILE_SUFFIX):
        return Path(config.calibration)
    common = runner.common
    made_from = [common["model"], *common[CALIBRATION], seed, *(["bos"] if common.get("bos") else [])]
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    path = config.output / f"calibration-seed{seed}-{digest[:12]}{TOKEN_FILE_SUFFIX}"
    if not path.exists():
        progress.stage(f"reading calibration text {config.calibration}")
        tokens = load_calibration(
            config.calibration, lambda: load_tokenizer(Path(folder)), config.samples, config.seqlen, seed, config.bos
        )
        temporary = path.with_name(f"{path.name}.tmp")
        save_tensors({"input_ids": tokens.input_ids}, temporary)
        temporary.rename(path)
    return path
