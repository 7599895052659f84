"""Settings of `compare`, and the rows of its table."""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import Unstructured, parse_pattern
from llm_barber.messages import Message, SettingName, message
from llm_barber.settings.base import COMMAS, Dtype, StructureSettings, absolute_folder
from llm_barber.settings.checked import Rule
from llm_barber.settings.evaluate import EvaluateConfig, limit_needs_tasks
from llm_barber.settings.initial import RELEASED_GRANULARITIES, RELEASED_RATIOS, Initial
from llm_barber.settings.presets import Preset
from llm_barber.settings.run import BATCH_SIZE, NEEDS_REBUILD
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX

ALLOCATED = "-allocated"
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class CompareRow(StrEnum):
    """A row of the table: a method of initial masks, or a preset.

    `sparsegpt` has the dense weights under its mask, `sparsegpt-updates` its updated weights. `mask`, `best` and
    `paper` are the presets of those names; `paper` rebuilds Wanda's mask as published. A method `…-allocated` has its
    updated weights, and spreads sparsity over linears as the presets `mask` and `best` do.
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
    PAPER = "paper"
    SPARSEGPT_ALLOCATED = "sparsegpt-allocated"
    ALPS_ALLOCATED = "alps-allocated"

    @property
    def initial(self) -> Initial:
        """The method of the row's initial mask."""
        if self.preset is not None:
            return Initial.WANDA
        return (
            Initial.SPARSEGPT if self is CompareRow.SPARSEGPT_UPDATES else Initial(self.value.removesuffix(ALLOCATED))
        )

    @property
    def preset(self) -> Preset | None:
        """The preset of the row; None: a method by itself."""
        return Preset(self.value) if self.value in list(Preset) else None

    @property
    def keeps_updates(self) -> bool:
        """True if kept weights have the values that the method computed."""
        return self.initial.has_updates and self is not CompareRow.SPARSEGPT

    @property
    def allocated(self) -> bool:
        """True if sparsity is spread by the loss; no such row has N:M, which has one sparsity everywhere."""
        return self.value.endswith(ALLOCATED)


# Methods of the paper and their peers. ALPS, `…-allocated` and `paper` are compared only if `methods` names them.
PEERS = tuple(row for row in CompareRow if row.preset is None and row is not CompareRow.ALPS and not row.allocated)
ROWS = (*PEERS, CompareRow.MASK, CompareRow.BEST)  # default of `methods`


