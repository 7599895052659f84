"""Settings of `prune` and `rebuild`: what is given for each, and what goes together."""

from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, Pattern, Unstructured, parse_pattern
from llm_barber.settings.base import (
    COMMAS,
    MODEL,
    NEEDS_REBUILD,
    CalibratedSettings,
    Format,
    OutputFolder,
    Size,
    check_apart,
    refuse_if,
)
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
    Initial,
    Preset,
    PresetSettings,
    Reconstruct,
    Refine,
    methods_with,
)
from llm_barber.settings.targets import Targets, compile_names, parse_target, read_targets


def _sparsity(value: float) -> float:
    return Unstructured(value).sparsity


def _pattern(value: str) -> str:
    parse_pattern(value)
    return value


def _pattern_or_none(value: str) -> str:
    return value if value == "unstructured" else _pattern(value)


def _expressions(value: tuple[str, ...]) -> tuple[str, ...]:
    compile_names(value)
    return value


Expressions = Annotated[tuple[str, ...], AfterValidator(_expressions)]


class RunSettings(CalibratedSettings):
    """Settings that `prune` and `rebuild` share; `command` is the name of the command."""

    command: ClassVar[str]

    output: OutputFolder = Field(title="OUT", description="Folder to write; it appears when it is complete")
    rebuild: bool | None = Field(None, description="Rebuild the initial mask (default: the preset's)")
    preset: Preset | None = Field(
        None,
        description="mask: tune masks; best: tune weights, too; paper: rebuild as published (default: mask; paper "
        "with --initial or a setting of the rebuild)",
    )
    refine: Refine | None = Field(
        None, description="Improve the mask by swaps in rows or by tuning layers (default: the preset's)"
    )
    swaps: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description=f"Most swaps of a row with --refine swaps (default: {SWAPS}; with N:M {PATTERN_SWAPS})",
    )
    target_mix: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Refine towards dense outputs on the pruned model's inputs (0) or the dense model's (1) (default: "
        f"{TARGET_MIX}; {PATTERN_TARGET_MIX} for tuned N:M masks; {SOLVED_TARGET_MIX} for least squares alone)",
    )
    reconstruct: Reconstruct | None = Field(
        None, description=f"Change kept weights: {', '.join(Reconstruct)} (default: the preset's)"
    )
    tune_passes: int | None = Field(
        None,
        ge=1,
        le=1000,
        description=f"Passes of tuning over the text (default: {FEWEST_PASSES}, or {PASSES_OF_LITTLE_TEXT} to "
        f"{TUNE_TOKENS // LITTLE_TEXT} with less than {TUNE_TOKENS // (FEWEST_PASSES + 1) + 1:,} tokens; for masks and "
        "weights twice that)",
    )
    tune_windows: int | None = Field(
        None,
        ge=1,
        le=1000,
        description=f"Windows a step of tuning (default: {SEQUENCES_A_STEP}, or 1 with less than {LITTLE_TEXT:,} "
        "tokens of text)",
    )
    guard: float | None = Field(
        None,
        ge=0,
        lt=1,
        description=f"Share of windows held out to check refining; 0: none (default: {GUARD:g}; {TUNING_GUARD:g} for "
        "tuned masks)",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the choice of windows")
    memory: Size | None = Field(
        None, description="Host memory to stay within, as 8GiB; activations beyond it go to files (default: no limit)"
    )
    device_memory: Size | None = Field(None, description="GPU memory to stay within (default: all free)")
    activations_off_device: bool = Field(False, description="Keep activations in host memory, not on the GPU")
    format: Format = Field(
        Format.DENSE, description="packed takes fewer bytes (default: dense, which loads everywhere)"
    )
    overwrite: bool = Field(False, description="Replace OUT when the new model is complete")
    resume: bool = Field(False, description="Continue an unfinished run of OUT, if any")
    report: bool = Field(True, description="Write report.html into OUT")

    @model_validator(mode="after")
    def _fits_the_steps(self) -> Self:
        """Refuse settings of steps that the run does not have."""
        sets_rebuild = self.granularity is not None or self.rebuild_ratio is not None
        refuse_if(self.rebuild is False and sets_rebuild, NEEDS_REBUILD, "leave out --no-rebuild")
        refuse_if(
            self.refinement is Refine.TUNE and self.reconstruction is Reconstruct.LEAST_SQUARES,
            f"--reconstruct least-squares does not go with --refine tune, given or by --preset {self.preset_name}",
            "give --refine swaps or none, or --reconstruct tune",
        )
        tunes = self.refinement is Refine.TUNE or self.reconstruction is Reconstruct.TUNE
        needs = {
            "swaps": (self.refinement is Refine.SWAPS, "--refine swaps"),
            "tune_passes": (tunes, "--refine tune or --reconstruct tune"),
            "tune_windows": (tunes, "--refine tune or --reconstruct tune"),
            "target_mix": (self.refines, "--refine or --reconstruct"),
            "guard": (self.refines, "--refine or --reconstruct"),
        }
        for name, (has, needed) in needs.items():
            refuse_if(
                getattr(self, name) is not None and not has,
                f"{self.typed(name)} needs {needed}, which --preset {self.preset_name} does not use",
                f"give {needed}, or --preset mask, or leave it out",
            )
        return self

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


class PruneConfig(RunSettings):
    """Settings of `prune`: the initial mask, and the steps that improve it.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    command = "prune"
    model: str = Field(title="MODEL", description=MODEL)
    initial: Initial | None = Field(
        None, description=f"Method of the initial mask: {', '.join(Initial)} (default: wanda)"
    )
    sparsity: Annotated[float, AfterValidator(_sparsity)] | None = Field(
        None, description="Fraction of weights to remove (default: 0.5)"
    )
    pattern: Annotated[str, AfterValidator(_pattern)] | None = Field(
        None, description="Keep N of every M inputs instead, as 2:4"
    )
    initial_granularity: Granularity | None = Field(
        None,
        description="Comparison group of the initial mask: output, input or linear (default: linear for "
        f"{methods_with('compares_in_linear')}, else output)",
    )
    keep_updates: bool = Field(False, description=f"Keep the weights that {methods_with('has_updates', 'or')} updated")
    allocation: Allocation | None = Field(
        None, description=f"Spread of sparsity over linears: {', '.join(Allocation)} (default: the preset's)"
    )
    reorder: bool | None = Field(None, description="Reorder channels so that N:M keeps more (default: the preset's)")
    include: Expressions = Field((), description="Prune only linears that match; repeatable")
    exclude: Expressions = Field((), description="Leave out linears that match; repeatable")
    skip_layers: Annotated[tuple[int, ...], COMMAS] = Field(
        (), description="Leave out decoder layers: 0,-1 is first and last"
    )
    sparsities: Annotated[dict[str, float | str], BeforeValidator(read_targets)] = Field(
        {}, description="YAML file, a line each: REGEX or layer number: 0.4, 2:4 or 0 (dense); the first match counts"
    )
    allow_dense_tail: bool = Field(False, description="If M does not divide a row, leave its end dense")
    prune_head: bool = Field(
        False, description="Prune the output head, too, without rebuild; if it is tied, it gets weights of its own"
    )

    @model_validator(mode="after")
    def _target_is_clear(self) -> Self:
        """Refuse settings of sparsity and N:M that exclude each other, and an output inside the model."""
        has_n_of_m, exclude = self.pattern is not None, "exclude each other"
        uneven = self.allocation not in (None, Allocation.UNIFORM)
        both = has_n_of_m and self.sparsity is not None
        refuse_if(both, f"--sparsity and --pattern {exclude}", "a pattern has its own sparsity")
        refuse_if(uneven and has_n_of_m, "--allocation is not for patterns", "N:M has one sparsity everywhere")
        refuse_if(
            uneven and bool(self.sparsities),
            f"--allocation and --sparsities {exclude}",
            "both say how much of each linear goes: give one of them",
        )
        refuse_if(
            bool(self.reorder) and not self._has_patterns,
            "--reorder needs --pattern",
            "without N:M the order of channels makes no difference: leave it out",
        )
        refuse_if(
            self.allow_dense_tail and not self._has_patterns,
            "--allow-dense-tail needs N:M, from --pattern or --sparsities",
            "leave it out",
        )
        self._check_folders()
        return self

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        """Refuse settings that the method of the initial mask does not have."""
        method, granularity = self.method, self.initial_granularity
        refuse_if(
            self.keep_updates and not method.has_updates,
            f"--keep-updates needs --initial {methods_with('has_updates', 'or')}",
            f"{method} updates no weights",
        )
        refuse_if(
            self.keep_updates and self.refines,
            "--keep-updates goes with neither --refine nor --reconstruct",
            "these start from the dense weights: leave out one of them",
        )
        refuse_if(
            granularity is Granularity.BLOCK,
            "--initial-granularity block is not defined",
            "choose output, input or linear",
        )
        refuse_if(
            granularity is not None and self.pattern is not None,
            "--initial-granularity is not for patterns",
            "N:M compares within its groups of M: leave it out",
        )
        refuse_if(
            granularity is not None and method.fixes_groups,
            f"--initial-granularity is not for {method}",
            f"{method} chooses the weights that it compares: leave it out",
        )
        return self

    def _check_folders(self) -> None:
        check_apart(self.output, self.model, self.typed("model"))

    @property
    def _has_patterns(self) -> bool:
        """True if any linear may be pruned to N:M."""
        targets = (self.target, *(parse_target(target) for target in self.sparsities.values()))
        return any(isinstance(target, NofM) for target in targets)

    @property
    def reorders(self) -> bool:
        """True if channels are reordered first: as `reorder` says, or as the preset does for N:M."""
        return self.reorder if self.reorder is not None else self._has_patterns and self.defaults.reorder

    @property
    def method(self) -> Initial:
        """Method of the initial mask."""
        return self.initial or Initial.WANDA

    @property
    def preset_name(self) -> Preset:
        """The preset that gives the defaults: `mask`; `paper` if a method or a setting of the rebuild is given."""
        of_paper = (self.initial, self.rebuild, self.granularity, self.rebuild_ratio)
        default = Preset.MASK if all(value is None for value in of_paper) else Preset.PAPER
        return self.preset or default

    @property
    def allocated_by(self) -> Allocation:
        """The spread of sparsity: `allocation`, or the preset's; uniform with N:M or `sparsities`."""
        if self.allocation is not None:
            return self.allocation
        return Allocation.UNIFORM if self.pattern is not None or self.sparsities else self.defaults.allocation

    @property
    def prunes_head(self) -> bool:
        """True if the output head is pruned, too."""
        return self.prune_head

    @property
    def keeps_updates(self) -> bool:
        """True if the weights are written that the initial method updated."""
        return self.keep_updates

    @property
    def runs_what_it_writes(self) -> bool:
        """True if a finished layer's output is computed from the weights that are written.

        False for the masks alone of methods that update weights: activations go through the updated weights, while,
        without `keep_updates`, the dense weights are written.
        """
        return not self.method.has_updates or self.keep_updates or self.rebuilds or self.refines

    @property
    def targets(self) -> Targets:
        """Sparsity or N:M of each linear."""
        return Targets(
            self.target,
            self.include,
            self.exclude,
            self.skip_layers,
            self.sparsities,
            allow_dense_tail=self.allow_dense_tail,
            over_linear=self.preset_name is not Preset.PAPER,
        )

    @property
    def target(self) -> Pattern:
        """Sparsity or N:M of linears without a sparsity of their own."""
        if self.pattern is not None:
            return parse_pattern(self.pattern)
        return Unstructured(0.5 if self.sparsity is None else self.sparsity)


class RebuildConfig(RunSettings):
    """Settings of `rebuild`: rebuild the mask of a checkpoint that any tool pruned.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    command = "rebuild"
    dense: str = Field(title="DENSE", description="The dense model: folder, hub id or GGUF file")
    pruned: str = Field(title="PRUNED", description="The same model, pruned by any tool: folder or hub id")
    pruned_revision: str | None = Field(
        None, description="Revision of PRUNED, if it is a hub id; --revision is of DENSE"
    )
    initial: Initial | None = Field(
        None,
        description=f"Method that pruned PRUNED: {', '.join(Initial)}; sets the defaults of granularity and ratio "
        "(default: its record's, else wanda)",
    )
    pattern: Annotated[str, AfterValidator(_pattern_or_none)] | None = Field(
        None, description="N:M to keep, or unstructured (default: found in PRUNED)"
    )
    preset: Preset | None = Field(
        None,
        description="paper: the published rebuild; mask: tune masks instead; best: tune weights, too (default: paper)",
    )

    @model_validator(mode="after")
    def _something_is_to_do(self) -> Self:
        nothing = "--no-rebuild, --refine none and --reconstruct none leave nothing to do"
        refuse_if(not self.rebuilds and not self.refines, nothing, "leave out one of them")
        for name in ("dense", "pruned"):
            check_apart(self.output, getattr(self, name), self.typed(name))
        return self
