"""A linear while it is pruned: its mask, and what its weights are under that mask."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM
from llm_barber.masking.selection import apply_mask


@dataclass(frozen=True)
class PrunedLinear:
    """A pruned linear before its mask is rebuilt; all tensors (out, in).

    `keep`: bool. `weight`: the pruned weights, zero where pruned (SparseGPT updates the others). `values`: what a
    weight is where the final mask keeps it. `fixed`: True where a weight takes no part in the rebuild.
    `few_tokens`: so little was routed to its expert that its mask is magnitude's, or a checkpoint's, and stays; None:
    no tokens were counted yet.
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
        """The same linear of an expert with few tokens: nothing is swapped."""
        return replace(self, fixed=torch.ones_like(self.keep), few_tokens=True)

    @property
    def free(self) -> Tensor:
        """Kept weights that may change, bool (out, in): neither zero in the dense model, nor of an idle expert."""
        return self.keep if self.fixed is None else self.keep & ~self.fixed

    @property
    def final(self) -> Tensor:
        """What is written: its values under its mask."""
        return apply_mask(self.values, self.keep)
