"""Steps between matrix products as one operator of PyTorch each, `torch.ops.llm_barber.…`.

- Rotary embeddings: PyTorch's own operations read and write five times as many bytes.
- An activation of gates times ups: nearly twice as many.
- Four gradients, added to a sum: three times as many; their squares: two and a half times.

A GPU that has the kernels (`kernels.py`) computes each in one. Other devices compute PyTorch's operations, in the same
order, with the same roundings between them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_barber.gpu.kernels import gate_in_steps, gradients_in_steps, take_kernels

# `runtime/kernels/operators.py` defines the other operators of this name.
_library = torch.library.Library("llm_barber", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("rotate(Tensor states, Tensor cosine, Tensor sine, bool back) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("gate(Tensor gates, Tensor ups, str activation) -> Tensor")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "gate_back(Tensor gradient, Tensor gates, Tensor ups, str activation) -> (Tensor, Tensor)"
)
_library.define("add_squares(Tensor(a!) total, Tensor gradients, Tensor factors) -> ()")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "add_scaled(Tensor(a!) total, Tensor[] gradients, Tensor scales, bool begins) -> ()"
)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate queries or keys: states · cosine + (−x₂, x₁) · sine, with x₁ and x₂ the halves of each head.

    Args:
        states: (sequences, heads, tokens, features).
        cosine: (1 or sequences, tokens, features), of the states' dtype, without a gradient.
        sine: like `cosine`.
    """
    rotated: Tensor = _Rotation.apply(states, cosine, sine)  # type: ignore[no-untyped-call]
    return rotated


def gate(gates: Tensor, ups: Tensor, activation: str = "silu") -> Tensor:
    """Compute activation(gates) · ups, both (…, columns): SwiGLU with `silu`, GeGLU with `gelu` or `gelu_tanh`."""
    if (gates.dtype, gates.shape) != (ups.dtype, ups.shape):
        return gate_in_steps(gates, ups, activation)
    gated: Tensor = _Gating.apply(gates, ups, activation)  # type: ignore[no-untyped-call]
    return gated


def add_squares(total: Tensor, gradients: Tensor, factors: Tensor) -> None:
    """Add (f g)² of each of n gradients g, (n, out, in), one after the other, to a sum.

    Args:
        total: float32, (out, in).
        gradients: of float32 or fewer bits.
        factors: float32, (n,).
    """
    torch.ops.llm_barber.add_squares(total, gradients, factors)


def add_scaled(total: Tensor, gradients: Sequence[Tensor], scales: Tensor, begins: bool) -> None:
    """Add s g for each of n gradients g, one after the other, to a sum, or begin a sum with the first.

    Args:
        total: float32 or float64, (out, in).
        gradients: each (out, in), of at most as many bits.
        scales: float32, (n,).
        begins: whether the sum's numbers so far do not count.
    """
    torch.ops.llm_barber.add_scaled(total, gradients, scales, begins)


class _Rotation(torch.autograd.Function):
    """`rotate` with its gradient by the states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        rotated: Tensor = torch.ops.llm_barber.rotate(states, cosine, sine, False)
        return rotated

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.llm_barber.rotate(gradient, *ctx.saved_tensors, True), None, None


class _Gating(torch.autograd.Function):
    """`gate` with its gradients."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, ups: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gates, ups)
        ctx.activation = activation
        gated: Tensor = torch.ops.llm_barber.gate(gates, ups, activation)
        return gated

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        by_gates, by_ups = torch.ops.llm_barber.gate_back(gradient, *ctx.saved_tensors, ctx.activation)
        return by_gates, by_ups, None


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    if take_kernels(states, cosine, sine):
        from llm_barber.gpu import rotary

        return rotary.rotate(_with_last_stride_1(states), cosine.contiguous(), sine.contiguous(), back)
    return rotate_in_steps(states, cosine, sine, back)


def _gate(gates: Tensor, ups: Tensor, activation: str) -> Tensor:
    if take_kernels(gates, ups):
        from llm_barber.gpu import gate

        return gate.gate(_rows(gates), _rows(ups), activation).view(gates.shape)
    return gate_in_steps(gates, ups, activation)


def _gate_back(gradient: Tensor, gates: Tensor, ups: Tensor, activation: str) -> tuple[Tensor, ...]:
    if take_kernels(gates, ups):
        from llm_barber.gpu import gate

        by_gates, by_ups = gate.gate_back(_rows(gradient), _rows(gates), _rows(ups), activation)
        return by_gates.view(gates.shape), by_ups.view(ups.shape)
    return gradients_in_steps(gradient, gates, ups, activation)


def _add_squares(total: Tensor, gradients: Tensor, factors: Tensor) -> None:
    if take_kernels(gradients) and _is_float32_sum(total):
        from llm_barber.gpu import squares

        squares.add_squares(total, gradients.contiguous(), factors.contiguous())
    else:
        add_squares_in_steps(total, gradients, factors)


def _add_scaled(total: Tensor, gradients: Sequence[Tensor], scales: Tensor, begins: bool) -> None:
    if take_kernels(*gradients) and _is_float32_sum(total):
        from llm_barber.gpu import sums

        for first in range(0, len(gradients), sums.MOST):
            taken = slice(first, first + sums.MOST)
            contiguous = [gradient.contiguous() for gradient in gradients[taken]]
            sums.add_scaled(total, contiguous, scales[taken].contiguous(), begins and first == 0)
    else:
        add_scaled_in_steps(total, gradients, scales, begins)


_library.impl("rotate", _rotate, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("gate", _gate, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("gate_back", _gate_back, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("add_squares", _add_squares, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("add_scaled", _add_scaled, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def rotate_in_steps(states: Tensor, cosine: Tensor, sine: Tensor, back: bool = False) -> Tensor:
    """`rotate`, or its way back, by PyTorch's operations, in the order of transformers."""
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    if not back:
        first, second = states.chunk(2, -1)
        return states * cosine + torch.cat((-second, first), -1) * sine
    first, second = (states * sine).chunk(2, -1)
    return states * cosine + torch.cat((second, -first), -1)


def add_squares_in_steps(total: Tensor, gradients: Tensor, factors: Tensor) -> None:
    """`add_squares` by PyTorch's operations."""
    for gradient, factor in zip(gradients, factors, strict=True):
        scaled = gradient.float() * factor
        total.addcmul_(scaled, scaled)


def add_scaled_in_steps(total: Tensor, gradients: Sequence[Tensor], scales: Tensor, begins: bool) -> None:
    """`add_scaled` by PyTorch's operations."""
    for number, gradient in enumerate(gradients):
        if begins and number == 0:
            torch.mul(gradient, scales[:1].to(total.dtype), out=total)  # a number () would be rounded to their dtype
        else:
            total.addcmul_(gradient, scales[number])


def _is_float32_sum(total: Tensor) -> bool:
    """Test for a sum that the kernels add to; they take more than one number."""
    return total.dtype == torch.float32 and total.is_contiguous() and total.numel() > 1


def _with_last_stride_1(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """View a tensor, (…, columns), as rows whose columns lie side by side; copy it where that cannot be."""
    return _with_last_stride_1(tensor.reshape(-1, tensor.shape[-1]))
