"""Which devices take the Triton kernels of this room: those on which the kernels give PyTorch's results."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch.nn.functional import silu

from llm_barber.gpu.out_of_memory import is_out_of_memory

OLDEST_GPU = (8, 0)  # compute capability: Triton compiles bfloat16 for no older GPU
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SEQUENCES, HEADS, TOKENS, FEATURES = 2, 3, 5, 64  # of what is compared


def has_kernels(device: torch.device) -> bool:
    """Test whether a device computes with the kernels; warn, once for each GPU, why it does not."""
    if device.type != "cuda":
        return False
    return _works_on_gpu(torch.cuda.current_device() if device.index is None else device.index)


def take_kernels(*tensors: torch.Tensor) -> bool:
    """Test whether the kernels compute with these tensors: all on a device that has them, in one of `DTYPES` each."""
    return has_kernels(tensors[0].device) and all(tensor.dtype in DTYPES for tensor in tensors)


@cache
def _works_on_gpu(index: int) -> bool:
    """Test a GPU by its number: a first launch compiles, which fails without a C compiler or Python's headers."""
    if find_spec("triton") is None or torch.cuda.get_device_capability(index) < OLDEST_GPU:
        return False
    try:
        wrong = [str(dtype) for dtype in DTYPES if not is_right(torch.device("cuda", index), dtype)]
    except Exception as error:
        if is_out_of_memory(error):
            raise  # and is not remembered
        reason = f"do not run here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    else:
        reason = f"give other results than PyTorch in {', '.join(wrong)}" if wrong else ""
    if reason:
        warnings.warn(f"Triton's kernels {reason}: runs take PyTorch's operations, which are slower", stacklevel=4)
    return not reason


def is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare the kernels with PyTorch's operations on a device, on random values of a dtype.

    Rotary embeddings have to have the same bits; SwiGLU, its gradients, and sums of squares may differ by four units in
    the last place.
    """
    from llm_barber.gpu import gate, rotary, squares
    from llm_barber.gpu.steps import rotate_in_steps

    made = torch.Generator().manual_seed(0)
    # As attention has them: tokens before heads in memory.
    states = torch.randn(SEQUENCES, TOKENS, HEADS, FEATURES, generator=made).to(device, dtype).transpose(1, 2)
    cosine, sine = torch.randn(2, 1, TOKENS, FEATURES, generator=made).to(device, dtype)
    for back in (False, True):
        if not torch.equal(rotary.rotate(states, cosine, sine, back), rotate_in_steps(states, cosine, sine, back)):
            return False
    gradient, gates, ups = (3 * torch.randn(3, TOKENS, FEATURES, generator=made)).to(device, dtype)
    total, gradients = torch.ones(TOKENS, FEATURES, device=device), torch.stack([gradient, ups])
    added = total.clone()
    factors = torch.tensor([0.5, 0.75], device=device)
    squares.add_squares(added, gradients, factors)
    pairs = [
        (gate.gate(gates, ups), silu(gates) * ups),
        *zip(gate.gate_back(gradient, gates, ups), gradients_in_steps(gradient, gates, ups), strict=True),
        (added, total + (factors.view(-1, 1, 1) * gradients).square().sum(0)),
    ]
    return all(
        torch.allclose(result, right, rtol=4 * torch.finfo(result.dtype).eps, atol=4 * torch.finfo(result.dtype).eps)
        for result, right in pairs
    )


def gradients_in_steps(gradient: torch.Tensor, gates: torch.Tensor, ups: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of SiLU(gates) · ups by both, by PyTorch's operations, as autograd computes them."""
    return torch.ops.aten.silu_backward(gradient * ups, gates), gradient * silu(gates)
