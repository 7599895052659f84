"""A linear while it is pruned: its mask, and what its weights are under that mask."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM
from llm_barber.masking.selection import apply_mask


@dataclass(frozen=True)
class PrunedLinear:
    """A linear that is pruned; all tensors are (out, in).

    `keep`: keep mask, bool. `weight`: pruned weights, zero where pruned; some methods update the kept ones.
    `values`: value of each weight if the final mask keeps it. `fixed`: True where a weight takes no part in the
    rebuild; None: nowhere. `few_tokens`: its expert was given so few tokens that the mask is magnitude's, or a
    checkpoint's, and stays; None: tokens are not counted yet.
    """

    keep: Tensor
    weight: Tensor
    values: Tensor
    pattern: NofM | None
    fixed: Tensor | None = None
    few_tokens: bool | None = None

    def with_mask(self, keep: Tensor) -> "PrunedLinear":
        """The same linear with another mask."""
        return replace(self, keep=keep, weight=apply_mask(self.values, keep))

    def left_alone(self) -> "PrunedLinear":
        """The same linear as one of an expert with few tokens: its mask stays as it is."""
        return replace(self, fixed=torch.ones_like(self.keep), few_tokens=True)

    @property
    def free(self) -> Tensor:
        """Kept weights that may change, bool (out, in): neither zero in the dense model nor an idle expert's."""
        return self.keep if self.fixed is None else self.keep & ~self.fixed

    @property
    def has_updates(self) -> bool:
        """True if the kept weights were updated, and others are written."""
        return not torch.equal(self.weight, self.final)

    @property
    def final(self) -> Tensor:
        """Weights that are written: the values under the mask."""
        return apply_mask(self.values, self.keep)


def fixed_weights(linears: Sequence[PrunedLinear]) -> list[Tensor] | None:
    """List `fixed` of each linear, bool (out, in); None if no weight of any linear is fixed."""
    if all(linear.fixed is None for linear in linears):
        return None
    return [torch.zeros_like(linear.keep) if linear.fixed is None else linear.fixed for linear in linears]
