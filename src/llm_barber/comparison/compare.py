"""Compare methods: prune a model in many ways and measure every result."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_barber.checkpoint.durable import save_tensors
from llm_barber.checkpoint.folder import check_claimable, claim_folder, locked
from llm_barber.checkpoint.hub import warn_of_revision
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.comparison.cells import CALIBRATION, CellRunner, fingerprint, source_fingerprint
from llm_barber.comparison.planned import Cell, calibration_shape, cell_key, cell_settings, has_tasks, plan_cells
from llm_barber.comparison.render import write_files
from llm_barber.comparison.result import CellResult, Comparison, ComparisonCell
from llm_barber.errors import BarberError, SettingsError, UnfinishedRunError
from llm_barber.evaluation.evaluate import Evaluator
from llm_barber.evaluation.result import Evaluation
from llm_barber.evaluation.tasks import find_tasks, lm_eval_version
from llm_barber.evaluation.texts import check_text
from llm_barber.loading.configuration import check_positions, load_config
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.progress import Progress, Silent
from llm_barber.run.commands import prune
from llm_barber.settings.checked import takes
from llm_barber.settings.compare import CompareConfig
from llm_barber.settings.prune import PruneConfig
from llm_barber.text.calibration import check_calibration, load_calibration, token_shape
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX
from llm_barber.text.windows import beginning_of_texts
from llm_barber.usage import readable_bytes, versions

MARKER = "COMPARISON.txt"


@takes(CompareConfig)
def compare(
    config: CompareConfig,
    progress: Progress | None = None,
    write: bool = True,
    evaluator: Callable[[], Evaluator] | None = None,
) -> Comparison:
    """Prune and measure every cell that is not finished; write tables, plot and page to `config.output`.

    All cells share the calibration tokens of a seed, the texts and tasks, and the dense model's predictions. They do
    not share decoder layers, since each cell's layers see the activations of its own pruned layers.

    Args:
        config: the settings.
        progress: told of each stage.
        write: write tables, plot and page, too; the results of cells are stored in any case.
        evaluator: gives an evaluator of `config.evaluation(folder)`, for the predictions that it already has; called
            when it is needed. None: a new evaluator.

    Raises:
        BarberError: model, text, tasks or output are wrong. The error of a single cell is noted in the result.
    """
    progress = progress or Silent()
    _check_before_opening(config)
    warn_of_revision("revision", config.revision, config.model, progress)
    source = CheckpointSource(config.model, config.revision)
    folder = str(source.folder)
    _check_lengths(config, source)
    claim_folder(config.output, MARKER, "made by `llm-barber compare`, which keeps finished cells here and goes on")
    with locked(config.output / MARKER):
        runner = make_runner(config, folder, progress, evaluator)
        cells = list(plan_cells(config))
        missing = [cell for cell in cells if _finished(runner, config, cell) is None]
        _warn_of_begun_cells(_clear_work(runner, config, missing), progress)
        settings = _resolved_settings(config)
        # Made before anything is measured: a text that is too short is reported at once, and no cell's time has it.
        calibrations = {
            seed: calibration_file(config, runner, folder, seed, progress)
            for seed in dict.fromkeys(cell.seed for cell in missing)
        }
        comparison = _without_cells(config, settings, runner.dense(progress))
        results: list[ComparisonCell] = []
        try:
            for cell in _announced(cells, missing, progress):
                results.append(_run_cell(runner, config, folder, cell, calibrations.get(cell.seed), progress))
        finally:
            results += _stored(runner, config, cells[len(results) :])  # tables keep what is measured already
            _clear_work(runner, config, [cell for cell in missing if _finished(runner, config, cell) is None])
            comparison = comparison.model_copy(update={"cells": tuple(results)})
            if write and results:  # stopped before any cell is measured: older tables stay
                write_files(comparison, config.output)
        other_cells = runner.count - sum(cell.result is not None for cell in results)
        if write and other_cells:
            progress.warn(
                f"{config.output} keeps cells of other calls, too ({other_cells}), and its tables have this call's: "
                "name all methods and targets in one call to see them together; finished cells are not done again"
            )
    return comparison


def _check_before_opening(config: CompareConfig) -> None:
    """Refuse a wrong device, wrong tasks, wrong texts and another command's folder, before a model is downloaded."""
    _compute(config)
    find_tasks(config.tasks, config.tasks_folder, config.limit)
    for name in config.evaluation(config.model).texts:
        check_text(name)
    check_calibration(config.calibration)
    check_claimable(config.output, MARKER)


def _check_lengths(config: CompareConfig, source: CheckpointSource) -> None:
    """Refuse windows that are too long for the model, before anything is written."""
    model_config = load_config(source).get_text_config()
    if config.calibration.endswith(TOKEN_FILE_SUFFIX):
        check_positions(model_config, token_shape(config.calibration)[1], None)
    else:
        check_positions(model_config, config.seqlen)
    if config.evaluation(config.model).texts:
        check_positions(model_config, config.text_seqlen, "text_seqlen")


