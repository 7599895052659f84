"""Settings that `prune` and `rebuild` share."""

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from llm_barber.masking.granularity import Granularity
from llm_barber.messages import Message, SettingName, message
from llm_barber.settings.base import Dtype, Format, OutputFolder, Size, StructureSettings
from llm_barber.settings.checked import Rule
from llm_barber.settings.initial import RELEASED_GRANULARITIES, RELEASED_RATIOS
from llm_barber.settings.presets import (
    FEWEST_PASSES,
    GUARD,
    LITTLE_TEXT,
    PASSES_OF_LITTLE_TEXT,
    PATTERN_SWAPS,
    PATTERN_TARGET_MIX,
    PRESETS,
    SEQUENCES_A_STEP,
    SOLVED_TARGET_MIX,
    SWAPS,
    TARGET_MIX,
    TUNE_TOKENS,
    TUNING_GUARD,
    Allocation,
    Preset,
    PresetSettings,
    Reconstruct,
    Refine,
)

BATCH_SIZE = "Most windows at a time; can change bfloat16 rounding (default: by the device)"
USUAL_SAMPLES, USUAL_SEQLEN = 128, 2048  # calibration windows, and tokens of each, as in the paper
NEEDS_REBUILD = "{granularity} and {rebuild_ratio} need the rebuild: leave out {no_rebuild}"


