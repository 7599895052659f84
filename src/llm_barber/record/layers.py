"""Results of a run, per linear, block and decoder layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from llm_barber.model.architecture import kind_of

# A number that may be NaN or infinite; JSON has null for these.
Unsure = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
]


class Result(BaseModel):
    """A part of the record; frozen, and unknown fields are ignored.

    Fields of `later_fields` are left out where they have their default: records that were written before the fields
    existed stay readable.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    later_fields: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        for name in self.later_fields:
            if getattr(self, name) == type(self).model_fields[name].default:
                content.pop(name, None)
        return content


class LinearResult(Result):
    """Counts of one linear's weights.

    `zeros` also counts kept weights that are zero in the dense model. `grown`: pruned weights that came back,
    `dropped`: kept weights that went. `pattern`: the N:M that the linear was pruned to. `few_tokens`: an expert's
    linear that saw too few calibration tokens.
    """

    name: str
    shape: tuple[PositiveInt, PositiveInt]
    pruned: int
    zeros: int
    beneficial_pairs: int = 0
    grown: int = 0
    dropped: int = 0
    pattern: str | None = None
    few_tokens: bool = False

    @model_validator(mode="after")
    def _counts_possible(self) -> Self:
        if not 0 <= self.pruned <= self.zeros <= self.weights:
            raise ValueError("more pruned weights than zeros, or more zeros than weights")
        if not all(0 <= count <= self.weights for count in (self.beneficial_pairs, self.grown, self.dropped)):
            raise ValueError("more pairs or swapped weights than weights")
        return self

    @property
    def kind(self) -> str:
        """The linear's name, the same for all experts."""
        return kind_of(self.name)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """The fraction removed by the mask."""
        return self.pruned / self.weights


class BlockResult(Result):
    """One block, with its mean over calibration sequences of mean((y_dense − y)²), before and after.

    The errors of a block that was refined and not rebuilt are those of the held-out sequences, if there are any.
    `rejected`: the refined block was worse on held-out windows, and was left as it was.
    """

    name: str
    error_before: float | None
    error_after: float | None
    rejected: bool = False
    linears: tuple[LinearResult, ...]

    @model_validator(mode="after")
    def _both_errors_or_none(self) -> Self:
        if (self.error_before is None) != (self.error_after is None):
            raise ValueError("one of the two errors is missing")
        return self


class Concentration(Result):
    """Shares of the largest token and of the largest channel in a layer's squared distance.

    The largest token is that of each held-out window. The distance is that of the layer's output from its target, as
    the loss of tuning counts it: huge channels count for less, huge tokens do not. Before tuning, and after the pass
    that was kept. 0 to 1; NaN where it overflowed.
    """

    token_before: Unsure
    token_after: Unsure
    channel_before: Unsure
    channel_after: Unsure


def kept_pass(held_out: Sequence[float]) -> int | None:
    """Last pass that beats the untuned layer on the held-out windows; 0: none does.

    None: no window was held out.

    Args:
        held_out: mean distances from the target before tuning and after each pass. NaN beats nothing.

    Example: (0.5, 0.4, 0.6, 0.45, 0.7) → 3
    """
    if not held_out:
        return None
    return max((number for number, error in enumerate(held_out) if error < held_out[0]), default=0)


class LayerResult(Result):
    """One decoder layer.

    `held_out`: of a layer that was tuned, its mean distance (`method/distance.py`) from its target on the held-out
    windows, before tuning and after each pass; NaN for one that overflowed. `kept_pass` says which one is kept.
    `concentration`: of this distance on one token and one channel; None where no window was held out.
    """

    index: int
    seconds: float
    held_out: tuple[Unsure, ...] = ()
    concentration: Concentration | None = None
    blocks: tuple[BlockResult, ...]
    later_fields = ("concentration",)

    @property
    def kept_pass(self) -> int | None:
        """Pass of tuning that was kept, 0: none; None: no window was held out, or nothing was tuned."""
        return kept_pass(self.held_out)

    @property
    def linears(self) -> tuple[LinearResult, ...]:
        """All linears, block after block."""
        return tuple(linear for block in self.blocks for linear in block.linears)


@dataclass(frozen=True)
class ErrorChange:
    """Change of the reconstruction error of a kind of block.

    Means over `layers`, and the number of layers in which the error fell and rose.
    """

    layers: int
    before: float
    after: float
    fell: int
    rose: int

    @property
    def stayed(self) -> int:
        """Number of layers in which the error stayed the same."""
        return self.layers - self.fell - self.rose


class LinearTotals(Result):
    """A linear's counts, summed over all decoder layers."""

    name: str
    weights: int
    pruned: int
    beneficial_pairs: int
    grown: int
    dropped: int

    @property
    def sparsity(self) -> float:
        """The fraction removed by the masks."""
        return self.pruned / self.weights
