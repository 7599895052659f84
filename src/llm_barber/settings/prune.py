"""The settings of `prune` and `rebuild`, what is given for each, and what goes together."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Annotated, Any

from pydantic import Field, field_validator

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, Pattern, Unstructured, parse_pattern
from llm_barber.messages import Message, SettingName, message
from llm_barber.settings.base import COMMAS, same_folder
from llm_barber.settings.checked import Rule
from llm_barber.settings.initial import Initial, methods_with
from llm_barber.settings.presets import Allocation, Preset
from llm_barber.settings.run import RunSettings
from llm_barber.settings.targets import Targets, compile_names, parse_target, read_targets


class PruneConfig(RunSettings):
    """Settings of `prune`: the initial mask, and the steps that improve it.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    command = "prune"

    model: str = Field(description="Folder, hub id (org/name[@revision]) or GGUF file")
    initial: Initial | None = Field(default=None, description="Method of the initial mask (default: wanda)")
    sparsity: float | None = Field(None, description="Fraction of weights to remove (default: 0.5)")
    pattern: str | None = Field(None, description="Keep N of every M inputs instead, as 2:4")
    initial_granularity: Granularity | None = Field(
        default=None,
        description=f"Comparison group of the initial mask: output, input or linear (default: linear for "
        f"{methods_with('compares_in_linear')}, else output)",
    )
    keep_updates: bool = Field(
        default=False, description=f"Keep the weights that {methods_with('has_updates', 'or')} updated"
    )
    allocation: Allocation | None = Field(
        default=None,
        description="Spread of sparsity over linears (default: the preset's)",
    )
    reorder: bool | None = Field(
        default=None, description="Reorder channels so that N:M keeps more (default: the preset's)"
    )
    include: tuple[str, ...] = Field(default=(), description="Prune only linears that match; repeatable")
    exclude: tuple[str, ...] = Field(default=(), description="Leave out linears that match; repeatable")
    skip_layers: Annotated[tuple[int, ...], COMMAS[1]] = Field(
        default=(), description="Leave out decoder layers: 0,-1 is first and last"
    )
    sparsities: dict[str, float | str] = Field(
        default={},
        description="YAML file, a line each: REGEX or layer number: 0.4, 2:4 or 0 (dense); the first match counts",
    )
    allow_dense_tail: bool = Field(default=False, description="If M does not divide a row, leave its end dense")
    prune_head: bool = Field(
        default=False,
        description="Prune the output head, too, without rebuild; if it is tied, it gets weights of its own",
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
        targets = read_targets(value)
        if isinstance(targets, dict):
            compile_names(list(targets))
            for expression, target in targets.items():
                try:
                    parse_target(target)
                except ValueError as error:
                    raise ValueError(f"{expression}: {error}") from error
        return targets

    def rules(self) -> list[Rule]:
        """Rules about the initial mask, and those of every run."""
        chosen = (self._target_is_clear, self._updates_are_there, self._sparsity_can_be_spread, self._groups_are_free)
        further = (self._order_matters, self._rows_have_groups)
        return [*chosen, *further, *super().rules(), self._output_is_another]

    def _rows_have_groups(self) -> Iterator[Message]:
        groups = self.pattern is not None or any(":" in str(target) for target in self.sparsities.values())
        if self.allow_dense_tail and not groups:
            yield message("{allow_dense_tail} needs N:M, from {pattern} or {sparsities}")

    def _output_is_another(self) -> Iterable[Message]:
        return same_folder("model", self.model, self.output)

    def _target_is_clear(self) -> Iterator[Message]:
        if self.sparsity is not None and self.pattern is not None:
            yield message("{sparsity} and {pattern} exclude each other: a pattern has its own sparsity")

    def _updates_are_there(self) -> Iterator[Message]:
        if self.keep_updates and not self.method.has_updates:
            first, *further = (method for method in Initial if method.has_updates)
            needs = "{keep_updates} needs {initial}{further}: {method} updates no weights"
            setting = SettingName("initial", first)
            yield message(
                needs, initial=setting, further="".join(f" or {name}" for name in further), method=self.method
            )
        elif self.keep_updates and self.refines:
            yield message(
                "{keep_updates} goes with neither {refine} nor {reconstruct}: these start from the dense weights"
            )

    def _sparsity_can_be_spread(self) -> Iterator[Message]:
        uneven = self.allocation not in (None, Allocation.UNIFORM)
        if uneven and self.pattern is not None:
            yield message("{allocation} is not for patterns: N:M has one sparsity everywhere")
        if uneven and self.sparsities:
            yield message("{allocation} and {sparsities} exclude each other: both say how much of each linear goes")

    def _groups_are_free(self) -> Iterator[Message]:
        if self.initial_granularity is Granularity.BLOCK:
            yield message("{initial_granularity:block} is not defined: choose output, input or linear")
        if self.initial_granularity is not None and self.pattern is not None:
            yield message("{initial_granularity} is not for patterns: N:M compares within its groups of M")
        if self.initial_granularity is not None and self.method.fixes_groups:
            yield message(
                "{initial_granularity} is not for {method}, which chooses the weights that it compares",
                method=self.method,
            )

    def _order_matters(self) -> Iterator[Message]:
        if self.reorder and not self._has_patterns:
            yield message("{reorder} needs {pattern}: without N:M the order of channels makes no difference")

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
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    command = "rebuild"

    dense: str = Field(description="The dense model: folder, hub id or GGUF file")
    pruned: str = Field(description="The same model, pruned by any tool: folder or hub id")
    pruned_revision: str | None = Field(
        None, description="Revision of `pruned`, if it is a hub id; `revision` is of `dense`"
    )
    initial: Initial | None = Field(
        None,
        description="Method that pruned PRUNED; sets the defaults of granularity and ratio (default: its record's, "
        "else wanda)",
    )
    pattern: str | None = Field(None, description="N:M to keep, or unstructured (default: found in `pruned`)")
    preset: Preset | None = Field(
        default=None,
        description="paper: the published rebuild; mask: tune masks instead; best: tune weights, too (default: paper)",
    )

    @field_validator("pattern")
    @classmethod
    def _pattern_readable(cls, value: str | None) -> str | None:
        if value is not None and value != "unstructured":
            parse_pattern(value)
        return value

    def rules(self) -> list[Rule]:
        """Rules about both models, and those of every run."""
        in_output = [partial(same_folder, name, getattr(self, name), self.output) for name in ("dense", "pruned")]
        return [*super().rules(), self._something_is_to_do, *in_output]

    def _something_is_to_do(self) -> Iterator[Message]:
        if not self.rebuilds and not self.refines:
            nothing = "{no_rebuild}, {refine:none} and {reconstruct:none} leave nothing to do"
            yield message(nothing, no_rebuild=SettingName("rebuild", False))
