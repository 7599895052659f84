"""The cells of a comparison, and the settings that each is pruned with."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llm_barber.method.held_out import JUDGE_REVISION
from llm_barber.settings.compare import CompareConfig, CompareRow, target_settings
from llm_barber.settings.presets import ALLOCATION_REVISION, PRESETS, REVISIONS, Allocation, Refine
from llm_barber.settings.refining import sequences_a_step, windows_in_key
from llm_barber.text.calibration import token_shape
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX

OLDEST_JUDGE = 2  # revision of the held-out rule of kept cells whose key does not name it


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
    granularity, ratio = config.rebuild_settings.get(cell.method, (config.granularity, config.rebuild_ratio))
    settings: dict[str, Any] = {"initial": cell.method.initial.value, **target_settings(cell.target)}
    settings["keep_updates"] = cell.method.keeps_updates
    if cell.method.preset is None:
        settings["rebuild"] = cell.rebuilt
    if cell.method.allocated:
        settings["allocation"] = Allocation.LOSS.value
    settings["seed"] = cell.seed
    if cell.method.preset is not None:
        settings["preset"] = cell.method.preset.value
        settings |= asdict(PRESETS[cell.method.preset])  # if a preset changes, its cells are done again
        del settings["reorder"]  # only as far as the model allows it, unless it is asked for
        if "pattern" in settings:
            del settings["allocation"]
    if config.allow_dense_tail and "pattern" in settings:
        settings["allow_dense_tail"] = True
    if cell.rebuilt:
        settings |= {"granularity": granularity.value if granularity else None, "rebuild_ratio": ratio}
    return settings


def cell_key(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    """All that decides a cell's result besides the settings that all cells share."""
    preset = cell.method.preset
    key = cell_settings(config, cell)
    if cell.method.initial.revision > 1:
        key["initial_revision"] = cell.method.initial.revision
    if cell.method.allocated:
        key["revision"] = ALLOCATION_REVISION
    if preset is not None:
        key["revision"] = REVISIONS[preset]
        if PRESETS[preset].reorder and "pattern" in key:
            key["reorder"] = True
    if preset is not None and PRESETS[preset].refine is Refine.TUNE:
        key |= windows_in_key(sequences_a_step(math.prod(calibration_shape(config))))
        if JUDGE_REVISION > OLDEST_JUDGE:
            key["held_out"] = JUDGE_REVISION
    return key


def calibration_shape(config: CompareConfig) -> tuple[int, int]:
    """Number of calibration windows, and tokens of each: a file of tokens has its own."""
    if config.calibration.endswith(TOKEN_FILE_SUFFIX):
        return token_shape(config.calibration)
    return config.samples, config.seqlen


def has_tasks(config: CompareConfig, cell: Cell) -> bool:
    """True if the cell is measured on tasks, too."""
    return config.task_seeds is None or cell.seed in config.seeds[: config.task_seeds]
