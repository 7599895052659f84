"""The cells of a comparison: the settings of each, all that its result depends on, and its stored result."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any, TypeVar

from llm_barber.checkpoint.companions import EVALUATION_NAME
from llm_barber.checkpoint.untrusted import read_result
from llm_barber.comparison.result import CellResult, DenseResult
from llm_barber.evaluation.tasks import find_tasks, lm_eval_version
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.settings.compare import CompareConfig, CompareRow, target_settings
from llm_barber.settings.presets import ALLOCATION_REVISION, REVISIONS, Allocation
from llm_barber.usage import versions

# Files on which a model's numbers depend: weights, configuration, tokenizer.
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf")
Result = TypeVar("Result", CellResult, DenseResult)


@dataclass(frozen=True)
class Cell:
    """One way to prune the model: a method, without or with rebuild, at a target, with a calibration seed."""

    method: CompareRow
    rebuilt: bool
    target: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell and its file."""
        return f"{self.method}{'-rebuilt' if self.rebuilt else ''}-{self.target.replace(':', 'of')}-seed{self.seed}"


def plan_cells(config: CompareConfig) -> Iterator[Cell]:
    """All cells, seed after seed.

    Magnitude without rebuild does not depend on the text and is done for one seed.
    """
    for seed in config.seeds:
        for target in config.targets:
            for method in config.methods:
                if method.allocated and ":" in target:
                    continue
                for rebuilt in (False, True) if config.rebuild and method.preset is None else (False,):
                    if rebuilt or method is not CompareRow.MAGNITUDE or seed == config.seeds[0]:
                        yield Cell(method, rebuilt, target, seed)


def cell_settings(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    """The cell's settings for `PruneConfig`, except model, output, calibration and device."""
    settings = {**target_settings(cell.target), "seed": cell.seed}
    if config.allow_dense_tail and "pattern" in settings:
        settings["allow_dense_tail"] = True
    if cell.method.preset is not None:
        return settings | {"preset": cell.method.preset.value}
    settings["initial"] = cell.method.initial.value
    settings |= {"keep_updates": cell.method.keeps_updates, "rebuild": cell.rebuilt}
    if cell.method.allocated:
        settings["allocation"] = Allocation.LOSS.value
    if cell.rebuilt:
        chosen = config.rebuild_settings.get(cell.method, (config.granularity, config.rebuild_ratio))
        settings |= {"granularity": chosen[0] and chosen[0].value, "rebuild_ratio": chosen[1]}
    return settings


def has_tasks(config: CompareConfig, cell: Cell) -> bool:
    """True if the cell is measured on tasks, too."""
    return config.task_seeds is None or cell.seed in config.seeds[: config.task_seeds]


class Keys:
    """All that the results of a comparison depend on.

    Args:
        config: the settings.
        folder: of the dense model.
    """

    def __init__(self, config: CompareConfig, folder: Path) -> None:
        self.config = config
        device = resolve_device(config.device)
        tasks = find_tasks(config.tasks, config.tasks_folder, config.limit)
        self._tasks = [[task.name, task.sha256 or lm_eval_version(), config.limit] for task in tasks]
        self._calibration = [
            config.calibration, _text_fingerprint(config.calibration), config.samples, config.seqlen
        ]  # fmt: skip
        self._common = {
            "model": fingerprint(folder),
            "texts": [[name, _text_fingerprint(name)] for name in config.evaluation(str(folder)).texts],
            "windows": [config.windows, config.text_seqlen],
            "bos": config.bos,
            "compute": [str(device), str(resolve_dtype(config.dtype, device)).removeprefix("torch.")],
            "structure": [config.layers, [asdict(block) for block in config.blocks]],
            "version": versions()["llm-barber"],
        }

    def dense(self) -> dict[str, Any]:
        """The key of the dense model's evaluation."""
        return {**self._common, "tasks": self._tasks}

    def cell(self, cell: Cell) -> dict[str, Any]:
        """The key of a cell's result."""
        method, revision = cell.method, cell.method.initial.revision
        if method.preset is not None:
            revision = REVISIONS[method.preset]
        elif method.allocated:
            revision = max(revision, ALLOCATION_REVISION)
        key = {**self._common, **cell_settings(self.config, cell), "calibration": self._calibration}
        return {**key, "revision": revision, "tasks": self._tasks if has_tasks(self.config, cell) else []}

    def calibration(self, seed: int) -> list[Any]:
        """The key of the calibration tokens of a seed."""
        return [self._common["model"], *self._calibration, self._common["bos"], seed]


def digest(key: Any) -> str:
    """Twelve hex digits that tell a key from others, for the name of its file."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def read_stored(path: Path, kind: type[Result], key: dict[str, Any]) -> Result | None:
    """The stored result of a key; None: it is missing or damaged, and is computed again."""
    try:
        result = read_result(path, kind)
    except (OSError, ValueError):
        return None
    return result if result.key == json.loads(json.dumps(key)) else None


def fingerprint(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a model folder's files."""
    files = [path]
    if path.is_dir():
        names = (file for file in path.iterdir() if file.suffix in MODEL_FILES and file.name != EVALUATION_NAME)
        files = sorted(file for file in names if file.is_file())
    content = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            content.update(f"{file.name}:".encode() + hashlib.file_digest(opened, "sha256").digest())
    return content.hexdigest()


def _text_fingerprint(name: str) -> str | None:
    """`fingerprint` of a text file; None for names of texts, whose content is known or the hub's."""
    path = Path(expanduser(name))
    return fingerprint(path) if path.is_file() else None
