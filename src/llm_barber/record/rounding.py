"""The rounding of a packed model's kept weights, for its record and for people."""

from statistics import fmean
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from llm_barber.checkpoint.packed_format import RoundedEntry
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.record.layers import Result


class Rounding(Result):
    """The rounding of kept weights.

    `values`: the type that they were rounded to. `scales`: the type of the scales. `group`: columns of a scale.
    `errors`: relative root mean square error of each tensor that was rounded.
    """

    values: Literal["int8"] = "int8"
    scales: Literal["bfloat16"] = "bfloat16"
    group: PositiveInt
    errors: dict[str, NonNegativeFloat] = Field(min_length=1)

    @property
    def mean(self) -> float:
        """Mean of the errors."""
        return fmean(self.errors.values())

    @property
    def largest(self) -> tuple[str, float]:
        """The tensor with the largest error, and the error."""
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def words(self) -> str:
        """The rounding and its errors in words, after "kept weights are"."""
        name, error = self.largest
        return (
            f"rounded to {self.values}, with a {self.scales} scale for each row and {self.group} columns: relative "
            f"root mean square error {self.mean:.2%} in the mean, {error:.2%} at most ({name})"
        )

    def of_values(self, words: str) -> str:
        """The rounding after the source of the values in words."""
        return f"{words.removesuffix(', bit for bit')}, {self.words}"


def rounding_of(source: CheckpointSource) -> Rounding | None:
    """The rounding of a packed checkpoint as its tables have it; None: its values are exact, or it is not packed."""
    entries = {
        name: entry
        for table in source.packed.values()
        for name, entry in table.packed.items()
        if isinstance(entry, RoundedEntry)
    }
    if not entries:
        return None
    groups = max(entry.group for entry in entries.values())
    return Rounding(group=groups, errors={name: entry.error for name, entry in entries.items()})
