"""Values that tuning changes, and gradients by the changes, each in one pass over memory by C (`changes.c`).

A value is W + r · c · Δ: W a weight, Δ its change, r and c sizes of steps, of its row and of its column. The bits are
those of PyTorch's operations. Sizes are checked here, not in C.
"""

import ctypes
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from llm_barber import native
from llm_barber.native.threads import openmp_address, threads_for

DTYPES = (torch.bfloat16, torch.float32)  # of values
_FUNCTIONS = ("changed_values", "change_gradient", "multiply_changed")


class _Changes(ctypes.Structure):
    """`changes_t` of `changes.c`."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("values", "changes", "row_steps", "column_steps", "keep", "results", "gradient", "openmp")
        ),
        *((name, ctypes.c_size_t) for name in ("rows", "columns")),
        *((name, ctypes.c_int) for name in ("parts", "narrow_values", "narrow_results")),
    )


@cache
def _functions() -> SimpleNamespace | None:
    """C's functions; None if the extension does not have all of them."""
    functions = {name: native.find_function(name, ctypes.c_void_p) for name in _FUNCTIONS}
    return None if None in functions.values() else SimpleNamespace(**functions)


class ChangedByC:
    """Changes of the values of one linear, on PyTorch's threads; tensors are on the CPU, and all but masks contiguous.

    Args:
        changes: Δ, float32, (out, in).
        row_steps: r, float32, (out, 1).
        column_steps: c, float32, (1, in).
    """

    def __init__(self, changes: Tensor, row_steps: Tensor, column_steps: Tensor) -> None:
        self._steps = changes, row_steps, column_steps
        rows, columns = changes.shape
        if (row_steps.shape, column_steps.shape) != ((rows, 1), (1, columns)):
            raise ValueError(f"steps of {row_steps.shape} and {column_steps.shape} do not fit {changes.shape}")
        self._check(torch.float32, *self._steps)

    @staticmethod
    def can_change(*tensors: Tensor) -> bool:
        """Test whether C can read these tensors, values and changes among them; without any, whether it was built."""
        return _functions() is not None and all(
            tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in DTYPES for tensor in tensors
        )

    def values(self, values: Tensor, dtype: torch.dtype, keep: Tensor) -> Tensor:
        """Changed values under a mask, in a dtype of `DTYPES`.

        Args:
            values: W, (out, in), of a dtype of `DTYPES`.
            dtype: of the result.
            keep: keep mask, bool (out, in).

        Returns:
            (out, in), +0 where pruned.

        Raises:
            ValueError: arguments do not fit together; the other methods raise it, too.
        """
        results, keep = torch.empty_like(values, dtype=dtype), keep.contiguous()
        self._check_shapes(values, keep)
        self._check(torch.bool, keep)
        self._call("changed_values", values, keep=keep, results=results)
        return results

    def gradient(self, gradient: Tensor, free: Tensor) -> Tensor:
        """Gradient by the changes from that by the values; both float32, (out, in).

        `free`: bool (out, in), True where a value may change; elsewhere a finite gradient becomes 0.
        """
        results, free = torch.empty_like(gradient), free.contiguous()
        self._check_shapes(gradient, free)
        self._check(torch.float32, gradient)
        self._check(torch.bool, free)
        self._call("change_gradient", gradient=gradient, keep=free, results=results)
        return results

    def multiply(self, gradient: Tensor, values: Tensor) -> None:
        """Multiply the gradient, float32, by the changed values, in place; both (out, in)."""
        self._check_shapes(gradient, values)
        self._check(torch.float32, gradient)
        self._call("multiply_changed", values, gradient=gradient)

    def _check_shapes(self, *tensors: Tensor) -> None:
        shape = self._steps[0].shape
        if any(tensor.shape != shape for tensor in tensors):
            raise ValueError(f"{[tuple(tensor.shape) for tensor in tensors]} do not fit changes of {tuple(shape)}")

    @staticmethod
    def _check(dtype: torch.dtype, *tensors: Tensor) -> None:
        for tensor in tensors:
            if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
                raise ValueError(f"C needs contiguous tensors of {dtype} on the CPU")

    def _call(self, name: str, values: Tensor | None = None, **tensors: Tensor) -> None:
        results = tensors.get("results")
        given = [tensor for tensor in (values, results) if tensor is not None]
        if not self.can_change(*given):
            raise ValueError("C changes contiguous values of bfloat16 or float32 on the CPU, if the extension is built")
        rows, columns = self._steps[0].shape
        named = {"values": values, **dict(zip(("changes", "row_steps", "column_steps"), self._steps, strict=True))}
        narrow = [tensor is not None and tensor.dtype == torch.bfloat16 for tensor in (values, results)]
        task = _Changes(
            **{name: tensor.data_ptr() for name, tensor in (named | tensors).items() if tensor is not None},
            openmp=openmp_address(),
            rows=rows,
            columns=columns,
            parts=threads_for(rows, rows * columns),
            narrow_values=narrow[0],
            narrow_results=narrow[1],
        )
        getattr(_functions(), name)(ctypes.addressof(task))
