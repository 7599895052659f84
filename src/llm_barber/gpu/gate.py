"""An activation of gates times ups, as in SwiGLU and GeGLU, and its gradients, in one pass over a GPU's memory.

What PyTorch rounds to the dtype between its operations is rounded here, too. The exponential, the error function and
the division are the GPU's own, whose results may be off by some units in the last place of float32.

Tested in Triton's interpreter only, and on each GPU before it is used there (`kernels.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a row that a program takes
# Of GELU: √½, of the error function's argument; 1 / √2π, of the normal density.
ROOT_HALF, DENSITY = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)
# Of GELU's approximation, ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))).
ROOT, CUBIC = tl.constexpr(0.7978845608028654), tl.constexpr(0.044715)


@triton.jit  # type: ignore[untyped-decorator]
def _logistic(x):  # type: ignore[no-untyped-def]
    # 1 / (1 + e⁻ˣ), and 1 less that, both without cancellation.
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1 + small), tl.where(x < 0, 1.0, small) / (1 + small)


@triton.jit  # type: ignore[untyped-decorator]
def _tanh_shares(x):  # type: ignore[no-untyped-def]
    # (1 + tanh u) / 2 = 1 / (1 + e⁻²ᵘ) of GELU's approximation, and 1 less that.
    return _logistic((x + x * x * x * CUBIC) * (2 * ROOT))


@triton.jit  # type: ignore[untyped-decorator]
def _activate(x, activation: tl.constexpr):  # type: ignore[no-untyped-def]
    if activation == "silu":
        activated = x / (1 + tl.exp(-x))
    elif activation == "gelu":
        activated = x * 0.5 * (1 + tl.math.erf(x * ROOT_HALF))
    else:
        share, _ = _tanh_shares(x)
        activated = x * share
    return activated


@triton.jit  # type: ignore[untyped-decorator]
def _slope(x, of_activated, activation: tl.constexpr):  # type: ignore[no-untyped-def]
    if activation == "silu":
        logistic = 1.0 / (1 + tl.exp(-x))
        gradient = of_activated * logistic * (1 + x * (1 - logistic))
    elif activation == "gelu":
        share = 0.5 * (1 + tl.math.erf(x * ROOT_HALF))
        gradient = of_activated * (share + x * (tl.exp(-0.5 * x * x) * DENSITY))
    else:
        share, rest = _tanh_shares(x)
        of_inner = (1 + x * x * (3 * CUBIC)) * (2 * ROOT)
        gradient = of_activated * (share + x * share * rest * of_inner)
    return gradient


@triton.jit  # type: ignore[untyped-decorator]
def _gate(  # type: ignore[no-untyped-def]
    gate, up, gated, columns, gate_step, up_step, together: tl.constexpr, activation: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * together + tl.arange(0, together)
    inside = column < columns
    x = tl.load(gate + row * gate_step + column, mask=inside).to(tl.float32)
    y = tl.load(up + row * up_step + column, mask=inside).to(tl.float32)
    kind = gate.dtype.element_ty
    activated = _activate(x, activation).to(kind).to(tl.float32)
    tl.store(gated + row * columns + column, (activated * y).to(kind), mask=inside)


# A kernel's pointers and sizes are all parameters of it, so that it has more than 8.
@triton.jit  # type: ignore[untyped-decorator]
def _gate_back(  # type: ignore[no-untyped-def]
    gradient, gate, up, by_gate, by_up, columns, gradient_step, gate_step, up_step,
    together: tl.constexpr, activation: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * together + tl.arange(0, together)
    inside = column < columns
    of_gated = tl.load(gradient + row * gradient_step + column, mask=inside).to(tl.float32)
    x = tl.load(gate + row * gate_step + column, mask=inside).to(tl.float32)
    y = tl.load(up + row * up_step + column, mask=inside).to(tl.float32)
    kind = gate.dtype.element_ty
    activated = _activate(x, activation).to(kind).to(tl.float32)
    of_activated = (of_gated * y).to(kind).to(tl.float32)
    place = row * columns + column
    tl.store(by_gate + place, _slope(x, of_activated, activation).to(kind), mask=inside)
    tl.store(by_up + place, (of_gated * activated).to(kind), mask=inside)


def gate(gates: Tensor, ups: Tensor, activation: str) -> Tensor:
    """Compute activation(gates) · ups; both (rows, columns), of any row stride; the last stride is 1.

    `activation`: of `kernels.ACTIVATIONS`.
    """
    gated = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    # A launch goes to the current device, whatever the tensors' device is.
    with torch.cuda.device_of(gates):  # type: ignore[no-untyped-call]
        _gate[_grid(gates)](
            gates, ups, gated, gates.shape[1], gates.stride(0), ups.stride(0),
            together=COLUMNS, activation=activation, enable_fp_fusion=False,
        )  # fmt: skip
    return gated


def gate_back(gradient: Tensor, gates: Tensor, ups: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients by `gates` and by `ups` from the gradient by `gate`'s result; all (rows, columns), as in `gate`."""
    by_gates, by_ups = (torch.empty(gates.shape, dtype=gates.dtype, device=gates.device) for _ in range(2))
    with torch.cuda.device_of(gates):  # type: ignore[no-untyped-call]
        _gate_back[_grid(gates)](
            gradient, gates, ups, by_gates, by_ups, gates.shape[1], gradient.stride(0), gates.stride(0), ups.stride(0),
            together=COLUMNS, activation=activation, enable_fp_fusion=False,
        )  # fmt: skip
    return by_gates, by_ups


def _grid(gates: Tensor) -> tuple[int, int]:
    return gates.shape[0], triton.cdiv(gates.shape[1], COLUMNS)
