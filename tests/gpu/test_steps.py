"""Steps as one operation: the bits of PyTorch's operations, right gradients, and which devices have kernels."""

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from llm_barber.gpu import kernels
from llm_barber.gpu.kernels import DTYPES, has_kernels
from llm_barber.gpu.steps import add_scaled, add_squares, gate, rotate

GPU = torch.device("cuda", 0)


def rotated_by_transformers(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return (states * cosine.unsqueeze(1)) + (turned * sine.unsqueeze(1))


def gated_by(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gates, ups: activation(gates) * ups


def arguments(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Inputs of a function; those without a gradient come last."""
    generator = torch.Generator().manual_seed(0)
    if function is not rotate:
        return list((3 * torch.randn(2, 4, 7, 6, generator=generator)).to(dtype))
    states = torch.randn(2, 5, 3, 8, generator=generator).to(dtype).transpose(1, 2)
    return [states, *torch.randn(2, 1, 5, 8, generator=generator).to(dtype)]


FUNCTIONS = [
    (rotate, rotated_by_transformers, 1),
    (gate, gated_by(silu), 2),
    (partial(gate, activation="gelu"), gated_by(gelu), 2),
    (partial(gate, activation="gelu_tanh"), gated_by(partial(gelu, approximate="tanh")), 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fused", "unfused", "differentiated"), FUNCTIONS)
def test_bits_are_those_of_pytorchs_operations(
    fused: Callable[..., Tensor], unfused: Callable[..., Tensor], differentiated: int, dtype: torch.dtype
) -> None:
    results = []
    for function in (fused, unfused):
        inputs = arguments(fused, dtype)
        read = [tensor.requires_grad_() for tensor in inputs[:differentiated]]
        output = function(*inputs)
        incoming = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([output, *torch.autograd.grad(output, read, incoming)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(("fused", "_", "differentiated"), FUNCTIONS)
def test_gradients_are_right(fused: Callable[..., Tensor], _: object, differentiated: int) -> None:
    inputs = arguments(fused, torch.float64)
    for tensor in inputs[:differentiated]:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(fused, inputs)


def test_other_devices_have_no_kernels() -> None:
    assert not has_kernels(torch.device("cpu"), torch.float32)
    assert not has_kernels(torch.device("meta"), torch.float32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that Triton compiles for; nothing is known of it yet."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(kernels, "find_spec", lambda _: True)
    kernels._works_on_gpu.cache_clear()
    yield
    kernels._works_on_gpu.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_a_gpu_whose_kernels_are_right_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "wrong_steps", lambda *_: [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert has_kernels(GPU, torch.bfloat16)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_whose_kernels_are_wrong_does_not_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "wrong_steps", lambda _, dtype: ["SwiGLU"] if dtype == torch.float16 else [])
    assert has_kernels(GPU, torch.bfloat16)
    with pytest.warns(UserWarning, match=r"give other results in torch\.float16: SwiGLU\. Runs"):
        assert not has_kernels(GPU, torch.float16)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_a_compiler_does_not_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise OSError("no gcc\nand more")

    monkeypatch.setattr(kernels, "wrong_steps", fail)
    with pytest.warns(UserWarning, match=r"do not run here \(OSError: no gcc\)\. Runs"):
        assert not has_kernels(GPU, torch.bfloat16)


@pytest.mark.usefixtures("gpu")
def test_a_lack_of_memory_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "wrong_steps", fail)
    with pytest.raises(torch.OutOfMemoryError):
        has_kernels(GPU, torch.bfloat16)
    monkeypatch.setattr(kernels, "wrong_steps", lambda *_: [])
    assert has_kernels(GPU, torch.bfloat16)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("name", "found", "reason"),
    [("find_spec", None, "Triton is not installed"), ("get_device_capability", (7, 5), "need compute capability 8.0")],
)
def test_old_gpus_and_systems_without_triton_do_not(
    monkeypatch: pytest.MonkeyPatch, name: str, found: object, reason: str
) -> None:
    monkeypatch.setattr(kernels if name == "find_spec" else torch.cuda, name, lambda _: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old one")
    with pytest.warns(UserWarning, match=reason):
        assert not has_kernels(GPU, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_kernels(GPU, torch.bfloat16)


@pytest.mark.usefixtures("gpu")
def test_processes_take_the_kernels_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "wrong_steps", lambda *_: [])
    monkeypatch.setattr(kernels, "LEFT_OUT", set())
    assert has_kernels(GPU, torch.bfloat16)
    kernels.leave_out_kernels()
    assert not has_kernels(GPU, torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_compared_on_a_gpu_finds_wrong_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, which does not round to bfloat16."""
    from llm_barber.gpu import gate as gating
    from llm_barber.gpu import rotary, squares, sums

    cpu = torch.device("cpu")
    assert kernels.wrong_steps(cpu, dtype) == []
    rotated, added, summed, gated, back = (
        rotary.rotate, squares.add_squares, sums.add_scaled, gating.gate, gating.gate_back,
    )  # fmt: skip
    factor = 1 + (16 if dtype == torch.float32 else 5) * torch.finfo(dtype).eps
    other = {"silu": "gelu", "gelu": "gelu_tanh", "gelu_tanh": "gelu"}
    ways: list[tuple[Any, str, Callable[..., Any]]] = [
        (gating, "gate", lambda gates, ups, name: gated(ups, gates, name)),
        (gating, "gate", lambda *given: gated(*given) * factor),
        (gating, "gate", lambda gates, ups, name: gated(gates, ups, other[name])),
        (gating, "gate_back", lambda *given: back(*given)[::-1]),
        (gating, "gate_back", lambda *given: back(*given[:-1], other[given[-1]])),
        (gating, "gate_back", lambda *given: tuple(each * factor for each in back(*given))),
    ]
    gates = list(kernels.GATES.values())
    assert all(wrong_steps_with(monkeypatch, dtype, way) == gates for way in ways)
    ways = [
        (rotary, "rotate", lambda states, cosine, sine, back: rotated(states, cosine, -sine, back)),
        (squares, "add_squares", lambda *tensors: added(*tensors[:2], tensors[2].flip(0))),
        (sums, "add_scaled", lambda *given: summed(*given[:3], False)),
    ]
    others = ["rotary embeddings", "squares of gradients", "sums of gradients"]
    assert wrong_steps_with(monkeypatch, dtype, *ways) == others
    ways = [
        (rotary, "rotate", lambda states, cosine, sine, _: rotated(states, cosine, sine, False)),
        (sums, "add_scaled", lambda *given: summed(given[0], given[1][::-1], *given[2:])),
    ]
    assert wrong_steps_with(monkeypatch, dtype, *ways) == others[::2]


def wrong_steps_with(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, *ways: tuple[Any, str, Callable[..., Any]]
) -> list[str]:
    """Steps that are found to be wrong with other functions, each by module and name, in place of the right ones."""
    with monkeypatch.context() as patched:
        for way in ways:
            patched.setattr(*way)
        return kernels.wrong_steps(torch.device("cpu"), dtype)


def test_what_no_kernel_takes_is_computed_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_kernels", lambda _, dtype: dtype in DTYPES)
    assert kernels.take_kernels(torch.ones(1), torch.ones(1).bfloat16())
    assert not kernels.take_kernels(torch.ones(1), torch.ones(1).double())
    gates = torch.randn(2, 3)
    for ups in (torch.randn(2, 3).double(), torch.randn(2, 1)):
        assert torch.equal(gate(gates, ups), silu(gates) * ups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("begins", [False, True])
def test_sums_of_scaled_gradients_are_rounded_to_the_sums_dtype_alone(begins: bool, dtype: torch.dtype) -> None:
    """Scales, and scaled gradients, may exceed the gradients' dtype."""
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    for value, scale in ((1.0 + 2**-7, 2.0**-30), (1000.0, 2.0**16), (2.0**-9, 2.0**-20)):
        total = torch.full((1, 2), torch.nan if begins else 0.0, dtype=wider)
        add_scaled(total, [torch.full((1, 2), value, dtype=dtype)], torch.tensor([scale]), begins)
        assert torch.equal(total, torch.full((1, 2), value * scale, dtype=wider))
    gradients = [torch.full((1, 2), value, dtype=dtype) for value in (1.0, 2.0)]
    add_scaled(total, gradients, torch.tensor([2.0**17, 2.0**18]), begins=True)
    assert torch.equal(total, torch.full((1, 2), 5 * 2.0**17, dtype=wider))


def test_squares_are_added_in_turn() -> None:
    total, gradients = torch.ones(2, 3), torch.tensor([[[3.0]], [[4.0]]]).expand(2, 2, 3)
    add_squares(total, gradients.bfloat16(), torch.tensor([0.5, 2.0]))
    assert torch.equal(total, torch.full((2, 3), 1 + 1.5**2 + 8.0**2))
