"""The cells of a comparison, and the settings that each is pruned with."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llm_barber.settings.compare import CompareConfig, Method, target_settings
from llm_barber.settings.presets import PRESETS, REVISIONS, Allocation, Preset


@dataclass(frozen=True)
class Cell:
    """A row at a target, with a calibration seed."""

    method: Method
    rebuilt: bool
    target: str
    seed: int

    @property
    def name(self) -> str:
        """For people, and for its file."""
        return f"{self.method}{'-rebuilt' if self.rebuilt else ''}-{self.target.replace(':', 'of')}-seed{self.seed}"


def plan_cells(config: CompareConfig) -> Iterator[Cell]:
    """All cells, seed after seed; magnitude without rebuild looks at no text and is done for one seed."""
    for seed in config.seeds:
        for target in config.targets:
            for method in config.methods:
                if method.allocated and ":" in target:
                    continue
                for rebuilt in (False, True) if config.rebuild and method.preset is None else (False,):
                    if rebuilt or method is not Method.MAGNITUDE or seed == config.seeds[0]:
                        yield Cell(method, rebuilt, target, seed)


def cell_settings(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    """What `PruneConfig` is given for a cell, except model, output, calibration and device."""
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
        settings |= asdict(PRESETS[cell.method.preset])  # should a preset change, its cells are done again
        if "pattern" in settings:
            del settings["allocation"]
    if config.allow_dense_tail and "pattern" in settings:
        settings["allow_dense_tail"] = True
    if cell.rebuilt:
        settings |= {"granularity": granularity.value if granularity else None, "rebuild_ratio": ratio}
    return settings


def cell_key(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    """What decides a cell's result."""
    preset = Preset.MASK if cell.method.allocated else cell.method.preset  # whose allocation it has
    return {**cell_settings(config, cell), **({} if preset is None else {"revision": REVISIONS[preset]})}


def with_tasks(config: CompareConfig, cell: Cell) -> bool:
    """Is a cell measured on tasks, too?"""
    return config.task_seeds is None or cell.seed in config.seeds[: config.task_seeds]
