"""Packed linears in a program that sets defaults, autocast or tracing around them, or forks."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from llm_barber import native
from llm_barber.checkpoint.encoding import pack, unpack
from llm_barber.checkpoint.rounding import pack_rounded
from llm_barber.errors import SettingsError
from llm_barber.native import Instructions
from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.runtime.rounded_linear import RoundedLinear

ROWS = (1, 3, 5, 20)  # of inputs: products and unpacking


@pytest.fixture(params=[None, *(level for level in Instructions if level < native.instructions())])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's instructions, and each level below."""
    if request.param is not None:
        monkeypatch.setattr(native, "instructions", lambda: request.param)


def make_linears(dtype: torch.dtype, rounded: bool = False) -> tuple[PackedLinear | RoundedLinear, nn.Linear]:
    """A packed linear and the dense one that it unpacks to."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(48, 128, generator=generator)
    packed = pack(weight.masked_fill(torch.rand(48, 128, generator=generator) < 0.5, 0).to(dtype))
    assert packed is not None
    bias = nn.Parameter(torch.randn(48, generator=generator).to(dtype), requires_grad=False)
    values = pack_rounded(unpack(packed)) if rounded else None
    linear = PackedLinear(packed, bias) if values is None else RoundedLinear(values, bias)
    return linear, linear.dense().requires_grad_(False)


def check(linear: nn.Module, dense: nn.Linear, dtype: torch.dtype) -> None:
    """Compare the products for some numbers of rows; bounds are of rounding, and of rounded inputs."""
    generator = torch.Generator().manual_seed(1)
    for rows in ROWS:
        inputs = torch.randn(rows, 128, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        outputs, expected = linear(inputs), dense(inputs)
        assert outputs.dtype == expected.dtype
        assert (outputs - expected).abs().max() < (0.3 if isinstance(linear, RoundedLinear) else 0.1)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounded", [False, True])
def test_default_dtype_and_device(dtype: torch.dtype, rounded: bool) -> None:
    linear, dense = make_linears(dtype, rounded)
    before = torch.get_default_dtype()
    try:
        for default in (torch.bfloat16, torch.float16, torch.float64):
            torch.set_default_dtype(default)
            check(linear, dense, dtype)
    finally:
        torch.set_default_dtype(before)
    linear, dense = make_linears(dtype, rounded)
    with torch.device("meta"):
        check(linear, dense, dtype)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rounded", [False, True])
def test_autocast_decides_the_dtype_of_outputs(rounded: bool) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        linear, dense = make_linears(dtype, rounded)
        with torch.autocast("cpu", torch.bfloat16):
            check(linear, dense, torch.float32)
            check(linear, dense, torch.bfloat16)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rounded", [False, True])
def test_views(rounded: bool) -> None:
    """Inputs whose numbers in memory have the other sign, and a bias with gaps."""
    for dtype in (torch.bfloat16, torch.float32):
        linear, dense = make_linears(dtype, rounded)
        for rows in ROWS:
            inputs = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
            expected = linear(inputs)
            torch.testing.assert_close(linear(torch._neg_view(-inputs)), expected, rtol=0.02, atol=0.3)
        spread = torch.stack([dense.bias, dense.bias], 1)[:, 0]
        linear.bias = nn.Parameter(spread, requires_grad=False)
        assert not linear.bias.is_contiguous()
        check(linear, dense, dtype)


@pytest.mark.usefixtures("instructions")
def test_inputs_of_another_dtype_are_refused_as_by_a_dense_linear() -> None:
    linear, dense = make_linears(torch.bfloat16)
    for rows in ROWS:
        for module in (linear, dense):
            with pytest.raises(RuntimeError, match="same dtype"):
                module(torch.ones(rows, 128))


@pytest.mark.parametrize("rounded", [False, True])
def test_tracing_is_refused(rounded: bool) -> None:
    linear, _ = make_linears(torch.float32, rounded)
    with pytest.raises(SettingsError, match=r"torch\.jit\.trace does not see"):
        torch.jit.trace(linear, torch.ones(1, 128))


def test_a_state_whose_bits_do_not_fit_is_an_error() -> None:
    linear, _ = make_linears(torch.float32)
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    state["bits"][0] ^= 1
    with pytest.raises(RuntimeError, match="bits and values are of different masks"):
        linear.load_state_dict(state)


FORK = """
import os, sys, torch
from llm_barber.checkpoint.encoding import pack, unpack
from llm_barber.runtime.packed_linear import PackedLinear

torch.set_num_threads(2)
weight = torch.randn(1024, 1024).bfloat16().masked_fill(torch.rand(1024, 1024) < 0.5, 0)
linear = PackedLinear(pack(weight), None)
inputs = torch.randn(1, 1024).bfloat16()
torch.randn(4_000_000).exp_()  # PyTorch has started its threads
child = os.fork()
if child == 0:
    linear(inputs)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(native.library() is None, reason="threads of PyTorch are used in C")
def test_the_first_product_in_a_forked_process() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "2"})


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rounded", [False, True])
def test_forward_mode_keeps_the_tangent(rounded: bool) -> None:
    linear, dense = make_linears(torch.float32, rounded)
    for rows in ROWS:
        inputs, tangent = torch.randn(2, rows, 128).unbind()
        with torch.no_grad(), forward_ad.dual_level():
            outputs = forward_ad.unpack_dual(linear(forward_ad.make_dual(inputs, tangent)))
        assert torch.equal(outputs.primal, dense(inputs))
        assert torch.equal(outputs.tangent, nn.functional.linear(tangent, dense.weight))


def bias_gradient(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Gradient of the sum of outputs by a bias of ones, by `torch.func`."""

    def total(bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"bias": bias}, inputs).square().sum()

    return torch.func.grad(total)(torch.ones_like(module.bias))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rounded", [False, True])
def test_transforms_of_torch_func(rounded: bool) -> None:
    linear, dense = make_linears(torch.float32, rounded)
    for rows in ROWS:
        inputs, tangent = torch.randn(2, rows, 128).unbind()
        primal, derivative = torch.func.jvp(linear, (inputs,), (tangent,))
        assert torch.equal(primal, dense(inputs))
        torch.testing.assert_close(derivative, nn.functional.linear(tangent, dense.weight))
        torch.testing.assert_close(torch.func.vmap(linear)(inputs), dense(inputs))
        derivatives = [bias_gradient(module, inputs) for module in (linear, dense)]
        torch.testing.assert_close(*derivatives)
        gradient = torch.func.grad(lambda rows: linear(rows).square().sum())(inputs)
        torch.testing.assert_close(gradient, torch.func.grad(lambda rows: dense(rows).square().sum())(inputs))
