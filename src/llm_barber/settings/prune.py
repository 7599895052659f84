"""The settings of `prune` and `rebuild`, what is given for each, and what goes together."""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import partial
from typing import Any

from pydantic import Field, field_validator

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, Pattern, Unstructured, parse_pattern
from llm_barber.messages import Message, SettingName, message
from llm_barber.settings.base import RunSettings, same_folder
from llm_barber.settings.checked import Rule
from llm_barber.settings.presets import (
    Allocation,
    Preset,
)
from llm_barber.settings.targets import Targets, compile_names, parse_target, read_targets


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

    @property
    def compares_in_linear(self) -> bool:
        """Does its released program compare the weights of a whole linear, not those of each row?"""
        return self in (Initial.MAGNITUDE, Initial.RIA, Initial.ALPS)


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


class PruneConfig(RunSettings):
    """Settings of `prune`: choose an initial mask and rebuild it.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    command = "prune"

    model: str = Field(description="folder, hub id or GGUF file")
    initial: Initial | None = Field(default=None, description="method of the initial mask; None: wanda")
    sparsity: float | None = Field(None, description="fraction of weights to remove; None: 0.5")
    pattern: str | None = Field(None, description="N:M, N kept of every M inputs, instead of a sparsity")
    initial_granularity: Granularity | None = Field(
        default=None,
        description="comparison group of the initial mask; None: linear for magnitude, RIA and ALPS, else output",
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
        default={},
        description="a sparsity, N:M or 0 by regular expression of linears or number of a layer; or a YAML file of it",
    )

    allow_dense_tail: bool = Field(
        default=False, description="where M does not divide a row, leave the inputs after its last whole group dense"
    )

    prune_head: bool = Field(
        default=False,
        description="prune the output head, too, without rebuilding it; one that is tied to the embedding gets weights "
        "of its own",
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

    def rules(self) -> list[Rule]:
        """What goes together in how the initial mask is chosen, and the rules of all runs."""
        chosen = (self._target_is_clear, self._updates_are_there, self._sparsity_can_be_spread, self._groups_are_free)
        return [*chosen, *super().rules(), self._output_is_another]

    def _output_is_another(self) -> Iterable[Message]:
        return same_folder("model", self.model, self.output)

    def _target_is_clear(self) -> Iterator[Message]:
        if self.sparsity is not None and self.pattern is not None:
            yield message("{sparsity} and {pattern} exclude each other: a pattern has its own sparsity")

    def _updates_are_there(self) -> Iterator[Message]:
        if self.keep_updates and not self.method.has_updates:
            needs = "{keep_updates} needs {initial:sparsegpt} or alps: {method} updates no weights"
            yield message(needs, method=self.method)
        elif self.keep_updates and self.refines:
            yield message(
                "{keep_updates} goes with neither {refine} nor {reconstruct}: these start from the dense weights"
            )

    def _sparsity_can_be_spread(self) -> Iterator[Message]:
        asked = self.allocation not in (None, Allocation.UNIFORM)
        if asked and self.pattern is not None:
            yield message("{allocation} is not for patterns: N:M has one sparsity everywhere")
        if asked and self.sparsities:
            yield message("{allocation} and {sparsities} exclude each other: both say how much of each linear goes")

    def _groups_are_free(self) -> Iterator[Message]:
        if self.initial_granularity is Granularity.BLOCK:
            yield message("{initial_granularity:block} is not defined: choose output, input or linear")
        if self.initial_granularity is not None and self.pattern is not None:
            yield message("{initial_granularity} is not for patterns: N:M compares within its groups of M")
        if self.initial_granularity is not None and self.method is Initial.SPARSEGPT:
            yield message("{initial_granularity} is not for sparsegpt: it compares within its blocks of columns")

    @property
    def method(self) -> Initial:
        """That of the initial mask."""
        return self.initial or Initial.WANDA

    @property
    def preset_name(self) -> Preset:
        """Where none was given, the best mask's, or the published method's if one was asked for.

        Whoever names a method, or a setting of the rebuild, wants that and nothing else.
        """
        named = (self.initial, self.rebuild, self.granularity, self.rebuild_ratio)
        asked = any(one is not None for one in named)
        return self.preset or (Preset.PAPER if asked else Preset.MASK)

    @property
    def allocated_by(self) -> Allocation:
        """How sparsity is spread: as asked for, or by the preset where that says nothing else of it."""
        if self.allocation is not None:
            return self.allocation
        return Allocation.UNIFORM if self.pattern is not None or self.sparsities else self.defaults.allocation

    @property
    def prunes_head(self) -> bool:
        """Is the output head pruned, too?"""
        return self.prune_head

    @property
    def keeps_updates(self) -> bool:
        """Are the weights written that the initial method updated?"""
        return self.keep_updates

    @property
    def runs_what_it_writes(self) -> bool:
        """Does a finished layer's output come from the weights that are written?

        SparseGPT's and ALPS' own masks are those of a stream that goes through their updated weights, while, without
        `keep_updates`, the dense ones are written.
        """
        return not self.method.has_updates or self.keep_updates or self.rebuilds or self.refines

    @property
    def targets(self) -> Targets:
        """How much of each linear goes."""
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
        """How many weights go, where nothing else is said."""
        if self.pattern is not None:
            return parse_pattern(self.pattern)
        return Unstructured(0.5 if self.sparsity is None else self.sparsity)


class RebuildConfig(RunSettings):
    """Settings of `rebuild`: rebuild the mask of a checkpoint that any tool pruned.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    command = "rebuild"

    dense: str = Field(description="the dense model: folder, hub id or GGUF file")
    pruned: str = Field(description="the pruned model: folder or hub id")
    pruned_revision: str | None = Field(None, description="of the pruned model's hub id; `revision` is the dense one's")
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

    def rules(self) -> list[Rule]:
        """Something is to be done, to another folder, and the rules of all runs."""
        others = [partial(same_folder, name, getattr(self, name), self.output) for name in ("dense", "pruned")]
        return [*super().rules(), self._something_is_to_do, *others]

    def _something_is_to_do(self) -> Iterator[Message]:
        if not self.rebuilds and not self.refines:
            nothing = "{no_rebuild}, {refine:none} and {reconstruct:none} leave nothing to do"
            yield message(nothing, no_rebuild=SettingName("rebuild", False))


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
