"""Kernels for what lies between matrix products, against PyTorch's operations: results and speeds."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from llm_barber.gpu import kernels, steps
from llm_barber.gpu.kernels import DTYPES, gpu_number, lack, wrong_steps
from llm_barber.planning.measured_rates import Stopwatch
from llm_barber.tools.selftest.bench import Bench
from llm_barber.tools.selftest.result import Finding, NotRunError

# Of LLaMA-2 7B: tokens of a batch, heads and their features; features of an MLP, and the shape of its linear.
TOKENS, HEADS, FEATURES, INNER, SHAPE, GRADIENTS = 8192, 32, 128, 11008, (11008, 4096), 4
# Each step by its kernel, and by PyTorch's operations.
STEPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rotary embeddings": (steps.rotate, steps.rotate_in_steps),
    **{
        name: (partial(steps.gate, activation=activation), partial(kernels.gate_in_steps, activation=activation))
        for activation, name in kernels.GATES.items()
    },
    "squares of gradients": (steps.add_squares, steps.add_squares_in_steps),
    "sums of gradients": (partial(steps.add_scaled, begins=False), partial(steps.add_scaled_in_steps, begins=False)),
}


@torch.no_grad()
def check_kernels(bench: Bench) -> Iterator[Finding]:
    """Compare the kernels with PyTorch's operations in each dtype, and time both.

    Raises:
        NotRunError: the device is a CPU, or lacks what Triton needs.
    """
    if not bench.on_gpu:
        raise NotRunError("needs a GPU")
    reason = lack(gpu_number(bench.device))
    if reason is not None:
        raise NotRunError(reason)
    for dtype in DTYPES:
        wrong = [name for _ in range(2) for name in wrong_steps(bench.device, dtype)]
        verdict = f"differ from PyTorch's: {', '.join(wrong)}" if wrong else "are PyTorch's"
        yield Finding(text=f"{str(dtype).removeprefix('torch.')}: results {verdict}", passed=not wrong)
    stopwatch = Stopwatch(bench.device)
    for name, functions in STEPS.items():
        tensors = _tensors(name, bench)
        taken = [stopwatch.least(partial(function, *tensors)) * 1e6 for function in functions]
        yield Finding(
            text=f"{name} of LLaMA-2 7B: {taken[0]:.0f} µs, by PyTorch's operations {taken[1]:.0f}", passed=True
        )


def _tensors(name: str, bench: Bench) -> tuple[Any, ...]:
    """Arguments of a step, random, on the device."""
    made = partial(torch.randn, device=bench.device, dtype=bench.dtype)
    if name in kernels.GATES.values():
        return made(TOKENS, INNER), made(TOKENS, INNER)
    if name == "rotary embeddings":
        states = made(1, TOKENS, HEADS, FEATURES).transpose(1, 2)
        return states, made(1, TOKENS, FEATURES), made(1, TOKENS, FEATURES)
    total, gradients = torch.zeros(SHAPE, device=bench.device), made(GRADIENTS, *SHAPE)
    factors = torch.ones(GRADIENTS, device=bench.device)
    return total, list(gradients) if name == "sums of gradients" else gradients, factors
