"""Which devices compute with the Triton kernels of this room: those on which they give PyTorch's results."""

import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from llm_barber.gpu.out_of_memory import is_out_of_memory

OLDEST_GPU = (8, 0)  # compute capability: Triton compiles bfloat16 for no older GPU
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Sequences, heads, tokens and features of what is compared. As in runs, a token has more heads than a program takes,
# and halves of heads are a power of two, or not.
ROTATED = ((2, 20, 5, 128), (1, 3, 4, 48))
# Rows and columns, more than a program takes. Triton compiles a kernel of its own for multiples of 16.
GATED = ((3, 1500), (3, 2048))
ADDED = ((4, 40, 64), (4, 41, 33))  # gradients, and the shape of their weight
LEFT_OUT: set[bool] = set()  # holds True once the kernels are left out
# Units in the last place by which activations and sums of squares may differ: of float32, for a number of the size that
# is rounded, and of the result's dtype, for the result.
UNITS, RESULT_UNITS = 8, 2
# Activations of gates by name: each, and its gradient from the gradient by its result and its argument.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (silu, torch.ops.aten.silu_backward),
    "gelu": (gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (partial(gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
}
GATES = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU by tanh"}  # what gates with them are called


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Test whether a device computes with the kernels in a dtype; warn, once for each GPU and dtype, why it does not.

    The first call compares the kernels with PyTorch's operations.
    """
    if device.type != "cuda" or dtype not in DTYPES or LEFT_OUT:
        return False
    return _works_on_gpu(gpu_number(device), dtype)


def gpu_number(device: torch.device) -> int:
    """Give the number of a GPU: the current one's where the device names none."""
    return torch.cuda.current_device() if device.index is None else device.index


def kernels_of_run(device: torch.device, dtype: torch.dtype) -> dict[str, bool]:
    """Which of the dtypes of a run that computes in `dtype` the kernels compute in: sums of squares are float32."""
    dtypes = dict.fromkeys((dtype, torch.float32))
    return {str(each).removeprefix("torch."): has_kernels(device, each) for each in dtypes}


def triton_version() -> str:
    """Version of Triton, whose compiler may round otherwise than another's."""
    import triton

    return str(triton.__version__)


def leave_out_kernels() -> None:
    """Compute with PyTorch's operations from now on: processes of one run take the kernels all, or none of them."""
    LEFT_OUT.add(True)


def take_kernels(*tensors: Tensor) -> bool:
    """Test whether the kernels compute with these tensors, which are on one device."""
    return all(has_kernels(tensor.device, tensor.dtype) for tensor in tensors)


def lack(index: int) -> str | None:
    """Say what a GPU, by its number, lacks to run Triton's kernels; None: nothing that is known before they run."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if torch.cuda.get_device_capability(index) < OLDEST_GPU:
        return f"Triton's kernels need compute capability 8.0, which {torch.cuda.get_device_name(index)} has not"
    return None


@cache
def _works_on_gpu(index: int, dtype: torch.dtype) -> bool:
    """Test a GPU by its number: a first launch compiles, which fails without a C compiler or Python's headers."""
    reason = lack(index)
    if reason is None:
        try:
            wrong = wrong_steps(torch.device("cuda", index), dtype)
        except Exception as error:
            if is_out_of_memory(error):
                raise  # and is not remembered
            text = str(error).strip().partition("\n")[0]
            reason = f"Triton's kernels do not run here ({type(error).__name__}: {text})"
        else:
            reason = f"Triton's kernels give other results in {dtype}: {', '.join(wrong)}" if wrong else None
    if reason is not None:
        warnings.warn(f"{reason}. Runs take PyTorch's operations instead, which are slower.", stacklevel=5)
    return reason is None


def wrong_steps(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Compare the kernels with PyTorch's operations on a device, on random values of a dtype.

    Returns:
        The steps whose results differ: in any bit for rotary embeddings and sums of gradients; by more than `UNITS` and
        `RESULT_UNITS` for activations of gates, their gradients, and sums of squares.
    """
    made = torch.Generator().manual_seed(0)
    checks = {
        "rotary embeddings": _rotates, "squares of gradients": _adds_squares, "sums of gradients": _adds_scaled,
    }  # fmt: skip
    checks |= {name: partial(_gates, activation) for activation, name in GATES.items()}
    with torch.device("cpu"):  # whatever the default device of the program around is
        return [name for name, check in checks.items() if not check(made, device, dtype)]


def _rotates(made: torch.Generator, device: torch.device, dtype: torch.dtype) -> bool:
    from llm_barber.gpu.rotary import rotate
    from llm_barber.gpu.steps import rotate_in_steps

    for sequences, heads, tokens, features in ROTATED:
        # As in attention, tokens come before heads in memory.
        states = _random(made, (sequences, tokens, heads, features)).to(device, dtype).transpose(1, 2)
        for of_sequences in {1, sequences}:
            cosine, sine = _random(made, (2, of_sequences, tokens, features)).to(device, dtype)
            for back in (False, True):
                if not torch.equal(rotate(states, cosine, sine, back), rotate_in_steps(states, cosine, sine, back)):
                    return False
    return True


def _gates(activation: str, made: torch.Generator, device: torch.device, dtype: torch.dtype) -> bool:
    from llm_barber.gpu.gate import gate, gate_back

    for rows, columns in GATED:
        gradient, *parts = (3 * _random(made, (3, rows, columns))).to(device, dtype)
        for gates, ups in (parts, torch.cat(parts, 1).chunk(2, 1)):  # of two linears, and of one for both
            sizes = gate_sizes(gradient, gates, ups)
            results = gate(gates, ups, activation), *gate_back(gradient, gates, ups, activation)
            expected = gate_in_steps(gates, ups, activation), *gradients_in_steps(gradient, gates, ups, activation)
            if not all(map(is_near, results, expected, sizes)):
                return False
    return True


def _adds_squares(made: torch.Generator, device: torch.device, dtype: torch.dtype) -> bool:
    from llm_barber.gpu.squares import add_squares
    from llm_barber.gpu.steps import add_squares_in_steps

    for count, *shape in ADDED:
        gradients = _random(made, (count, *shape)).to(device, dtype)
        factors = torch.linspace(0.5, 2, count, dtype=torch.float32).to(device)
        total, expected = (torch.ones(shape, dtype=torch.float32, device=device) for _ in range(2))
        add_squares(total, gradients, factors)
        add_squares_in_steps(expected, gradients, factors)
        if not is_near(total, expected, expected):
            return False
    return True


def _adds_scaled(made: torch.Generator, device: torch.device, dtype: torch.dtype) -> bool:
    from llm_barber.gpu.steps import add_scaled_in_steps
    from llm_barber.gpu.sums import add_scaled

    for most, *shape in ADDED:
        gradients = list(_random(made, (most, *shape)).to(device, dtype))
        scales = 2.0 ** torch.arange(-1, most - 1, dtype=torch.float32).to(device)  # as in runs: products are exact
        for count, begins in product((1, most), (True, False)):  # each is compiled by itself
            total, expected = (torch.ones(shape, dtype=torch.float32, device=device) for _ in range(2))
            add_scaled(total, gradients[:count], scales[:count], begins)
            add_scaled_in_steps(expected, gradients[:count], scales[:count], begins)
            if not torch.equal(total, expected):
                return False
    return True


def _random(made: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=made, dtype=torch.float32)


def is_near(result: Tensor, expected: Tensor, size: Tensor) -> bool:
    """Test whether a result is what is expected, but for rounding (`UNITS`, `RESULT_UNITS`).

    Args:
        result: of any dtype.
        expected: likewise.
        size: of the numbers that float32 rounds on the way, float32; taken to be at least 1.
    """
    numbers, right = torch.finfo(result.dtype), expected.float()
    bound = UNITS * torch.finfo(torch.float32).eps * size.clamp_min(1)
    bound += RESULT_UNITS * (numbers.eps * right.abs()).clamp_min(numbers.smallest_normal * numbers.eps)
    return bool(((result.float() - right).abs() <= bound).all())


def gate_sizes(gradient: Tensor, gates: Tensor, ups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes, float32, that rounding of activation(gates) · ups and of its gradients by both is in proportion to.

    GELU of a negative number is small, but rounded as the number is: it is the number times one plus nearly minus one.
    Its gradient has such a difference times the number.
    """
    gradient, gates, ups = gradient.float().abs(), gates.float().abs(), ups.float().abs()
    return gates * ups, gradient * ups * gates.clamp_min(1), gradient * gates


def gate_in_steps(gates: Tensor, ups: Tensor, activation: str = "silu") -> Tensor:
    """Compute activation(gates) · ups by PyTorch's operations."""
    function, _ = ACTIVATIONS[activation]
    return function(gates) * ups


def gradients_in_steps(gradient: Tensor, gates: Tensor, ups: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of activation(gates) · ups by both, by PyTorch's operations, as autograd computes them."""
    function, backward = ACTIVATIONS[activation]
    return backward(gradient * ups, gates), gradient * function(gates)
