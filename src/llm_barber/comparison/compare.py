"""Methods side by side: every method, without and with rebuild, at every sparsity and pattern, on the same work."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from safetensors import safe_open
from safetensors.torch import save_file

from llm_barber.calibration import TOKEN_FILE_SUFFIX, load_calibration
from llm_barber.checkpoint.folder import locked, own_folder
from llm_barber.checkpoint.hub import resolve_model
from llm_barber.comparison.cells import CALIBRATION, CellResult, CellRunner, fingerprint, source_fingerprint
from llm_barber.config import DTYPES, Initial, PruneConfig, Settings
from llm_barber.errors import BarberError, SettingsError
from llm_barber.evaluation.evaluate import EvaluateConfig, Evaluation, Evaluator
from llm_barber.evaluation.tasks import find_tasks
from llm_barber.evaluation.texts import check_text
from llm_barber.job import load_tokenizer
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import Unstructured, parse_pattern
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.presets import Preset
from llm_barber.progress import Progress, Silent
from llm_barber.pruning import prune
from llm_barber.report import versions

MARKER = "COMPARISON.txt"
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Method(StrEnum):
    """A row of the table; SparseGPT once with the dense weights under its mask and once with its updated ones.

    `mask` and `best` are the presets of those names.
    """

    MAGNITUDE = "magnitude"
    SPARSEGPT = "sparsegpt"
    SPARSEGPT_UPDATES = "sparsegpt-updates"
    WANDA = "wanda"
    RIA = "ria"
    DSNOT = "dsnot"
    ALPS = "alps"
    MASK = "mask"
    BEST = "best"

    @property
    def initial(self) -> Initial:
        """Where its initial mask is from."""
        if self.preset is not None:
            return Initial.WANDA
        return Initial.SPARSEGPT if self is Method.SPARSEGPT_UPDATES else Initial(self.value)

    @property
    def preset(self) -> Preset | None:
        """The preset that it is; None: a method by itself."""
        return Preset(self.value) if self in (Method.MASK, Method.BEST) else None

    @property
    def keeps_updates(self) -> bool:
        """Are kept weights those that the method updated?"""
        return self in (Method.SPARSEGPT_UPDATES, Method.ALPS)


# The paper's rows and its peers'; the others are asked for.
PEERS = tuple(method for method in Method if method not in (Method.ALPS, Method.MASK, Method.BEST))


class CompareConfig(Settings):
    """Settings of `compare`.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="folder, hub id or GGUF file")
    output: Path = Field(description="folder for cells, tables, plot and page; a comparison that is there goes on")
    methods: tuple[Method, ...] = Field(PEERS, min_length=1, description="rows")
    targets: tuple[str, ...] = Field(
        ("0.5", "0.6", "0.7", "2:4", "4:8"), min_length=1, description="sparsities and N:M patterns: blocks of rows"
    )
    rebuild: bool = Field(True, description="each method also with rebuild")
    granularity: Granularity | None = Field(None, description="of the rebuild; None: the released experiments'")
    rebuild_ratio: float | None = Field(None, gt=0, le=1, description="None: the released experiments'")
    rebuild_settings: dict[Method, tuple[Granularity, float]] = Field(
        default_factory=dict, description="granularity and ratio by method, before the two above"
    )
    calibration: str = Field("builtin", description="builtin, c4, wikitext2, or a file")
    samples: int = Field(128, ge=1, description="calibration windows")
    seqlen: int = Field(2048, ge=2, description="tokens a calibration window")
    seeds: tuple[Seed, ...] = Field(
        (0,), min_length=1, description="of the choice of windows; several give mean and spread"
    )
    text: tuple[str, ...] | None = Field(None, description="wikitext2, ptb, c4, or files; None: wikitext2")
    windows: int | None = Field(None, ge=1, description="windows of each text; None: all")
    text_seqlen: int = Field(2048, ge=2, description="tokens a window of the texts")
    tasks: tuple[str, ...] = Field((), description="multiple-choice tasks, as in evaluate")
    tasks_folder: Path | None = Field(None, description="folder with a .jsonl file a task")
    limit: int | None = Field(None, ge=2, description="examples of each task, at most")
    task_seeds: int | None = Field(None, ge=0, description="how many of the seeds are measured on tasks; None: all")
    batch_size: int | None = Field(None, ge=1, description="windows computed together")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: str = Field("auto", description=f"compute dtype: {', '.join(DTYPES)}")
    revision: str | None = Field(None, description="of a hub id")
    keep_models: bool = Field(False, description="leave the pruned models in OUT/models")

    @field_validator("output", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().resolve()

    @field_validator("targets", mode="after")
    @classmethod
    def _targets_readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        settings = [target_settings(target) for target in value]  # 0.5 and 0.50 are one
        return tuple(dict.fromkeys(one.get("pattern") or f"{one['sparsity']:.10g}" for one in settings))

    @field_validator("methods", "seeds", mode="after")
    @classmethod
    def _once_each(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.rebuild and (self.granularity or self.rebuild_ratio or self.rebuild_settings):
            raise ValueError("granularity and rebuild_ratio are of the rebuild, which is switched off")
        if len(self.seeds) > 1 and self.calibration.endswith(TOKEN_FILE_SUFFIX):
            raise ValueError("a file of tokens is taken as it is, whatever the seed: give one seed")
        return self

    def evaluation(self, folder: str) -> EvaluateConfig:
        """How each model is measured; `folder` has the dense one."""
        return EvaluateConfig(
            model=folder,
            against=folder,
            text=("wikitext2",) if self.text is None else self.text,
            windows=self.windows,
            seqlen=self.text_seqlen,
            tasks=self.tasks,
            tasks_folder=self.tasks_folder,
            limit=self.limit,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
        )


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


def target_settings(target: str) -> dict[str, Any]:
    """`PruneConfig`'s settings for "0.6" or "2:4".

    Raises:
        ValueError: it is neither.
    """
    if ":" in target:
        return {"pattern": str(parse_pattern(target))}
    try:
        sparsity = float(target)
    except ValueError:
        raise ValueError(f"target {target!r} is neither a sparsity (0.5) nor a pattern (2:4)") from None
    Unstructured(sparsity)
    return {"sparsity": sparsity}


def compare(
    config: CompareConfig,
    progress: Progress | None = None,
    write: bool = True,
    evaluator: Evaluator | None = None,
) -> Comparison:
    """Prune and measure every cell, or take it up from an earlier run; writes tables, plot and page to `config.output`.

    Work that is shared: the calibration tokens of a seed, the texts and tasks, and what the dense model predicts. The
    decoder layers are not, since each cell's layers see the activations of its own pruned ones.

    Args:
        config: the settings.
        progress: told of each stage.
        write: write tables, plot and page, too; cells are kept in any case.
        evaluator: one of `config.evaluation(folder)`, for what it has already computed; None: a new one, if needed.

    Raises:
        BarberError: model, text, tasks or output are wrong. A single cell that cannot be done is noted in the result.
    """
    from llm_barber.comparison.render import write_files  # with matplotlib

    progress = progress or Silent()
    folder = str(resolve_model(config.model, config.revision))
    device = resolve_device(config.device)
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    # What is wrong with texts and tasks is told before anything is written.
    find_tasks(config.tasks, config.tasks_folder, config.limit)
    for name in config.evaluation(folder).texts:
        check_text(name)
    own_folder(config.output, MARKER, "made by `llm-barber compare`, which keeps finished cells here and goes on")
    with locked(config.output / MARKER):
        runner = make_runner(config, folder, progress, evaluator)
        cells = list(plan_cells(config))
        missing = [cell for cell in cells if not _finished(runner, config, cell)]
        shape = (config.samples, config.seqlen)
        for seed in dict.fromkeys(cell.seed for cell in missing):
            # Made before anything is measured: a text that is too short is told now, and no cell's time has it.
            with safe_open(calibration_file(config, folder, seed, progress), "pt") as tokens:
                shape = tuple(tokens.get_slice("input_ids").get_shape())
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

        began, done_here = time.monotonic(), 0
        try:
            for number, cell in enumerate(cells, 1):
                settings = cell_settings(config, cell)
                if cell in missing:
                    left = ""
                    if done_here:
                        seconds = (time.monotonic() - began) / done_here * (len(cells) - number + 1)
                        left = f", ETA {seconds / 60:.0f} min"
                    progress.stage(f"cell {number} of {len(cells)}: {cell.name}{left}")
                    done_here += 1
                results.append(_run_cell(runner, config, folder, cell, settings, progress))
        finally:
            if write and results:  # stopped before the first cell: older tables stay
                write_files(comparison(), config.output)
    return comparison()


def plan_cells(config: CompareConfig) -> Iterator[Cell]:
    """All cells, seed after seed; magnitude without rebuild looks at no text and is done for one seed."""
    for seed in config.seeds:
        for target in config.targets:
            for method in config.methods:
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
    settings["seed"] = cell.seed
    if cell.method.preset is not None:
        settings["preset"] = cell.method.preset.value
    if cell.rebuilt:
        settings |= {"granularity": granularity.value if granularity else None, "rebuild_ratio": ratio}
    return settings


def make_runner(
    config: CompareConfig, folder: str, progress: Progress, evaluator: Evaluator | None = None
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
    common = {
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
    return CellRunner(
        config.output, lambda: evaluator or Evaluator(evaluation, progress), common, tasks, config.keep_models
    )


def _run_cell(
    runner: CellRunner,
    config: CompareConfig,
    folder: str,
    cell: Cell,
    settings: Mapping[str, Any],
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
                calibration=str(calibration_file(config, folder, cell.seed, progress)),
                batch_size=config.batch_size,
                device=config.device,
                dtype=config.dtype,
                overwrite=True,
                report=False,
                **settings,
            ),
            progress,
        )

    try:
        return ComparisonCell(
            **values, result=runner.run(cell.name, settings, make, progress, _with_tasks(config, cell))
        )
    except SettingsError:
        raise
    except BarberError as error:
        progress.warn(f"{cell.name}: {error}")
        return ComparisonCell(**values, failure=str(error))


def _finished(runner: CellRunner, config: CompareConfig, cell: Cell) -> bool:
    return runner.finished(cell.name, cell_settings(config, cell), _with_tasks(config, cell)) is not None


def _with_tasks(config: CompareConfig, cell: Cell) -> bool:
    return config.task_seeds is None or cell.seed in config.seeds[: config.task_seeds]


def calibration_file(config: CompareConfig, folder: str, seed: int, progress: Progress) -> Path:
    """The calibration tokens of a seed, made once: other programs can be run on the very same ones."""
    if config.calibration.endswith(TOKEN_FILE_SUFFIX):
        return Path(config.calibration)
    made_from = [fingerprint(Path(folder)), config.calibration, source_fingerprint(config.calibration)]
    digest = hashlib.sha256(json.dumps([*made_from, config.samples, config.seqlen, seed]).encode()).hexdigest()
    path = config.output / f"calibration-seed{seed}-{digest[:12]}{TOKEN_FILE_SUFFIX}"
    if not path.exists():
        progress.stage(f"reading calibration text {config.calibration}")
        tokens = load_calibration(
            config.calibration, lambda: load_tokenizer(Path(folder)), config.samples, config.seqlen, seed
        )
        temporary = path.with_name(f"{path.name}.tmp")
        save_file({"input_ids": tokens.input_ids}, temporary)
        temporary.rename(path)
    return path