def _resolved_settings(config: CompareConfig) -> dict[str, Any]:
    """The settings, with the calibration windows that are used."""
    windows, tokens = calibration_shape(config)
    return {**config.model_dump(mode="json"), "samples": windows, "seqlen": tokens}


def _without_cells(config: CompareConfig, settings: dict[str, Any], dense: Evaluation) -> Comparison:
    """A comparison before its first cell."""
    device, dtype = _compute(config)
    return Comparison(
        model=config.model, settings=settings, device=device, dtype=dtype, versions=versions(), dense=dense, cells=()
    )


def _compute(config: CompareConfig) -> tuple[str, str]:
    """Names of the device and of the compute dtype."""
    device = resolve_device(config.device)
    return str(device), str(resolve_dtype(config.dtype, device)).removeprefix("torch.")


def _announced(cells: Sequence[Cell], missing: Sequence[Cell], progress: Progress) -> Iterator[Cell]:
    """Yield all cells in order, and tell the number of each missing cell and the time left.

    Stored cells take no time.
    """
    began, measured = time.monotonic(), 0
    for number, cell in enumerate(cells, 1):
        if cell in missing:
            time_left = ""
            if measured:
                seconds = (time.monotonic() - began) / measured * (len(missing) - measured)
                time_left = f", ETA {seconds / 60:.0f} min"
            progress.stage(f"cell {number} of {len(cells)}: {cell.name}{time_left}")
            measured += 1
        yield cell


def make_runner(
    config: CompareConfig, folder: str, progress: Progress, evaluator: Callable[[], Evaluator] | None = None
) -> CellRunner:
    """The runner of a comparison's cells, with all that every result depends on.

    Args:
        config: the settings.
        folder: of the dense model.
        progress: told of each stage.
        evaluator: as in `compare`.
    """
    evaluation = config.evaluation(folder)
    tasks = [
        [task.name, task.sha256 or lm_eval_version(), config.limit]
        for task in find_tasks(config.tasks, config.tasks_folder, config.limit)
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
        "compute": [*_compute(config)],
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
    """Run a cell; its error, unless it is one of the settings, becomes its result."""
    values = _named(cell)

    def make(target: Path) -> Any:
        settings = PruneConfig(
            model=folder,
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
        try:
            return prune(settings, progress)
        except UnfinishedRunError as error:
            progress.warn(f"{cell.name} starts again: {error}")
            return prune(settings.model_copy(update={"resume": False}), progress)

    try:
        return ComparisonCell(
            **values, result=runner.run(cell.name, cell_key(config, cell), make, progress, has_tasks(config, cell))
        )
    except SettingsError:
        raise
    except BarberError as error:
        progress.warn(f"{cell.name}: {error}")
        return ComparisonCell(**values, failure=str(error), hint=str(error.hint))


def _stored(runner: CellRunner, config: CompareConfig, cells: Sequence[Cell]) -> list[ComparisonCell]:
    """The finished ones of these cells."""
    measured = ((cell, _finished(runner, config, cell)) for cell in cells)
    return [ComparisonCell(**_named(cell), result=result) for cell, result in measured if result is not None]


def _named(cell: Cell) -> dict[str, Any]:
    return {"method": cell.method, "rebuilt": cell.rebuilt, "target": cell.target, "seed": cell.seed}


def _clear_work(runner: CellRunner, config: CompareConfig, missing: Sequence[Cell]) -> list[Path]:
    """Remove what no comparison goes on with; return the folders of other comparisons' begun cells."""
    return runner.clear_work((cell.name, cell_key(config, cell), has_tasks(config, cell)) for cell in missing)


def _warn_of_begun_cells(folders: Sequence[Path], progress: Progress) -> None:
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        progress.warn(
            f"{folder} has a begun cell of another call ({readable_bytes(size)}). That call goes on with it, unless "
            "the program, the model or a text has changed since; if nobody needs it, remove it"
        )


def _finished(runner: CellRunner, config: CompareConfig, cell: Cell) -> CellResult | None:
    """The stored result of a cell; None: it is not finished."""
    return runner.finished(cell.name, cell_key(config, cell), has_tasks(config, cell))


def _begins_texts(folder: str) -> bool:
    """True if the model's tokenizer puts a BOS token in front of texts."""
    tokenizer = load_tokenizer(Path(folder))
    return tokenizer is not None and len(beginning_of_texts(tokenizer)) > 0


def calibration_file(config: CompareConfig, runner: CellRunner, folder: str, seed: int, progress: Progress) -> Path:
    """The file of a seed's calibration tokens, made once, so that other programs can use the same tokens."""
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