class CompareConfig(StructureSettings):
    """Settings of `compare`: rows, targets, calibration, and the texts and tasks that measure each model.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="Folder, hub id (org/name[@revision]) or GGUF file")
    output: Path = Field(description="Folder for results; a comparison there continues where it stopped")
    methods: Annotated[tuple[CompareRow, ...], *COMMAS] = Field(
        ROWS,
        min_length=1,
        description="Methods to compare. Also: paper, alps, and sparsegpt-allocated and alps-allocated, which spread "
        "the sparsity as --preset mask does",
    )
    targets: Annotated[tuple[str, ...], *COMMAS] = Field(
        ("0.5", "0.6", "0.7", "2:4", "4:8"),
        min_length=1,
        description="Sparsities and N:M patterns, a table each",
    )
    rebuild: bool = Field(True, description="Each method also with its mask rebuilt")
    granularity: Granularity | None = Field(
        None,
        description="Comparison group of the rebuild, except a preset's "
        f"(default: {RELEASED_GRANULARITIES}; with N:M output)",
    )
    rebuild_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"Share of the beneficial pairs to swap, except a preset's (default: {RELEASED_RATIOS})",
    )
    rebuild_settings: dict[CompareRow, tuple[Granularity, float]] = Field(
        default_factory=dict, description="Granularity and ratio by method, before `granularity` and `rebuild_ratio`"
    )
    calibration: str = Field(
        "builtin",
        description="builtin, c4, wikitext2, or a .txt, .jsonl, .parquet or .safetensors file, whose windows "
        "(input_ids) are taken as they are",
    )
    samples: int = Field(128, ge=1, description="Calibration windows")
    seqlen: int = Field(2048, ge=2, description="Tokens a calibration window")
    bos: bool = Field(
        True,
        description="Begin each window, of texts too, with BOS if the tokenizer begins texts with it; many published "
        "numbers are measured without BOS",
    )
    seeds: Annotated[tuple[Seed, ...], *COMMAS] = Field(
        (0,), min_length=1, description="Seeds of the choice of windows; several give mean and spread"
    )
    text: tuple[str, ...] | None = Field(
        None, description="wikitext2, from the hub ptb or c4, or a file; repeatable (default: wikitext2)"
    )
    windows: int | None = Field(None, ge=1, description="Windows of each text (default: all)")
    text_seqlen: int = Field(2048, ge=2, description="Tokens a window of the texts")
    tasks: Annotated[tuple[str, ...], *COMMAS] = Field((), description="Multiple-choice tasks, as in evaluate")
    tasks_folder: Path | None = Field(None, description="Folder with NAME.jsonl of each task, as in evaluate")
    limit: int | None = Field(None, ge=2, description="Most examples of each task (default: all)")
    task_seeds: int | None = Field(None, ge=0, description="Number of seeds measured on tasks (default: all)")
    batch_size: int | None = Field(None, ge=1, description=BATCH_SIZE)
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: Dtype = Field("auto", description="Compute in float32, bfloat16 or float16 (default: auto, the fastest)")
    revision: str | None = Field(None, description="Revision of a hub id")
    allow_dense_tail: bool = Field(False, description="If M does not divide a row, leave its end dense")
    keep_models: bool = Field(False, description="Leave the pruned models in `output`, in models/")

    @field_validator("output", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return absolute_folder(value)

    @field_validator("targets", mode="after")
    @classmethod
    def _targets_readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        settings = [target_settings(target) for target in value]  # 0.5 and 0.50 are the same target
        return tuple(dict.fromkeys(target.get("pattern") or f"{target['sparsity']:.10g}" for target in settings))

    @field_validator("methods", "seeds", mode="after")
    @classmethod
    def _once_each(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value))

    def rules(self) -> list[Rule]:
        """Rules about rows, targets and seeds."""
        rules = [self._rebuild_is_done, self._seeds_choose_windows, self._sparsity_can_be_spread]
        return [*super().rules(), *rules, lambda: limit_needs_tasks(self.limit, bool(self.tasks or self.tasks_folder))]

    def _rebuild_is_done(self) -> Iterator[Message]:
        sets_rebuild = self.granularity is not None or self.rebuild_ratio is not None
        if not self.rebuild and (sets_rebuild or self.rebuild_settings):
            yield message(NEEDS_REBUILD, no_rebuild=SettingName("rebuild", False))
        elif sets_rebuild and all(method.preset for method in self.methods):
            yield message("{granularity} and {rebuild_ratio} are of methods that are rebuilt; presets have their own")

    def _seeds_choose_windows(self) -> Iterator[Message]:
        if len(self.seeds) > 1 and self.calibration.endswith(TOKEN_FILE_SUFFIX):
            yield message("{seeds}: a file of tokens is taken as it is, whatever the seed: give one seed")

    def _sparsity_can_be_spread(self) -> Iterator[Message]:
        if all(method.allocated for method in self.methods) and all(":" in target for target in self.targets):
            spread = "{methods}: give a sparsity in {targets}; N:M cannot be spread over linears"
            yield message(spread, methods=", ".join(self.methods))

    def evaluation(self, folder: str) -> EvaluateConfig:
        """Settings of the measurement of each model; `folder` has the dense model."""
        return EvaluateConfig(
            model=folder,
            against=folder,
            text=("wikitext2",) if self.text is None else self.text,
            windows=self.windows,
            seqlen=self.text_seqlen,
            bos=self.bos,
            tasks=self.tasks,
            tasks_folder=self.tasks_folder,
            limit=self.limit,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
            layers=self.layers,
            blocks=self.blocks,
        )


def target_settings(target: str) -> dict[str, Any]:
    """`PruneConfig`'s settings for a target, "0.6" or "2:4".

    Raises:
        ValueError: the target is neither a sparsity nor a pattern.
    """
    if ":" in target:
        return {"pattern": str(parse_pattern(target))}
    try:
        sparsity = float(target)
    except ValueError:
        raise ValueError(f"target {target!r} is neither a sparsity (0.5) nor a pattern (2:4)") from None
    Unstructured(sparsity)
    return {"sparsity": sparsity}
