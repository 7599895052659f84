"""RMS norms as a GPU computes them, against norms in float64.

A sum of n squares in float32, in any order, is off by at most n · 2⁻²⁴ of itself (Higham, Accuracy and Stability of
Numerical Algorithms, 3.1). The square root halves that. A form and its gradient round to their dtype at most three
times.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llm_barber.model.fixed_order import in_fixed_order
from llm_barber.model.fused_norms import FORMS, Form
from llm_barber.model.gpu_kernels import same_kernels
from llm_barber.tools.selftest.bench import Bench
from llm_barber.tools.selftest.result import Finding

FEATURES = (80, 128, 4096)  # of heads, and of hidden states; not all are a multiple of what a kernel reads at once
EPSILON = 1e-5
HUGE = 1000.0  # times the others: the size of a token that all others attend to
ROUNDINGS = 3  # of an output or a gradient, to its dtype


def check_norms(bench: Bench) -> Iterator[Finding]:
    """Compare each form of norm, and its gradient, with float64; and two gradients with each other."""
    for dtype in (*bench.dtypes, torch.float16):
        for form in FORMS:
            yield judge_norm(bench.device, dtype, form)


@same_kernels()
def judge_norm(device: torch.device, dtype: torch.dtype, form: Form) -> Finding:
    """Compare a form's outputs and gradients, of all sizes, with float64, as shares of what rounding explains."""
    largest, repeats = 0.0, True
    for features in FEATURES:
        generator = torch.Generator().manual_seed(features)
        hidden = torch.randn(4, 33, features, generator=generator)
        hidden[:, 0] *= HUGE
        weight = torch.rand(features, generator=generator) + 0.5
        incoming = torch.randn(hidden.shape, generator=generator)
        arguments = [part.to(device, dtype) for part in (hidden, weight, incoming)]
        results = [_with_gradient(form, *arguments) for _ in range(2)]
        exact = _with_gradient(form, *(part.cpu().double() for part in arguments))
        unit = ROUNDINGS * torch.finfo(dtype).eps / 2 + features * 2.0**-24
        for result, again, expected in zip(*results, exact, strict=True):
            repeats &= torch.equal(result, again)
            error = (result.cpu().double() - expected).norm(dim=-1) / expected.norm(dim=-1)
            share = float(error.max()) / unit
            largest = share if math.isnan(share) else max(largest, share)
    name = f"{form.__name__.strip('_').replace('_', ' ')}, {str(dtype).removeprefix('torch.')}"
    changed = "" if repeats else "; the second time other bytes"
    text = f"{name}: largest error {largest:.2g} of what rounding explains{changed}"
    return Finding(text=text, passed=largest <= 1 and repeats)


def _with_gradient(form: Form, hidden: Tensor, weight: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
    """A form's output, and the gradient by the hidden states of output · incoming."""
    with in_fixed_order(), torch.enable_grad():
        read = hidden.detach().requires_grad_()
        output = form(read, weight, EPSILON)
        return output.detach(), torch.autograd.grad(output, read, incoming)[0]
