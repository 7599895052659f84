"""Steps as one operation: the bits of PyTorch's operations, right gradients, and which devices have kernels."""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from llm_barber.gpu import kernels
from llm_barber.gpu.kernels import DTYPES, has_kernels
from llm_barber.gpu.steps import add_squares, gate, rotate

GPU = torch.device("cuda", 0)


def rotated_by_transformers(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return (states * cosine.unsqueeze(1)) + (turned * sine.unsqueeze(1))


def gated_by_transformers(gates: Tensor, ups: Tensor) -> Tensor:
    return silu(gates) * ups


def arguments(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Inputs of a function; those without a gradient come last."""
    generator = torch.Generator().manual_seed(0)
    if function is gate:
        return list((3 * torch.randn(2, 4, 7, 6, generator=generator)).to(dtype))
    states = torch.randn(2, 5, 3, 8, generator=generator).to(dtype).transpose(1, 2)
    return [states, *torch.randn(2, 1, 5, 8, generator=generator).to(dtype)]


FUNCTIONS = [(rotate, rotated_by_transformers, 1), (gate, gated_by_transformers, 2)]


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
    from llm_barber.gpu import rotary, squares

    cpu = torch.device("cpu")
    assert kernels.wrong_steps(cpu, dtype) == []
    rotated, gated, back, added = rotary.rotate, gating.gate, gating.gate_back, squares.add_squares
    wrong: list[tuple[Any, str, str, Callable[..., Any]]] = [
        (
            rotary,
            "rotate",
            "rotary embeddings",
            lambda states, cosine, sine, back: rotated(states, cosine, -sine, back),
        ),
        (rotary, "rotate", "rotary embeddings", lambda states, cosine, sine, _: rotated(states, cosine, sine, False)),
        (gating, "gate", "SwiGLU", lambda gates, ups: gated(ups, gates)),
        (gating, "gate", "SwiGLU", lambda gates, ups: gated(gates, ups) * (1 + 16 * torch.finfo(dtype).eps)),
        (gating, "gate_back", "SwiGLU", lambda *tensors: back(*tensors)[::-1]),
        (squares, "add_squares", "squares of gradients", lambda *tensors: added(*tensors[:2], tensors[2].flip(0))),
    ]
    for module, name, step, function in wrong:
        with monkeypatch.context() as patched:
            patched.setattr(module, name, function)
            assert kernels.wrong_steps(cpu, dtype) == [step]


def test_what_no_kernel_takes_is_computed_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_kernels", lambda _, dtype: dtype in DTYPES)
    assert kernels.take_kernels(torch.ones(1), torch.ones(1).bfloat16())
    assert not kernels.take_kernels(torch.ones(1), torch.ones(1).double())
    gates, ups = torch.randn(2, 3), torch.randn(2, 3).double()
    assert torch.equal(gate(gates, ups), silu(gates) * ups)


def test_squares_are_added_in_turn() -> None:
    total, gradients = torch.ones(2, 3), torch.tensor([[[3.0]], [[4.0]]]).expand(2, 2, 3)
    add_squares(total, gradients.bfloat16(), torch.tensor([0.5, 2.0]))
    assert torch.equal(total, torch.full((2, 3), 1 + 1.5**2 + 8.0**2))
