"""Kernels for rotary embeddings, gates and sums of gradients: in Triton's interpreter, or on a GPU, and compiled."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from llm_barber.gpu import gate as gating
from llm_barber.gpu import rotary, squares, sums
from llm_barber.gpu.kernels import ACTIVATIONS, DTYPES, gate_in_steps, gate_sizes, gradients_in_steps, is_near
from llm_barber.gpu.steps import add_scaled_in_steps, rotate_in_steps
from tests.helpers.kernels import Source, compile_kernels, launches

# The interpreter computes with numpy, which warns where a GPU has an infinite or undefined result.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does not round to bfloat16, it cuts off; its errors are up to a unit in each of three roundings.
EXACT = [dtype for dtype in DTYPES if dtype != torch.bfloat16 or DEVICE == "cuda"]
SHAPES = [(2, 3, 5, 64), (1, 17, 4, 16), (3, 1, 2, 24), (1, 2, 1, 2)]  # sequences, heads, tokens, features


def angles(shape: tuple[int, ...], sequences: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, sequences, shape[2], shape[3], generator=generator).to(DEVICE, dtype)


def states(shape: tuple[int, ...], dtype: torch.dtype, heads_first: bool) -> Tensor:
    sequences, heads, tokens, features = shape
    generator = torch.Generator().manual_seed(0)
    if heads_first:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return torch.randn(sequences, tokens, heads, features, generator=generator).to(DEVICE, dtype).transpose(1, 2)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotates_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], heads_first: bool, back: bool) -> None:
    values = states(shape, dtype, heads_first)
    for sequences in {1, shape[0]}:
        cosine, sine = angles(shape, sequences, dtype)
        rotated, expected = rotary.rotate(values, cosine, sine, back), rotate_in_steps(values, cosine, sine, back)
        assert rotated.stride() == values.stride()
        if dtype in EXACT:
            assert torch.equal(rotated, expected)
        else:
            torch.testing.assert_close(rotated, expected, rtol=0.02, atol=0.04)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("columns", [1, 16, 1000, 2055])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_as_pytorch_does(dtype: torch.dtype, columns: int, activation: str) -> None:
    """Rows need not be contiguous: gate and up may be halves of one linear's outputs."""
    generator = torch.Generator().manual_seed(columns)
    both, gradient = 3 * torch.randn(3, 2 * columns, generator=generator), torch.randn(3, columns, generator=generator)
    both[0, :2] = torch.tensor([-200.0, 200.0])  # the exponential is infinite or zero
    gates, ups = both.to(DEVICE, dtype).chunk(2, 1)
    gradient = gradient.to(DEVICE, dtype)
    results = gating.gate(gates, ups, activation), *gating.gate_back(gradient, gates, ups, activation)
    expected = gate_in_steps(gates, ups, activation), *gradients_in_steps(gradient, gates, ups, activation)
    sizes = gate_sizes(gradient, gates, ups)
    if dtype in EXACT:
        assert all(map(is_near, results, expected, sizes))
    else:
        for result, right, size in zip(results, expected, sizes, strict=True):
            assert ((result.float() - right.float()).abs() <= 4 * torch.finfo(dtype).eps * size.clamp_min(1)).all()


@pytest.mark.parametrize("shape", [(1, 3, 8), (4, 40, 65), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_squares_one_after_the_other(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gradients = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    gradients[-1] *= 256  # the largest comes last
    total, factors = torch.full(shape[1:], 2.0**-9, device=DEVICE), torch.rand(shape[0], device=DEVICE)
    expected = total.clone()
    for gradient, factor in zip(gradients, factors, strict=True):
        expected += (gradient.float() * factor).square()
    squares.add_squares(total, gradients, factors)
    torch.testing.assert_close(total, expected, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 8), (2, 40, 65), (4, 40, 65), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_gradients_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], begins: bool) -> None:
    gradients = list(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype))
    scales = 2.0 ** torch.arange(shape[0], device=DEVICE)
    total = torch.full(shape[1:], torch.nan if begins else 1 / 3, device=DEVICE)
    expected = total.clone()
    sums.add_scaled(total, gradients, scales, begins)
    add_scaled_in_steps(expected, gradients, scales, begins)
    assert torch.equal(total, expected)
    assert total.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite_stays_not_finite(activation: str) -> None:
    gates = torch.tensor([[torch.inf, -torch.inf, torch.nan]], device=DEVICE)
    ups = torch.ones_like(gates)
    results = gating.gate(gates, ups, activation), gate_in_steps(gates, ups, activation)
    assert torch.equal(*(result.isfinite() for result in results))


