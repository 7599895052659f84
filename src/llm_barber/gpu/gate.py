"""SwiGLU, SiLU(gate) · up, and its gradients, in one pass over a GPU's memory.

What PyTorch rounds to the dtype between its operations is rounded here, too. The exponential is the GPU's own, whose
result may be off by some units in the last place of float32.

Tested in Triton's interpreter only, and on each GPU before it is used there (`kernels.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a row that a program takes


@triton.jit  # type: ignore[untyped-decorator]
def _gate(  # type: ignore[no-untyped-def]
    gate, up, gated, columns, gate_step, up_step, together: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * together + tl.arange(0, together)
    inside = column < columns
    x = tl.load(gate + row * gate_step + column, mask=inside).to(tl.float32)
    y = tl.load(up + row * up_step + column, mask=inside).to(tl.float32)
    kind = gate.dtype.element_ty
    activated = tl.math.div_rn(x, 1 + tl.exp(-x)).to(kind).to(tl.float32)
    tl.store(gated + row * columns + column, (activated * y).to(kind), mask=inside)


# A kernel's pointers and sizes are all parameters of it, so that it has more than 8.
@triton.jit  # type: ignore[untyped-decorator]
def _gate_back(  # type: ignore[no-untyped-def]
    gradient, gate, up, by_gate, by_up, columns, gradient_step, gate_step, up_step, together: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * together + tl.arange(0, together)
    inside = column < columns
    of_gated = tl.load(gradient + row * gradient_step + column, mask=inside).to(tl.float32)
    x = tl.load(gate + row * gate_step + column, mask=inside).to(tl.float32)
    y = tl.load(up + row * up_step + column, mask=inside).to(tl.float32)
    kind = gate.dtype.element_ty
    logistic = tl.math.div_rn(1.0, 1 + tl.exp(-x))
    activated = tl.math.div_rn(x, 1 + tl.exp(-x)).to(kind).to(tl.float32)
    of_activated = (of_gated * y).to(kind).to(tl.float32)
    place = row * columns + column
    tl.store(by_gate + place, (of_activated * logistic * (1 + x * (1 - logistic))).to(kind), mask=inside)
    tl.store(by_up + place, (of_gated * activated).to(kind), mask=inside)


def gate(gates: Tensor, ups: Tensor) -> Tensor:
    """Compute SiLU(gates) · ups; both (rows, columns), of any row stride; the last stride is 1."""
    gated = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    # A launch goes to the current device, whatever the tensors' device is.
    with torch.cuda.device_of(gates):  # type: ignore[no-untyped-call]
        _gate[_grid(gates)](
            gates, ups, gated, gates.shape[1], gates.stride(0), ups.stride(0), together=COLUMNS, enable_fp_fusion=False
        )
    return gated


def gate_back(gradient: Tensor, gates: Tensor, ups: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by `gates` and by `ups` from the gradient by `gate`'s result; all (rows, columns), as in `gate`."""
    by_gates, by_ups = (torch.empty(gates.shape, dtype=gates.dtype, device=gates.device) for _ in range(2))
    with torch.cuda.device_of(gates):  # type: ignore[no-untyped-call]
        _gate_back[_grid(gates)](
            gradient, gates, ups, by_gates, by_ups, gates.shape[1], gradient.stride(0), gates.stride(0), ups.stride(0),
            together=COLUMNS, enable_fp_fusion=False,
        )  # fmt: skip
    return by_gates, by_ups


def _grid(gates: Tensor) -> tuple[int, int]:
    return gates.shape[0], triton.cdiv(gates.shape[1], COLUMNS)
