"""Prune and measure the cells of a comparison; store the results, and reuse them."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from os.path import expanduser
from pathlib import Path
from typing import Any, TypeVar

from llm_barber.checkpoint.companions import EVALUATION_NAME, RECORD_NAME
from llm_barber.checkpoint.durable import write_durably
from llm_barber.checkpoint.output import PARTIAL, clear, work_folder
from llm_barber.checkpoint.state import STATE_NAME
from llm_barber.checkpoint.untrusted import read_result
from llm_barber.comparison.result import DENSE, CellResult, DenseResult
from llm_barber.evaluation.evaluate import Evaluator
from llm_barber.evaluation.result import Evaluation, TaskResult
from llm_barber.progress import Progress
from llm_barber.record.report import RunReport
from llm_barber.usage import machine, reset_peak_memory

CELLS = "cells"
MODELS = "models"
WORK = "work"  # the model of the cell at hand
CALIBRATION = "calibration"  # name of the calibration's part of a key
# Files on which a model's numbers depend: weights, configuration, tokenizer.
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf")
Result = TypeVar("Result", CellResult, DenseResult)


class CellRunner:
    """Prunes and measures cells, and stores their results.

    Args:
        folder: of the results (`cells/NAME-DIGEST.json`), and of the pruned models while they are measured.
        make_evaluator: gives the evaluator that measures the models; called when it is first needed.
        common: all that every result depends on besides its own settings: model, texts, versions.
        tasks: the part of the key of results that were measured on tasks, too.
        keep_models: leave the pruned models in `models/NAME`.
    """

    def __init__(
        self,
        folder: Path,
        make_evaluator: Callable[[], Evaluator],
        common: Mapping[str, Any],
        tasks: Sequence[Any],
        keep_models: bool,
    ):
        self.folder = folder
        self._make_evaluator = make_evaluator
        self._evaluator: Evaluator | None = None
        self._dense_tasks: tuple[TaskResult, ...] = ()
        self.common = dict(common)
        self.tasks = list(tasks)
        self.keep_models = keep_models
        (folder / CELLS).mkdir(exist_ok=True)

    @property
    def evaluator(self) -> Evaluator:
        """The evaluator, made when it is first needed: a finished comparison needs none."""
        if self._evaluator is None:
            self._evaluator = self._make_evaluator()
            self._evaluator.recall_tasks(self._dense_tasks)
        return self._evaluator

    @property
    def count(self) -> int:
        """Number of stored cells, whatever their settings."""
        return sum(1 for path in (self.folder / CELLS).glob("*.json") if not path.name.startswith(f"{DENSE}-"))

    def dense(self, progress: Progress) -> Evaluation:
        """The dense model's evaluation, stored like a cell's."""
        path, key = self._file_and_key(DENSE, {CALIBRATION: None}, True)  # it has no calibration
        result = _read(path, DenseResult)
        if result is None or result.key != key:
            progress.stage("measuring the dense model")
            evaluation = self.evaluator.measure(self.evaluator.config.model, progress)
            result = DenseResult(key=key, evaluation=evaluation.model_copy(update={"model": DENSE, "against": DENSE}))
            write_durably(path, result.model_dump_json().encode())
        self._dense_tasks = result.evaluation.tasks
        return result.evaluation

    def finished(self, name: str, settings: Mapping[str, Any], with_tasks: bool = True) -> CellResult | None:
        """The stored result of a cell; None: the cell is not finished.

        A result that was measured on tasks, too, serves without them.
        """
        for measured_on_tasks in dict.fromkeys((with_tasks, True)):
            path, key = self._file_and_key(name, settings, measured_on_tasks)
            if self.keep_models and not (self.folder / MODELS / path.stem).is_dir():
                continue  # its model is asked for, and was not kept
            result = _read(path, CellResult)
            if result is not None and result.key == key:
                tasks = result.evaluation.tasks if with_tasks else ()
                return result.model_copy(update={"evaluation": result.evaluation.model_copy(update={"tasks": tasks})})
        return None

    def run(
        self,
        name: str,
        settings: Mapping[str, Any],
        make: Callable[[Path], RunReport],
        progress: Progress,
        with_tasks: bool = True,
    ) -> CellResult:
        """The stored result of a cell, or else prune and measure it.

        Args:
            name: of the cell and its file.
            settings: all that decides the result and is not in `common`; JSON.
            make: writes the pruned model into a folder, or continues what an interrupted comparison began to write.
            progress: told of each stage.
            with_tasks: measure the model on the tasks, too.
        """
        stored = self.finished(name, settings, with_tasks)
        if stored is not None:
            return stored
        path, key = self._file_and_key(name, settings, with_tasks)
        target = self.folder / (MODELS if self.keep_models else WORK) / path.stem
        evaluator = self.evaluator
        reset_peak_memory()
        report = make(target)
        evaluation = evaluator.measure(str(target), progress, with_tasks)
        result = CellResult(
            name=name,
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
            evaluation=evaluation.model_copy(update={"model": name, "against": DENSE}),
        )
        write_durably(path, result.model_dump_json().encode())
        if not self.keep_models:
            shutil.rmtree(target)
        return result

    def clear_work(self, cells: Iterable[tuple[str, Mapping[str, Any], bool]]) -> list[Path]:
        """Remove from the work folder what no comparison goes on with: models of finished cells, and empty beginnings.

        A work folder that is a link is left alone.

        Args:
            cells: the `name`, `settings` and `with_tasks` of each cell that this comparison goes on with, as in `run`.

        Returns:
            Folders of begun cells that another comparison goes on with: other cells, or the same with other settings.
        """
        work = self.folder / WORK
        if not work.is_dir() or work.is_symlink():
            return []
        targets = [work / self._file_and_key(*cell)[0].stem for cell in cells]
        own = {target.name for target in targets} | {work_folder(target).name for target in targets}
        others: list[Path] = []
        with suppress(OSError):  # what cannot be read or removed is in no cell's way
            others = [path for path in work.iterdir() if path.name not in own and self._is_begun(path)]
            clear(work, own | {path.name for path in others})
            if not any(work.iterdir()):
                work.rmdir()
        return sorted(others)

    def _is_begun(self, folder: Path) -> bool:
        """Test whether a work folder has a part of a pruned model, or all of it, of a cell that is not finished."""
        stem = folder.name.removesuffix(PARTIAL)
        begun = any((folder / name).is_file() for name in (STATE_NAME, RECORD_NAME))
        return begun and not (self.folder / CELLS / f"{stem}.json").exists()

    def _file_and_key(self, name: str, settings: Mapping[str, Any], with_tasks: bool) -> tuple[Path, dict[str, Any]]:
        """Path of a cell's file, which has a digest of its key in its name, and the key."""
        key = json.loads(json.dumps({**self.common, **settings, "tasks": self.tasks if with_tasks else []}))
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / CELLS / f"{name}-{digest[:12]}.json", key


def _read(path: Path, kind: type[Result]) -> Result | None:
    """A stored result; None: it is missing or damaged, and is computed again."""
    try:
        return read_result(path, kind)
    except (OSError, ValueError):
        return None


def fingerprint(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a model folder's files."""
    files = [path]
    if path.is_dir():
        names = (file for file in path.iterdir() if file.suffix in MODEL_FILES and file.name != EVALUATION_NAME)
        files = sorted(file for file in names if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(f"{file.name}:".encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def source_fingerprint(name: str) -> str | None:
    """`fingerprint` of a text file; None for names of texts, whose content is known or the hub's."""
    path = Path(expanduser(name))
    return fingerprint(path) if path.is_file() else None
