"""The settings of a run: frozen and validated; every wrong one is reported at once."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llm_barber.errors import SettingsError
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, Pattern, Unstructured, parse_pattern
from llm_barber.model.architecture import Block, StructureOptions
from llm_barber.presets import (
    GUARD,
    PATTERN_SWAPS,
    PRESETS,
    SWAPS,
    TARGET_MIX,
    TUNE_PASSES,
    Allocation,
    Preset,
    PresetSettings,
    Reconstruct,
    Refine,
)
from llm_barber.targets import Targets, compile_names, parse_target, read_blocks, read_targets


class Initial(StrEnum):
    """The method whose mask is rebuilt."""

    WANDA = "wanda"
    MAGNITUDE = "magnitude"
    SPARSEGPT = "sparsegpt"
    RIA = "ria"
    DSNOT = "dsnot"
    ALPS = "alps"

    @property
    def has_updates(self) -> bool:
        """Does it give new values to kept weights?"""
        return self in (Initial.SPARSEGPT, Initial.ALPS)


# The released experiments' granularity and rebuild ratio for each initial method; those that they do not have are given
# what their kin have.
RELEASED_REBUILD: dict[Initial, tuple[Granularity, float]] = {
    Initial.MAGNITUDE: (Granularity.BLOCK, 0.1),
    Initial.WANDA: (Granularity.OUTPUT, 0.01),
    Initial.SPARSEGPT: (Granularity.LINEAR, 0.1),
    Initial.RIA: (Granularity.OUTPUT, 0.01),
    Initial.DSNOT: (Granularity.OUTPUT, 0.01),
    Initial.ALPS: (Granularity.LINEAR, 0.1),
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Settings(BaseModel):
    """A frozen set of settings; wrong ones raise one `SettingsError` that names them all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("model", "dense", "pruned", "against", "calibration", mode="before", check_fields=False)
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(_problem(detail) for detail in error.errors())
            raise SettingsError(problems, "see --help for what each setting takes") from None


class Format(StrEnum):
    """How the checkpoint is written: `packed` is what `pack` makes of `dense` (docs/packed-format.md)."""

    DENSE = "dense"
    PACKED = "packed"


class RunSettings(Settings):
    """What `prune` and `rebuild` share."""

    output: Path = Field(description="folder to write; it appears when it is complete")
    granularity: Granularity | None = Field(None, description="comparison group; None: the released experiments'")
    rebuild_ratio: float | None = Field(
        None, gt=0, le=1, description="share of the beneficial pairs to swap; None: the released experiments'"
    )
    preset: Preset | None = Field(
        default=None,
        description="paper, mask or best: what the settings below are by default; None: mask, or paper where a method "
        "or a setting of the rebuild is given",
    )
    refine: Refine | None = Field(default=None, description="how the mask is refined; None: the preset's")
    swaps: int | None = Field(
        default=None, ge=1, description=f"exact swaps a row, at most; None: {SWAPS}, with N:M {PATTERN_SWAPS}"
    )
    target_mix: float = Field(
        TARGET_MIX,
        ge=0,
        le=1,
        description="target of refining: outputs on the sparse model's inputs, 0, the dense's, 1",
    )
    reconstruct: Reconstruct | None = Field(
        default=None, description="what becomes of kept weights; None: the preset's"
    )
    tune_passes: int = Field(
        default=TUNE_PASSES, ge=1, description="passes over the windows when layers are tuned, at most"
    )
    guard: float = Field(
        default=GUARD,
        ge=0,
        lt=1,
        description="share of the windows held out to decide what refining keeps; 0: all is kept",
    )
    calibration: str = Field(default="builtin", description="builtin, c4, wikitext2, or a file")
    samples: int = Field(128, ge=1, description="calibration windows")
    seqlen: int = Field(2048, ge=2, description="tokens a window")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the choice of windows")
    batch_size: int | None = Field(None, ge=1, description="windows computed together; None: chosen by the device")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: str = Field("auto", description="compute dtype; auto: the fastest that the device has")
    memory: int | None = Field(
        default=None, description="bytes of host memory, or like 8GiB; activations beyond are files; None: any"
    )
    device_memory: int | None = Field(default=None, description="bytes of the GPU's memory, or like 8GiB; None: all")
    format: Format = Field(default=Format.DENSE, description="dense, which loads everywhere, or packed: fewer bytes")
    overwrite: bool = Field(default=False, description="replace OUT, once the new one is complete")
    resume: bool = Field(default=False, description="go on with an unfinished run of OUT, if there is one")
    report: bool = Field(default=True, description="write OUT/report.html, a page with plots")
    revision: str | None = Field(None, description="of a hub id")
    layers: str | None = Field(default=None, description="path of the decoder layers; None: as known or found")
    blocks: tuple[Block, ...] = Field(
        default=(), description="the blocks of a decoder layer, or a YAML file of them; none: as known or found"
    )

    @property
    def structure(self) -> StructureOptions:
        """What of the model's structure the user decided."""
        return StructureOptions(self.layers, self.blocks)

    @field_validator("blocks", mode="before")
    @classmethod
    def _blocks_readable(cls, value: Any) -> Any:
        return read_blocks(Path(value)) if isinstance(value, str | Path) else value

    @property
    def defaults(self) -> PresetSettings:
        """What the preset says; none was given: the published method's."""
        return PRESETS[self.preset or Preset.PAPER]

    @property
    def refines(self) -> bool:
        """Are masks refined by swaps?"""
        return (self.refine or self.defaults.refine) is Refine.SWAPS

    @property
    def reconstruction(self) -> Reconstruct:
        """What becomes of the kept weights."""
        return self.reconstruct or self.defaults.reconstruct

    @field_validator("memory", "device_memory", mode="before")
    @classmethod
    def _size_readable(cls, value: Any) -> Any:
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?", str(value)) if value is not None else None
        if value is None or (found is None and not isinstance(value, str)):
            return value
        if found is None or float(found[1]) == 0:
            raise ValueError(f"{value!r} is not a size, like 8GiB")
        unit = found[2] or ""
        return int(float(found[1]) * (1024 if unit.endswith("i") else 1000) ** (" KMGT".index(unit[0]) if unit else 0))

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"{value!r} is not one of {', '.join(DTYPES)}")
        return value

    @field_validator("output", mode="before")
    @classmethod
    def _output_named(cls, value: Any) -> Any:
        if not isinstance(value, str | Path) or not str(value).strip():
            raise ValueError("is not a folder's name")
        try:
            return Path(value).expanduser().resolve()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"cannot be a folder: {error}") from error