class RunSettings(StructureSettings):
    """Settings of a run; `command` is the name of the command that starts it."""

    command: ClassVar[str]

    output: OutputFolder = Field(description="Folder to write; it appears when it is complete")
    rebuild: bool | None = Field(default=None, description="Rebuild the initial mask (default: the preset's)")
    granularity: Granularity | None = Field(
        None,
        description=f"Comparison group of the rebuild (default: {RELEASED_GRANULARITIES}; with N:M output)",
    )
    rebuild_ratio: float | None = Field(
        None, gt=0, le=1, description=f"Share of the beneficial pairs to swap (default: {RELEASED_RATIOS})"
    )
    preset: Preset | None = Field(
        default=None,
        description="mask: tune masks; best: tune weights, too; paper: rebuild as published (default: mask; paper "
        "with `initial` or a setting of the rebuild)",
    )
    refine: Refine | None = Field(
        default=None,
        description="Improve the mask by swaps in rows or by tuning layers (default: the preset's)",
    )
    swaps: int | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description=f"Most swaps of a row with `refine swaps` (default: {SWAPS}; with N:M {PATTERN_SWAPS})",
    )
    target_mix: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Refine towards dense outputs on the pruned model's inputs (0) or the dense model's (1) "
        f"(default: {TARGET_MIX}; {PATTERN_TARGET_MIX} for tuned N:M masks; {SOLVED_TARGET_MIX} "
        "for least squares alone)",
    )
    reconstruct: Reconstruct | None = Field(default=None, description="Change kept weights (default: the preset's)")
    tune_passes: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description=f"Passes of tuning over the text (default: {FEWEST_PASSES}, or {PASSES_OF_LITTLE_TEXT} to "
        f"{TUNE_TOKENS // LITTLE_TEXT} with less than {TUNE_TOKENS // (FEWEST_PASSES + 1) + 1:,} tokens; for masks and "
        "weights twice that)",
    )
    tune_windows: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description=f"Windows a step of tuning (default: {SEQUENCES_A_STEP}, or 1 with less than {LITTLE_TEXT:,} "
        "tokens of text)",
    )
    guard: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description=f"Share of windows held out to check refining; 0: none (default: {GUARD:g}; "
        f"{TUNING_GUARD:g} for tuned masks)",
    )
    calibration: str = Field(
        default="builtin",
        description="builtin, c4, wikitext2, or a .txt, .jsonl, .parquet or .safetensors file, whose windows "
        "(input_ids) are taken as they are",
    )
    samples: int = Field(USUAL_SAMPLES, ge=1, description="Windows of text")
    seqlen: int = Field(USUAL_SEQLEN, ge=2, description="Tokens a window")
    bos: bool = Field(True, description="Begin each window with BOS if the tokenizer begins texts with it")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the choice of windows")
    batch_size: int | None = Field(None, ge=1, description=BATCH_SIZE)
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: Dtype = Field("auto", description="Compute in float32, bfloat16 or float16 (default: auto, the fastest)")
    memory: Size | None = Field(
        default=None,
        description="Host memory to stay within, as 8GiB; activations beyond it go to files (default: no limit)",
    )
    device_memory: Size | None = Field(default=None, description="GPU memory to stay within (default: all free)")
    activations_off_device: bool = Field(default=False, description="Keep activations in host memory, not on the GPU")
    format: Format = Field(
        default=Format.DENSE, description="packed takes fewer bytes (default: dense, which loads everywhere)"
    )
    overwrite: bool = Field(default=False, description="Replace `output` when the new model is complete")
    resume: bool = Field(default=False, description="Continue an unfinished run of `output`, if any")
    report: bool = Field(default=True, description="Write report.html into `output`")
    revision: str | None = Field(None, description="Revision of a hub id")

    @property
    def preset_name(self) -> Preset:
        """The preset that gives the defaults; without one, `paper`."""
        return self.preset or Preset.PAPER

    @property
    def defaults(self) -> PresetSettings:
        """The preset's settings."""
        return PRESETS[self.preset_name]

    @property
    def rebuilds(self) -> bool:
        """True if the initial mask is rebuilt: by the preset, or because a setting of the rebuild is given."""
        if self.rebuild is not None:
            return self.rebuild
        return self.defaults.rebuild or self.granularity is not None or self.rebuild_ratio is not None

    @property
    def allocated_by(self) -> Allocation:
        """The spread of sparsity over linears; a pruned model keeps its own."""
        return Allocation.UNIFORM

    @property
    def reorders(self) -> bool:
        """True if channels are reordered first; those of a pruned model keep its order."""
        return False

    @property
    def prunes_head(self) -> bool:
        """True if the output head is pruned, too."""
        return False

    @property
    def keeps_updates(self) -> bool:
        """True if the weights are written that the initial method updated."""
        return False

    @property
    def runs_what_it_writes(self) -> bool:
        """True if a finished layer's output is computed from the weights that are written."""
        return True

    @property
    def refines(self) -> bool:
        """True if masks or weights change beyond the rebuild."""
        return self.refinement is not Refine.NONE or self.reconstruction is not Reconstruct.NONE

    @property
    def refinement(self) -> Refine:
        """The refinement of masks: `refine`, or the preset's."""
        return self.refine or self.defaults.refine

    @property
    def reconstruction(self) -> Reconstruct:
        """The change of kept weights: `reconstruct`, or the preset's."""
        return self.reconstruct or self.defaults.reconstruct

    @property
    def held_out_share(self) -> float:
        """Share of the windows that are held out: `guard`, or the default of the refinement."""
        if self.guard is not None:
            return self.guard
        return TUNING_GUARD if self.refinement is Refine.TUNE else GUARD

    def rules(self) -> list[Rule]:
        """Rules about refining."""
        refining = (self._rebuild_is_on, self._weights_fit_masks, self._targets_are_used, self._swaps_are_used)
        return [*super().rules(), *refining, self._passes_are_used]

    def _rebuild_is_on(self) -> Iterator[Message]:
        if self.rebuild is False and (self.granularity is not None or self.rebuild_ratio is not None):
            yield message(NEEDS_REBUILD, no_rebuild=SettingName("rebuild", False))

    def _weights_fit_masks(self) -> Iterator[Message]:
        if self.refinement is Refine.TUNE and self.reconstruction is Reconstruct.LEAST_SQUARES:
            why = "which was asked for" if self.refine else "which is the preset's: give {refine:swaps} or none, too"
            yield message("{reconstruct:least-squares} does not go with {refine:tune}, " + why)

    def _targets_are_used(self) -> Iterator[Message]:
        unused = (
            "{setting} needs {refine} or {reconstruct}, which {preset} does not use: give one of them, or {mask}, too"
        )
        preset, mask = (SettingName("preset", value) for value in (self.preset_name, Preset.MASK))
        for name in ("target_mix", "guard"):
            if getattr(self, name) is not None and not self.refines:
                yield message(unused, setting=SettingName(name), preset=preset, mask=mask)

    def _swaps_are_used(self) -> Iterator[Message]:
        if self.swaps is not None and self.refinement is not Refine.SWAPS:
            yield message("{swaps} needs {refine:swaps}")

    def _passes_are_used(self) -> Iterator[Message]:
        tunes = self.refinement is Refine.TUNE or self.reconstruction is Reconstruct.TUNE
        for name in ("tune_passes", "tune_windows"):
            if getattr(self, name) is not None and not tunes:
                needs = "{setting} are of {refine:tune} and {reconstruct:tune}: give one of them, too"
                yield message(needs, setting=SettingName(name))
