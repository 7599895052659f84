"""The settings that runs share."""

import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from llm_barber.checkpoint.in_use import folder_in_use
from llm_barber.masking.granularity import Granularity
from llm_barber.messages import Message, SettingName, message
from llm_barber.model.architecture import Block, StructureOptions
from llm_barber.settings.checked import Rule, Settings
from llm_barber.settings.presets import (
    GUARD,
    PATTERN_SWAPS,
    PATTERN_TARGET_MIX,
    PRESETS,
    SOLVED_TARGET_MIX,
    SWAPS,
    TARGET_MIX,
    TUNING_GUARD,
    Allocation,
    Preset,
    PresetSettings,
    Reconstruct,
    Refine,
)
from llm_barber.settings.targets import read_blocks

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _known_dtype(value: str) -> str:
    if value not in DTYPES:
        raise ValueError(f"{value!r} is not one of {', '.join(DTYPES)}")
    return value


Dtype = Annotated[str, AfterValidator(_known_dtype)]


def same_folder(setting: str, model: str, output: Path) -> list[Message]:
    """Problems of an output that is, contains or lies in the folder of the model that `setting` names."""
    try:
        source = Path(model).expanduser().resolve()
        if not source.exists():  # a hub id, or an error that opening it will name
            return []
    except (RuntimeError, OSError):
        return []
    shown = {"made_of": SettingName(setting), "folder": output}
    if source == output:
        return [message("{output} is {made_of} itself ({folder}): choose another output folder", **shown)]
    if output in source.parents:
        return [message("{output} ({folder}) contains {made_of}: choose another output folder", **shown)]
    if source in output.parents:
        return [message("{output} ({folder}) lies inside {made_of}: choose another output folder", **shown)]
    return []


def absolute_folder(value: Any) -> Path:
    """The absolute path of a folder, links and `~` resolved.

    Raises:
        ValueError: it is empty, or no path.
    """
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("is not a folder's name")
    try:
        return Path(value).expanduser().resolve()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"cannot be a folder: {error}") from error


def _output_folder(value: Any) -> Path:
    """An absolute path that an output may have.

    Raises:
        ValueError: it is no path, or a folder in use.
    """
    output = absolute_folder(value)
    if use := folder_in_use(output):
        raise ValueError(f"{str(value)!r} is {use} ({output}): name a folder to write")
    return output


OutputFolder = Annotated[Path, BeforeValidator(_output_folder)]


class Format(StrEnum):
    """How the checkpoint is written: `packed` is what `pack` makes of `dense` (docs/reference/packed-format.md)."""

    DENSE = "dense"
    PACKED = "packed"


def _read_blocks(value: Any) -> Any:
    return read_blocks(Path(value)) if isinstance(value, str | Path) else value


Blocks = Annotated[tuple[Block, ...], BeforeValidator(_read_blocks)]  # or a YAML file of them


class StructureSettings(Settings):
    """What a user may decide of a model's structure."""

    layers: str | None = Field(default=None, description="path of the decoder layers; None: as known or found")
    blocks: Blocks = Field(
        default=(), description="the blocks of a decoder layer, or a YAML file of them; none: as known or found"
    )

    @property
    def structure(self) -> StructureOptions:
        """What of it was decided."""
        return StructureOptions(self.layers, self.blocks)


