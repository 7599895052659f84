"""Settings of a comparison: which rows, at which targets, measured how."""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import Unstructured, parse_pattern
from llm_barber.messages import Message, message
from llm_barber.settings.base import DTYPES, Dtype, StructureSettings, absolute_folder
from llm_barber.settings.checked import Rule
from llm_barber.settings.evaluate import EvaluateConfig
from llm_barber.settings.presets import Preset
from llm_barber.settings.prune import Initial
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX

ALLOCATED = "-allocated"
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Method(StrEnum):
    """A row of the table; SparseGPT once with the dense weights under its mask and once with its updated ones.

    `mask`, `best` and `paper` are the presets of those names; `paper` rebuilds Wanda's mask as published. What ends in
    `-allocated` is a method with its own weights, and with sparsity spread over linears as the other presets spread it.
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
        """Where its initial mask is from."""
        if self.preset is not None:
            return Initial.WANDA
        return Initial.SPARSEGPT if self is Method.SPARSEGPT_UPDATES else Initial(self.value.removesuffix(ALLOCATED))

    @property
    def preset(self) -> Preset | None:
        """The preset that it is; None: a method by itself."""
        return Preset(self.value) if self.value in list(Preset) else None

    @property
    def keeps_updates(self) -> bool:
        """Are kept weights those that the method updated?"""
        return self.initial.has_updates and self is not Method.SPARSEGPT

    @property
    def allocated(self) -> bool:
        """Is sparsity spread by the loss? Not for N:M, which has one sparsity everywhere."""
        return self.value.endswith(ALLOCATED)


# The paper's rows and its peers'; the others are asked for.
PEERS = tuple(one for one in Method if one.preset is None and one is not Method.ALPS and not one.allocated)
ROWS = (*PEERS, Method.MASK, Method.BEST)  # of a comparison, unless others are asked for


class CompareConfig(StructureSettings):
    """Settings of `compare`.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="folder, hub id or GGUF file")
    output: Path = Field(description="folder for cells, tables, plot and page; a comparison that is there goes on")
    methods: tuple[Method, ...] = Field(ROWS, min_length=1, description="rows")
    targets: tuple[str, ...] = Field(
        ("0.5", "0.6", "0.7", "2:4", "4:8"), min_length=1, description="sparsities and N:M patterns: blocks of rows"
    )
    rebuild: bool = Field(True, description="each method also with rebuild")
    granularity: Granularity | None = Field(
        None, description="of the rebuild, not of presets; None: the released experiments'"
    )
    rebuild_ratio: float | None = Field(None, gt=0, le=1, description="None: the released experiments'")
    rebuild_settings: dict[Method, tuple[Granularity, float]] = Field(
        default_factory=dict, description="granularity and ratio by method, before the two above"
    )
    calibration: str = Field("builtin", description="builtin, c4, wikitext2, or a file")
    samples: int = Field(128, ge=1, description="calibration windows")
    seqlen: int = Field(2048, ge=2, description="tokens a calibration window")
    bos: bool = Field(True, description="let windows, of texts, too, begin as the tokenizer has texts begin, with BOS")
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
    dtype: Dtype = Field("auto", description=f"compute dtype: {', '.join(DTYPES)}")
    revision: str | None = Field(None, description="of a hub id")
    allow_dense_tail: bool = Field(
        False, description="where M does not divide a row, leave the inputs after its last whole group dense"
    )
    keep_models: bool = Field(False, description="leave the pruned models in OUT/models")

    @field_validator("output", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return absolute_folder(value)

    @field_validator("targets", mode="after")
    @classmethod
    def _targets_readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        settings = [target_settings(target) for target in value]  # 0.5 and 0.50 are one
        return tuple(dict.fromkeys(one.get("pattern") or f"{one['sparsity']:.10g}" for one in settings))

    @field_validator("methods", "seeds", mode="after")
    @classmethod
    def _once_each(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value))

    def rules(self) -> list[Rule]:
        """What goes together in rows, targets and seeds."""
        return [*super().rules(), self._rebuild_is_done, self._seeds_choose_windows, self._sparsity_can_be_spread]

    def _rebuild_is_done(self) -> Iterator[Message]:
        given = self.granularity is not None or self.rebuild_ratio is not None
        if not self.rebuild and (given or self.rebuild_settings):
            yield message("{granularity} and {rebuild_ratio} are of the rebuild, which is switched off")
        elif given and all(one.preset for one in self.methods):
            yield message("{granularity} and {rebuild_ratio} are of methods that are rebuilt; presets have their own")

    def _seeds_choose_windows(self) -> Iterator[Message]:
        if len(self.seeds) > 1 and self.calibration.endswith(TOKEN_FILE_SUFFIX):
            yield message("{seeds}: a file of tokens is taken as it is, whatever the seed: give one seed")

    def _sparsity_can_be_spread(self) -> Iterator[Message]:
        if all(one.allocated for one in self.methods) and all(":" in one for one in self.targets):
            spread = "{methods}: for sparsities, which they spread over linears; N:M is the same in all"
            yield message(spread, methods=", ".join(self.methods))

    def evaluation(self, folder: str) -> EvaluateConfig:
        """How each model is measured; `folder` has the dense one."""
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
