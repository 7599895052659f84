"""Changes of the kept weights of a stack of linears, which Adam tunes (`tuned_parameters.py`).

A value is W + r · c · Δ, with Δ the change and r · c the size of its step, of a row and of a column. C computes them on
a CPU where the extension was built. Elsewhere a CPU takes a few rows at a time, so that what is computed on the way
stays in its cache; a GPU takes all at once. The bits are the same.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llm_barber.masking.by_rows import NUMBERS
from llm_barber.masking.selection import apply_mask
from llm_barber.native.changes import DTYPES, ChangedByC


class Changes:
    """Changes of values, all zero at first, in units of the steps' sizes.

    Args:
        values: of n linears, (n · out, in).
        row_steps: sizes of steps by row, float32, (n, out, 1).
        column_steps: … and by column, float32, (n, in).

    Attributes:
        parameter: the changes, float32, (n · out, in), a leaf for Adam.
    """

    def __init__(self, values: Tensor, row_steps: Tensor, column_steps: Tensor) -> None:
        self.parameter = torch.zeros_like(values, dtype=torch.float32, requires_grad=True)
        self._row_steps, self._column_steps = row_steps, column_steps.unsqueeze(1)
        self._by_c: ChangedByC | None = None
        if len(row_steps) == 1 and ChangedByC.can_change(values, self.parameter):
            self._by_c = ChangedByC(self.parameter.detach(), row_steps[0], column_steps)

    def values(self, values: Tensor, dtype: torch.dtype, keep: Tensor | None = None) -> Tensor:
        """Changed values, in a dtype.

        Args:
            values: the values that are changed, (n · out, in).
            dtype: of the result.
            keep: keep mask, bool (n · out, in); None: nothing is pruned.

        Returns:
            (n · out, in).
        """
        if self._by_c is not None and keep is not None and dtype in DTYPES:
            return self._by_c.values(values, dtype, keep)
        parts: list[Tensor] = []
        for rows in self._parts():
            changed = self._changed(values, rows).to(dtype)
            parts.append(changed if keep is None else apply_mask(changed, self._rows(keep, rows)))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).flatten(0, 1)

    def set_gradient(self, gradient: Tensor, free: Tensor) -> None:
        """Set the parameter's gradient from the gradient by the values, float32, and `free`, both (n · out, in).

        `free`: bool, True where a value may change.
        """
        if self._by_c is not None:
            self.parameter.grad = self._by_c.gradient(gradient, free)
            return
        self.parameter.grad = torch.empty_like(self.parameter)
        for rows in self._parts():
            part = self._rows(self.parameter.grad, rows)
            torch.mul(self._rows(gradient, rows), self._row_steps[:, rows], out=part)
            part.mul_(self._column_steps).mul_(self._rows(free, rows))

    def multiply(self, gradient: Tensor, values: Tensor) -> Tensor:
        """Multiply the gradient by the changed values in place; all float32 but the values, (n · out, in)."""
        if self._by_c is not None:
            self._by_c.multiply(gradient, values)
            return gradient
        for rows in self._parts():
            self._rows(gradient, rows).mul_(self._changed(values, rows))
        return gradient

    def _changed(self, values: Tensor, rows: slice) -> Tensor:
        """Changed values of some rows, float32."""
        changes = self._rows(self.parameter.detach(), rows) * self._row_steps[:, rows]
        return self._rows(values, rows).float().addcmul(changes, self._column_steps)

    def _rows(self, tensor: Tensor, rows: slice) -> Tensor:
        """Some rows of a tensor, (n · out, in), of each linear: (n, rows, in)."""
        return tensor.view(len(self._row_steps), -1, tensor.shape[1])[:, rows]

    def _parts(self) -> Iterator[slice]:
        """Rows that are taken at a time."""
        count, rows, _ = self._row_steps.shape
        together = rows
        if self.parameter.device.type == "cpu":
            together = max(1, NUMBERS // max(1, count * self.parameter.shape[1]))
        for first in range(0, rows, together):
            yield slice(first, first + together)