class RunSettings(StructureSettings):
    """What `prune` and `rebuild` share; `command` is the name of the command."""

    command: ClassVar[str]

    output: OutputFolder = Field(description="folder to write; it appears when it is complete")
    rebuild: bool | None = Field(default=None, description="rebuild the initial mask; None: the preset's")
    granularity: Granularity | None = Field(None, description="comparison group; None: the released experiments'")
    rebuild_ratio: float | None = Field(
        None, gt=0, le=1, description="share of the beneficial pairs to swap; None: the released experiments'"
    )
    preset: Preset | None = Field(
        default=None,
        description="paper, mask or best: what the settings below are by default; None: mask, or paper where a method "
        "or a setting of the rebuild is given, and of a rebuild paper",
    )
    refine: Refine | None = Field(default=None, description="how the mask is refined; None: the preset's")
    swaps: int | None = Field(
        default=None, ge=1, le=10**6, description=f"exact swaps a row, at most; None: {SWAPS}, with N:M {PATTERN_SWAPS}"
    )
    target_mix: float | None = Field(
        None,
        ge=0,
        le=1,
        description="target of refining: outputs on the sparse model's inputs, 0, the dense's, 1; "
        f"None: {TARGET_MIX}; {PATTERN_TARGET_MIX} where masks of N:M are tuned, {SOLVED_TARGET_MIX} for least squares "
        "alone",
    )
    reconstruct: Reconstruct | None = Field(
        default=None, description="what becomes of kept weights; None: the preset's"
    )
    tune_passes: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="passes over the windows when layers are tuned; None: 2 to 8, the fewer the more text, "
        "and twice as many where masks and weights are",
    )
    guard: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share of the windows held out to decide what refining keeps; 0: all is kept; None: "
        f"{GUARD}, and {TUNING_GUARD} where masks are tuned",
    )
    calibration: str = Field(default="builtin", description="builtin, c4, wikitext2, or a file")
    samples: int = Field(128, ge=1, description="calibration windows")
    seqlen: int = Field(2048, ge=2, description="tokens a window")
    bos: bool = Field(True, description="let windows begin as the tokenizer has texts begin, with BOS")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the choice of windows")
    batch_size: int | None = Field(None, ge=1, description="windows computed together; None: chosen by the device")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: Dtype = Field("auto", description="compute dtype; auto: the fastest that the device has")
    memory: int | None = Field(
        default=None, description="bytes of host memory, or like 8GiB; activations beyond are files; None: any"
    )
    device_memory: int | None = Field(default=None, description="bytes of the GPU's memory, or like 8GiB; None: all")
    activations_off_device: bool = Field(default=False, description="keep activations off a GPU that has room for them")
    format: Format = Field(default=Format.DENSE, description="dense, which loads everywhere, or packed: fewer bytes")
    overwrite: bool = Field(default=False, description="replace OUT, once the new one is complete")
    resume: bool = Field(default=False, description="go on with an unfinished run of OUT, if there is one")
    report: bool = Field(default=True, description="write OUT/report.html, a page with plots")
    revision: str | None = Field(None, description="of a hub id")

    @property
    def preset_name(self) -> Preset:
        """The preset that says what is not given; none was: the published method's."""
        return self.preset or Preset.PAPER

    @property
    def defaults(self) -> PresetSettings:
        """What the preset says."""
        return PRESETS[self.preset_name]

    @property
    def rebuilds(self) -> bool:
        """Is the initial mask rebuilt? By the preset, unless a setting of the rebuild is given."""
        if self.rebuild is not None:
            return self.rebuild
        return self.defaults.rebuild or self.granularity is not None or self.rebuild_ratio is not None

    @property
    def allocated_by(self) -> Allocation:
        """How sparsity is spread over the linears; a pruned model keeps its own."""
        return Allocation.UNIFORM

    @property
    def prunes_head(self) -> bool:
        """Is the output head pruned, too?"""
        return False

    @property
    def keeps_updates(self) -> bool:
        """Are the weights written that the initial method updated?"""
        return False

    @property
    def runs_what_it_writes(self) -> bool:
        """Does a finished layer's output come from the weights that are written?"""
        return True

    @property
    def refines(self) -> bool:
        """Is anything done to masks or weights beyond the rebuild?"""
        return self.refinement is not Refine.NONE or self.reconstruction is not Reconstruct.NONE

    def rules(self) -> list[Rule]:
        """What goes together in how masks and weights are refined."""
        refining = (self._rebuild_is_on, self._weights_fit_masks, self._targets_are_used, self._swaps_are_used)
        return [*super().rules(), *refining, self._passes_are_used]

    def _rebuild_is_on(self) -> Iterator[Message]:
        if self.rebuild is False and (self.granularity is not None or self.rebuild_ratio is not None):
            yield message("{granularity} and {rebuild_ratio} are of the rebuild, which is switched off")

    def _weights_fit_masks(self) -> Iterator[Message]:
        if self.refinement is Refine.TUNE and self.reconstruction is Reconstruct.LEAST_SQUARES:
            why = "which was asked for" if self.refine else "which is the preset's: give {refine:swaps} or none, too"
            yield message("{reconstruct:least-squares} does not go with {refine:tune}, " + why)

    def _targets_are_used(self) -> Iterator[Message]:
        unused = (
            "{setting} is of {refine} and {reconstruct}, and {preset} has neither: give one of them, or {mask}, too"
        )
        preset, mask = (SettingName("preset", value) for value in (self.preset_name, Preset.MASK))
        for name in ("target_mix", "guard"):
            if getattr(self, name) is not None and not self.refines:
                yield message(unused, setting=SettingName(name), preset=preset, mask=mask)

    def _swaps_are_used(self) -> Iterator[Message]:
        if self.swaps is not None and self.refinement is not Refine.SWAPS:
            yield message("{swaps} are of {refine:swaps}: give it, too")

    def _passes_are_used(self) -> Iterator[Message]:
        tunes = self.refinement is Refine.TUNE or self.reconstruction is Reconstruct.TUNE
        if self.tune_passes is not None and not tunes:
            yield message("{tune_passes} are of {refine:tune} and {reconstruct:tune}: give one of them, too")

    @property
    def refinement(self) -> Refine:
        """How masks are refined: as asked, or by the preset."""
        return self.refine or self.defaults.refine

    @property
    def reconstruction(self) -> Reconstruct:
        """What becomes of the kept weights."""
        return self.reconstruct or self.defaults.reconstruct

    @property
    def held_out_share(self) -> float:
        """Of the windows: as asked, or by what they decide."""
        if self.guard is not None:
            return self.guard
        return TUNING_GUARD if self.refinement is Refine.TUNE else GUARD

    @field_validator("memory", "device_memory", mode="before")
    @classmethod
    def _size_readable(cls, value: Any) -> Any:
        found = re.fullmatch(r"(\d{1,18}(?:\.\d+)?) ?([KMGT]i?)?B?", str(value)) if value is not None else None
        if value is None or (found is None and not isinstance(value, str)):
            return value
        if found is None or float(found[1]) == 0:
            raise ValueError(f"{value!r} is not a size, like 8GiB")
        unit = found[2] or ""
        return int(float(found[1]) * (1024 if unit.endswith("i") else 1000) ** (" KMGT".index(unit[0]) if unit else 0))
