"""One cell of a comparison: a model is pruned in one way and measured; finished cells are kept and never done twice."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from llm_barber.checkpoint.companions import EVALUATION_NAME
from llm_barber.checkpoint.durable import write_durably
from llm_barber.checkpoint.untrusted import read_result
from llm_barber.evaluation.evaluate import Evaluation, Evaluator
from llm_barber.progress import Progress
from llm_barber.record.report import RunReport
from llm_barber.usage import machine, reset_peak_memory

CELLS = "cells"
MODELS = "models"
DENSE = "dense"
CALIBRATION = "calibration"  # the name of its part of the key
# What a model's numbers depend on: weights, configuration, tokenizer.
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf")
Kept = TypeVar("Kept", bound=BaseModel)


class CellResult(BaseModel):
    """What came out of a cell.

    `key` is everything that the result depends on. `errors` are the mean reconstruction errors of each kind of block,
    before and after the rebuild; `seconds` are those of pruning, from the first layer read to the last written;
    `peak_memory` (bytes) is the process's while it prunes, with what it keeps to measure with. `machine`: which one
    that was; None: not noted, by an older version.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    key: dict[str, Any]
    sparsity: float
    swapped: int
    granularity: str | None
    rebuild_ratio: float | None
    errors: dict[str, tuple[float | None, float | None]]
    seconds: float
    peak_memory: int
    peak_device_memory: int | None
    machine: str | None = None
    evaluation: Evaluation


class DenseResult(BaseModel):
    """The dense model's evaluation, and what it depends on."""

    model_config = ConfigDict(frozen=True)

    key: dict[str, Any]
    evaluation: Evaluation


class CellRunner:
    """Prunes, measures, keeps.

    Args:
        folder: where cells are kept (`cells/NAME-DIGEST.json`), and models while they are measured.
        evaluator: measures a model.
        common: what all results depend on besides their own settings: model, texts, versions.
        tasks: what those measured on tasks depend on, too.
        keep_models: leave the pruned models in `models/NAME`.
    """

    def __init__(
        self,
        folder: Path,
        evaluator: Callable[[], Evaluator],
        common: Mapping[str, Any],
        tasks: Sequence[Any],
        keep_models: bool,
    ):
        self.folder = folder
        self._make_evaluator = evaluator
        self._evaluator: Evaluator | None = None
        self.common = dict(common)
        self.tasks = list(tasks)
        self.keep_models = keep_models
        (folder / CELLS).mkdir(exist_ok=True)
        shutil.rmtree(folder / "work", ignore_errors=True)  # of a run that was killed

    @property
    def evaluator(self) -> Evaluator:
        """Made when it is first needed: a comparison that is finished needs none."""
        if self._evaluator is None:
            self._evaluator = self._make_evaluator()
        return self._evaluator

    @property
    def count(self) -> int:
        """Cells that are kept, of any settings."""
        return sum(1 for path in (self.folder / CELLS).glob("*.json") if not path.name.startswith(f"{DENSE}-"))

    def dense(self, progress: Progress) -> Evaluation:
        """The dense model's evaluation, kept like a cell."""
        path, key = self._place(DENSE, {CALIBRATION: None}, True)  # it has none
        kept = _read(path, DenseResult)
        if kept is None or kept.key != key:
            progress.stage("measuring the dense model")
            evaluation = self.evaluator.measure(self.evaluator.config.model, progress)
            kept = DenseResult(key=key, evaluation=evaluation.model_copy(update={"model": DENSE, "against": DENSE}))
            write_durably(path, kept.model_dump_json().encode())
        return kept.evaluation

    def finished(self, name: str, settings: Mapping[str, Any], with_tasks: bool = True) -> CellResult | None:
        """A kept cell; one that was measured on tasks, too, serves without them."""
        for measured in dict.fromkeys((with_tasks, True)):
            path, key = self._place(name, settings, measured)
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
        """A kept cell, or the result of making and measuring it now.

        Args:
            name: for people, and for the file.
            settings: all that decides the result and is not in `common`; JSON.
            make: writes the pruned model into a folder.
            progress: told of each stage.
            with_tasks: measure it on the tasks, too.
        """
        kept = self.finished(name, settings, with_tasks)
        if kept is not None:
            return kept
        path, key = self._place(name, settings, with_tasks)
        target = self.folder / MODELS / path.stem if self.keep_models else self.folder / "work" / name
        evaluator = self.evaluator
        reset_peak_memory()
        report = make(target)
        evaluation = evaluator.measure(str(target), progress, with_tasks)
        if not self.keep_models:
            shutil.rmtree(target)
        result = CellResult(
            name=name,
            key=key,
            sparsity=report.sparsity,
            swapped=report.swapped,
            granularity=report.granularity,
            rebuild_ratio=report.rebuild_ratio,
            errors={name: (one.before, one.after) for name, one in report.error_changes().items()},
            seconds=report.seconds["total"],
            peak_memory=report.peak_memory,
            peak_device_memory=report.peak_device_memory,
            machine=machine(evaluator.device),
            # The folder is gone, or has another name on another machine.
            evaluation=evaluation.model_copy(update={"model": name, "against": DENSE}),
        )
        write_durably(path, result.model_dump_json().encode())
        return result

    def _place(self, name: str, settings: Mapping[str, Any], with_tasks: bool) -> tuple[Path, dict[str, Any]]:
        key = json.loads(json.dumps({**self.common, **settings, "tasks": self.tasks if with_tasks else []}))
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / CELLS / f"{name}-{digest[:12]}.json", key


def _read(path: Path, kind: type[Kept]) -> Kept | None:
    """What a file holds; None if it is not there or damaged, so that it is done again."""
    try:
        return read_result(path, kind)
    except (OSError, ValueError):
        return None


def fingerprint(path: Path) -> str:
    """sha256 of a file, or of a model folder's files with their names: any other byte is another model or text."""
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
    """`fingerprint` of a text that is a file; None for names, whose content is known or the hub's."""
    path = Path(expanduser(name))
    return fingerprint(path) if path.is_file() else None
