"""Changes of the kept weights of a linear, which Adam tunes (`tuned_parameters.py`).

A value is W + r · c · Δ. Δ is the change; its step size is r · c, a factor of the row times a factor of the column.
"""

import torch
from torch import Tensor

from llm_barber.masking.by_rows import multiply
from llm_barber.masking.selection import apply_mask


class Changes:
    """Changes of values, all zero at first, in units of the steps' sizes.

    Args:
        values: of n linears, (n · out, in).
        row_steps: factors of the step sizes by row, float32, (n, out, 1).
        column_steps: factors of the step sizes by column, float32, (n, in).

    Attributes:
        parameter: the changes, float32, (n · out, in), a leaf for Adam.
    """

    def __init__(self, values: Tensor, row_steps: Tensor, column_steps: Tensor) -> None:
        self.parameter = torch.zeros_like(values, dtype=torch.float32, requires_grad=True)
        self._row_steps, self._column_steps = row_steps, column_steps.unsqueeze(1)

    def values(self, values: Tensor, dtype: torch.dtype, keep: Tensor | None = None) -> Tensor:
        """Changed values, in a dtype.

        Args:
            values: the values that are changed, (n · out, in).
            dtype: of the result.
            keep: keep mask, bool (n · out, in); None: nothing is pruned.

        Returns:
            (n · out, in).
        """
        changed = self._changed(values).to(dtype)
        return changed if keep is None else apply_mask(changed, keep)

    def set_gradient(self, gradient: Tensor, free: Tensor) -> None:
        """Set the parameter's gradient from the gradient by the values, float32, and `free`, both (n · out, in).

        `free`: bool, True where a value may change.
        """
        scaled = (self._by_linear(gradient) * self._row_steps).mul_(self._column_steps)
        self.parameter.grad = scaled.flatten(0, 1).mul_(free)

    def multiply(self, gradient: Tensor, values: Tensor) -> Tensor:
        """Multiply the gradient by the changed values in place; all float32 but the values, (n · out, in)."""
        return multiply(gradient, self._changed(values))

    def _changed(self, values: Tensor) -> Tensor:
        """Changed values, float32, (n · out, in)."""
        changes = self._by_linear(self.parameter.detach()) * self._row_steps
        return self._by_linear(values.float()).addcmul(changes, self._column_steps).flatten(0, 1)

    def _by_linear(self, tensor: Tensor) -> Tensor:
        """View a tensor (n · out, in) as (n, out, in)."""
        return tensor.view(len(self._row_steps), -1, tensor.shape[1])