@pytest.mark.parametrize("kernel", ["_add_scaled", "_add_squares", "_gate", "_gate_back", "_rotate"])
def test_launches_go_to_the_tensors_device(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1, 2, 3, 4)
    module = {"_rotate": rotary, "_add_squares": squares, "_add_scaled": sums}.get(kernel, gating)
    events = launches(monkeypatch, module, kernel)
    if kernel == "_add_squares":
        squares.add_squares(values[0, 0], values[0], values[0, 0, 0])
    elif kernel == "_add_scaled":
        sums.add_scaled(values[0, 0], list(values[0, 1:]), values[0, 0, 0], False)
    elif kernel == "_rotate":
        rotary.rotate(values, *angles((1, 2, 3, 4), 1, torch.float32), False)
    elif kernel == "_gate":
        gating.gate(values[0, 0], values[0, 1], "silu")
    else:
        gating.gate_back(values[0, 0], values[0, 0], values[0, 1], "silu")
    assert len(events) == 3
    assert events[1] == "launch"
    assert events[0] is events[2]


CAPABILITIES = (80, 90)
POINTERS = (
    "states", "cosine", "sine", "rotated", "gate", "up", "gated", "gradient", "by_gate", "by_up", "gradients", "first",
    "second", "third", "fourth",
)  # fmt: skip
NUMBERS = (
    "heads", "tokens", "half", "columns", "sequence_step", "head_step", "token_step", "rotated_sequence",
    "rotated_head", "rotated_token", "angle_sequence", "angle_token", "gate_step", "up_step", "gradient_step",
    "numbers",
)  # fmt: skip
ROTATION = {"together": rotary.HEADS, "width": 64}  # heads of 128 features
GATE, GATE_BACK = ({"silu": 160, "gelu": 330, "gelu_tanh": 230}, {"silu": 255, "gelu": 455, "gelu_tanh": 325})


@dataclass(frozen=True)
class Compiled:
    """A kernel and its budget.

    `wide`: accesses of 16 bytes of each lane, at least: numbers that lie side by side are read and written so.
    `others`: other accesses: a scale of each gradient. `instructions`: at most; a lane of 32 takes 8 numbers, of
    rotary embeddings 8 pairs. `barriers`: sums are float32, and lie otherwise in the lanes than gradients.
    """

    module: Any
    name: str
    constants: dict[str, Any]
    wide: int
    instructions: int
    others: int = 0
    barriers: int = 0


COMPILED = [
    Compiled(rotary, "_rotate", {**ROTATION, "back": False}, wide=4, instructions=150),
    Compiled(rotary, "_rotate", {**ROTATION, "back": True}, wide=4, instructions=150),
    *(
        Compiled(gating, name, {"together": gating.COLUMNS, "activation": activation}, wide, instructions)
        for name, wide, budgets in (("_gate", 3, GATE), ("_gate_back", 5, GATE_BACK))
        for activation, instructions in budgets.items()
    ),
    Compiled(squares, "_add_squares", {"together": squares.NUMBERS, "count": 4}, 8, 230, others=4, barriers=1),
    Compiled(sums, "_add_scaled", {"together": sums.NUMBERS, "count": 4, "begins": False}, 8, 200, 4, 1),
    Compiled(sums, "_add_scaled", {"together": sums.NUMBERS, "count": 2, "begins": True}, 4, 110, 2, 1),
]


def test_compiled_kernels_read_and_write_16_bytes_at_once_in_few_instructions(tmp_path: Path) -> None:
    kinds = {**dict.fromkeys(POINTERS, "*bf16"), **dict.fromkeys(NUMBERS, "i32")}
    kinds |= dict.fromkeys(("total", "factors", "scales"), "*fp32")
    sources = [
        Source(kernel.module, kernel.name, kinds, kernel.constants, capability, 4, NUMBERS)
        for capability in CAPABILITIES
        for kernel in COMPILED
    ]
    codes = compile_kernels(sources, tmp_path)
    for kernel, code in zip(COMPILED * len(CAPABILITIES), codes, strict=True):
        wide = code.count("LDG.E.128", "STG.E.128")
        assert wide >= kernel.wide, kernel
        assert code.count("LDG", "STG") - wide == kernel.others, kernel
        assert (code.spills, code.barriers) == (0, kernel.barriers), kernel
        assert len(code.names) <= kernel.instructions, f"{kernel}: {len(code.names)}"