class PruneConfig(RunSettings):
    """Settings of `prune`: choose an initial mask and rebuild it.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="folder, hub id or GGUF file")
    initial: Initial | None = Field(default=None, description="method of the initial mask; None: wanda")
    sparsity: float | None = Field(None, description="fraction of weights to remove; None: 0.5")
    pattern: str | None = Field(None, description="N:M, N kept of every M inputs, instead of a sparsity")
    rebuild: bool | None = Field(default=None, description="rebuild the initial mask; None: the preset's")
    initial_granularity: Granularity | None = Field(
        default=None,
        description="comparison group of the initial mask; None: linear for magnitude and RIA, else output",
    )
    keep_updates: bool = Field(
        default=False, description="keep the updated weights of SparseGPT or ALPS instead of the dense ones"
    )
    allocation: Allocation | None = Field(
        default=None, description="how sparsity is spread over the linears; None: the preset's"
    )
    include: tuple[str, ...] = Field(default=(), description="regular expressions of the linears to prune; none: all")
    exclude: tuple[str, ...] = Field(default=(), description="regular expressions of linears not to prune")
    skip_layers: tuple[int, ...] = Field(default=(), description="decoder layers not to prune; -1 is the last")
    sparsities: dict[str, float | str] = Field(
        default={}, description="a sparsity, N:M or 0 by regular expression of linears, or a YAML file of that"
    )

    @field_validator("sparsity")
    @classmethod
    def _sparsity_inside(cls, value: float | None) -> float | None:
        if value is not None:
            Unstructured(value)
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern_readable(cls, value: str | None) -> str | None:
        if value is not None:
            parse_pattern(value)
        return value

    @field_validator("include", "exclude")
    @classmethod
    def _expressions_readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        compile_names(value)
        return value

    @field_validator("skip_layers", mode="before")
    @classmethod
    def _layers_readable(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(int(number) for number in value.split(","))
        except ValueError as error:
            raise ValueError(f"{value!r} is not numbers with commas between them, like 0,-1") from error

    @field_validator("sparsities", mode="before")
    @classmethod
    def _sparsities_readable(cls, value: Any) -> Any:
        found = read_targets(value)
        if isinstance(found, dict):
            compile_names(list(found))
            for expression, one in found.items():
                try:
                    parse_target(one)
                except ValueError as error:
                    raise ValueError(f"{expression}: {error}") from error
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if self.sparsity is not None and self.pattern is not None:
            problems.append("sparsity and pattern exclude each other: a pattern has its own sparsity")
        if self.keep_updates and not self.method.has_updates:
            problems.append(f"keep_updates needs initial sparsegpt or alps: {self.method} updates no weights")
        asked = self.allocation not in (None, Allocation.UNIFORM)
        if asked and self.pattern is not None:
            problems.append("allocation is not for patterns: N:M has one sparsity everywhere")
        if asked and self.sparsities:
            problems.append("allocation and sparsities exclude each other: both say how much of each linear goes")
        if self.initial_granularity is Granularity.BLOCK:
            problems.append("initial_granularity block is not defined: choose output, input or linear")
        if self.initial_granularity is not None and self.method is Initial.SPARSEGPT:
            problems.append("initial_granularity is not for sparsegpt: it compares within its blocks of columns")
        if self.rebuild is False and (self.granularity is not None or self.rebuild_ratio is not None):
            problems.append("granularity and rebuild_ratio are of the rebuild, which is switched off")
        if self.keep_updates and (self.refines or self.reconstruction is not Reconstruct.NONE):
            problems.append("keep_updates goes with neither refine nor reconstruct: these start from the dense weights")
        if self.pattern is not None and self.initial_granularity is not None:
            problems.append("initial_granularity is not for patterns: N:M compares within its groups of M")
        problems += _same_folder("MODEL", self.model, self.output)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def method(self) -> Initial:
        """That of the initial mask."""
        return self.initial or Initial.WANDA

    @property
    def defaults(self) -> PresetSettings:
        """What the preset says; where none was given, the best mask's, or the published method's if one was asked for.

        Whoever names a method, or a setting of the rebuild, wants that and nothing else.
        """
        named = (self.initial, self.rebuild, self.granularity, self.rebuild_ratio)
        asked = any(one is not None for one in named)
        return PRESETS[self.preset or (Preset.PAPER if asked else Preset.MASK)]

    @property
    def rebuilds(self) -> bool:
        """Is the initial mask rebuilt? By the preset, unless a setting of the rebuild is given."""
        if self.rebuild is not None:
            return self.rebuild
        return self.defaults.rebuild or self.granularity is not None or self.rebuild_ratio is not None

    @property
    def allocated_by(self) -> Allocation:
        """How sparsity is spread: as asked for, or by the preset where that says nothing else of it."""
        if self.allocation is not None:
            return self.allocation
        return Allocation.UNIFORM if self.pattern is not None or self.sparsities else self.defaults.allocation

    @property
    def targets(self) -> Targets:
        """How much of each linear goes."""
        return Targets(self.target, self.include, self.exclude, self.skip_layers, self.sparsities)

    @property
    def target(self) -> Pattern:
        """How many weights go, where nothing else is said."""
        if self.pattern is not None:
            return parse_pattern(self.pattern)
        return Unstructured(0.5 if self.sparsity is None else self.sparsity)


class RebuildConfig(RunSettings):
    """Settings of `rebuild`: rebuild the mask of a checkpoint that any tool pruned.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    dense: str = Field(description="the dense model: folder, hub id or GGUF file")
    pruned: str = Field(description="the pruned model: folder or hub id")
    initial: Initial | None = Field(
        None,
        description="the method that pruned it, for the default granularity and ratio; None: from its record",
    )
    pattern: str | None = Field(None, description="N:M to keep up, or unstructured; None: found in the pruned model")

    @field_validator("pattern")
    @classmethod
    def _pattern_readable(cls, value: str | None) -> str | None:
        if value is not None and value != "unstructured":
            parse_pattern(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = _same_folder("DENSE", self.dense, self.output) + _same_folder("PRUNED", self.pruned, self.output)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def target(self) -> NofM | None:
        """The N:M that was asked for."""
        return parse_pattern(self.pattern) if self.pattern not in (None, "unstructured") else None


def rebuild_defaults(
    initial: Initial, granularity: Granularity | None, ratio: float | None, pattern: Pattern | None
) -> tuple[Granularity, float]:
    """The granularity and rebuild ratio to use: those asked for, else the released experiments'.

    The released program chooses N:M's growing weights per output row, whatever the method.
    """
    default_granularity, default_ratio = RELEASED_REBUILD[initial]
    if isinstance(pattern, NofM):
        default_granularity = Granularity.OUTPUT
    return granularity or default_granularity, default_ratio if ratio is None else ratio


def _same_folder(label: str, model: str, output: Path) -> list[str]:
    try:
        source = Path(model).expanduser().resolve()
        if not source.exists():  # a hub id, or an error that opening it will name
            return []
    except (RuntimeError, OSError):
        return []
    if source == output:
        return [f"OUT is {label} itself ({output}): choose another output folder"]
    if output in source.parents:
        return [f"OUT ({output}) contains {label}: choose another output folder"]
    return []


def _problem(detail: Any) -> str:
    location = ".".join(str(part) for part in detail["loc"])
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not location:
        return message
    given = detail.get("input")
    return f"{location}: {message}" + ("" if detail["type"] == "value_error" else f" (given: {given!r})")
