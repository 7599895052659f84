"""Settings of `evaluate` and `compare`, and the rows of a comparison."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import Unstructured, parse_pattern
from llm_barber.settings.base import (
    COMMAS,
    MODEL,
    NEEDS_REBUILD,
    CalibratedSettings,
    StructureSettings,
    absolute_folder,
    refuse_if,
)
from llm_barber.settings.presets import Initial, Preset
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


def _once_each(value: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(value))


ONCE_EACH = AfterValidator(_once_each)


class MeasuringSettings(StructureSettings):
    """Texts and tasks that models are measured on."""

    text: tuple[str, ...] | None = Field(
        None,
        description="wikitext2, from the hub ptb or c4, or a file; repeatable (default: wikitext2; evaluate with tasks "
        "none)",
    )
    windows: int | None = Field(None, ge=1, description="Windows of each text (default: all)")
    tasks: Annotated[tuple[str, ...], COMMAS] = Field(
        (),
        description="Tasks of lm-eval; paper stands for the seven of the paper: boolq, rte, hellaswag, winogrande, "
        "arc_easy, arc_challenge, openbookqa",
    )
    tasks_folder: Path | None = Field(
        None,
        description="Folder with NAME.jsonl of each task, instead of the hub; lines of query, choices, gold or of "
        "context_options, continuation, gold",
    )
    limit: int | None = Field(None, ge=2, description="Most examples of each task (default: all)")

    @model_validator(mode="after")
    def _limit_needs_tasks(self) -> Self:
        has_tasks = bool(self.tasks or self.tasks_folder)
        wrong = self.limit is not None and not has_tasks
        refuse_if(wrong, "--limit needs --tasks or --tasks-folder", "give tasks, too")
        return self


class EvaluateConfig(MeasuringSettings):
    """Settings of `evaluate`: texts and tasks to measure a model on, and a model to compare it with.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    model: str = Field(title="MODEL", description=MODEL)
    against: str | None = Field(
        None, description="Compare with this model: perplexity, KL divergence, next tokens, accuracies"
    )
    seqlen: int = Field(2048, ge=2, description="Tokens a window")

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts to measure."""
        if self.text is not None:
            return self.text
        return () if self.tasks or self.tasks_folder else ("wikitext2",)


class CompareConfig(CalibratedSettings, MeasuringSettings):
    """Settings of `compare`: rows, targets, calibration, and the texts and tasks that measure each model.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    model: str = Field(title="MODEL", description=MODEL)
    output: Annotated[Path, AfterValidator(absolute_folder)] = Field(
        title="OUT", description="Folder for results; a comparison there continues where it stopped"
    )
    methods: Annotated[tuple[CompareRow, ...], COMMAS, ONCE_EACH] = Field(
        ROWS,
        min_length=1,
        description="Methods to compare. Also: paper, alps, and sparsegpt-allocated and alps-allocated, which spread "
        "the sparsity as --preset mask does",
    )
    targets: Annotated[tuple[str, ...], COMMAS] = Field(
        ("0.5", "0.6", "0.7", "2:4", "4:8"), min_length=1, description="Sparsities and N:M patterns, a table each"
    )
    rebuild: bool = Field(True, description="Each method also with its mask rebuilt; presets have their own")
    rebuild_settings: dict[CompareRow, tuple[Granularity, float]] = Field(
        {}, description="Granularity and ratio by method, before `granularity` and `rebuild_ratio`"
    )
    seeds: Annotated[tuple[Seed, ...], COMMAS, ONCE_EACH] = Field(
        (0,), min_length=1, description="Seeds of the choice of windows; several give mean and spread"
    )
    text_seqlen: int = Field(2048, ge=2, description="Tokens a window of the texts")
    task_seeds: int | None = Field(None, ge=0, description="Number of seeds measured on tasks (default: all)")
    allow_dense_tail: bool = Field(False, description="If M does not divide a row, leave its end dense")
    keep_models: bool = Field(False, description="Leave the pruned models in OUT, in models/")

    @field_validator("targets", mode="after")
    @classmethod
    def _targets_readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        settings = [target_settings(target) for target in value]  # 0.5 and 0.50 are the same target
        return tuple(dict.fromkeys(target.get("pattern") or f"{target['sparsity']:.10g}" for target in settings))

    @model_validator(mode="after")
    def _rows_use_their_settings(self) -> Self:
        """Refuse settings that no row has a use for."""
        sets_rebuild = self.granularity is not None or self.rebuild_ratio is not None
        refuse_if(
            not self.rebuild and (sets_rebuild or bool(self.rebuild_settings)), NEEDS_REBUILD, "leave out --no-rebuild"
        )
        refuse_if(
            sets_rebuild and all(method.preset for method in self.methods),
            "--granularity and --rebuild-ratio are of methods that are rebuilt; presets have their own",
            "leave them out, or name other methods",
        )
        refuse_if(
            len(self.seeds) > 1 and self.calibration.endswith(TOKEN_FILE_SUFFIX),
            "--seeds: a file of tokens is taken as it is, whatever the seed",
            "give one seed",
        )
        refuse_if(
            all(method.allocated for method in self.methods) and all(":" in target for target in self.targets),
            f"{', '.join(self.methods)}: N:M cannot be spread over linears",
            "give a sparsity in --targets",
        )
        return self

    def evaluation(self, folder: str) -> EvaluateConfig:
        """Settings of the measurement of each model; `folder` has the dense model."""
        shared = {name: getattr(self, name) for name in MeasuringSettings.model_fields}
        shared["text"] = ("wikitext2",) if self.text is None else self.text
        return EvaluateConfig(model=folder, against=folder, seqlen=self.text_seqlen, **shared)


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
