"""Linears that stay packed in memory, float and int8, against the dense linear of the unpacked weight."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from llm_barber import native
from llm_barber.checkpoint.encoding import pack
from llm_barber.checkpoint.rounding import pack_rounded
from llm_barber.errors import SettingsError
from llm_barber.native import Instructions
from llm_barber.runtime import products
from llm_barber.runtime.on_gpu import unpack_on_device
from llm_barber.runtime.packed_linear import PackedLinear

DTYPES = (torch.bfloat16, torch.float32)
ROWS = (1, 4, 5, 8, 9, 16, 17, 40)  # of inputs: products and unpacking


@pytest.fixture(params=[None, *Instructions], ids=lambda level: "numpy" if level is None else level.name, autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Instructions | None:
    """Each level of instructions that the processor has; None: the C extension was not built."""
    if request.param is None:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None or request.param > native.processor_instructions():
        pytest.skip(f"needs {request.param.name}")
    else:
        monkeypatch.setattr(native, "instructions", lambda: request.param)
    return request.param


@pytest.fixture(params=[False, True], ids=["float", "int8"])
def rounded(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def make_linears(
    dtype: torch.dtype, rounded: bool = False, rows: int = 48, columns: int = 128, group: int = 128, seed: int = 0,
    bias: bool = True,
) -> tuple[PackedLinear, nn.Linear]:  # fmt: skip
    """A packed linear, and the dense one that it unpacks to."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight.masked_fill(torch.rand(rows, columns, generator=generator) < 0.5, 0).to(dtype)
    packed = pack_rounded(weight, group) if rounded else pack(weight)
    assert packed is not None
    values = nn.Parameter(torch.randn(rows, generator=generator).to(dtype), requires_grad=False) if bias else None
    linear = PackedLinear(packed, values)
    assert rounded or torch.equal(linear.weight, weight)
    return linear, copy.deepcopy(linear.dense())


def check(linear: nn.Module, dense: nn.Linear, dtype: torch.dtype, rows: tuple[int, ...] = ROWS) -> None:
    """Compare products; int8 products may round their inputs."""
    for count in rows:
        inputs = torch.randn(count, dense.in_features, generator=torch.Generator().manual_seed(count)).to(dtype)
        outputs, expected = linear(inputs), dense(inputs)
        distance, size = (outputs - expected).double().norm(), expected.double().norm()
        bound = 0.015 if getattr(linear, "group", 0) else 0.005 if dtype != torch.float32 else 1e-6
        assert outputs.dtype == expected.dtype
        assert distance <= bound * size


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("columns", "group"), [(192, 128), (200, 64), (90, 128), (96, 24)])
def test_products(dtype: torch.dtype, rounded: bool, columns: int, group: int) -> None:
    for bias in (False, True):
        linear, dense = make_linears(dtype, rounded, columns=columns, group=group, bias=bias)
        check(linear, dense, dtype)
        batched = torch.randn(2, 3, columns).to(dtype)
        assert torch.equal(linear(batched).view(6, -1), linear(batched.view(6, columns)))
        assert linear(batched[:, :0]).shape == (2, 0, 48)
        on_device = unpack_on_device(linear.values, linear.bits, linear.shape)
        assert rounded or torch.equal(on_device, dense.weight)


@pytest.mark.parametrize("rows", [16, 100, 257])
def test_blocks_equal_the_whole(rounded: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole weights, blocks of 16 rows, and blocks between."""
    monkeypatch.setattr(products, "SHARED_ROWS", 16)
    for dtype in DTYPES:
        for bias in (False, True):
            linear, dense = make_linears(dtype, rounded, rows, bias=bias)
            for cached in (1, 10_000):
                monkeypatch.setattr(products, "UNPACKED_BYTES", cached)
                check(linear, dense, dtype, (33,))


def test_buffers_that_move_or_change(rounded: bool) -> None:
    """Pointers that were taken in an earlier call are not used when tensors are in another place."""
    linear, dense = make_linears(torch.float32, rounded)
    other, other_dense = make_linears(torch.float32, rounded, seed=1)
    check(linear, dense, torch.float32)
    copies = [copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))]
    linear.values.zero_()  # values are read where they are
    assert torch.equal(linear(torch.ones(1, 128))[0], linear.bias)
    for module in copies:
        check(module, dense, torch.float32)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for name, tensor in other.state_dict().items():
        setattr(linear, name, nn.Parameter(tensor, requires_grad=False) if name == "bias" else tensor)
    check(linear, other_dense, torch.float32)
    spread = torch.stack([other_dense.bias, other_dense.bias], 1)[:, 0]  # a bias with gaps
    linear.bias = nn.Parameter(spread, requires_grad=False)
    check(linear, other_dense, torch.float32)
    linear.load_state_dict(state)
    check(linear, other_dense, torch.float32)
    check(linear.to(torch.bfloat16), other_dense.to(torch.bfloat16), torch.bfloat16)
    assert "in_features=128, out_features=48" in repr(linear)


def test_a_state_is_loaded_in_place() -> None:
    """Another bit mask with as many values: rows begin elsewhere."""
    weight = torch.zeros(32, 64)
    weight[:16] = 1
    linear, source = (PackedLinear(pack(part), None) for part in (weight, weight.flip(0) * 2))
    inputs = torch.ones(30, 64)
    assert torch.equal(linear(inputs), inputs @ weight.T)
    linear.load_state_dict(source.state_dict())
    for rows in (1, 30):
        assert torch.equal(linear(inputs[:rows]), 2 * inputs[:rows] @ weight.flip(0).T)


def test_gradients_are_those_of_the_weight(rounded: bool) -> None:
    """Autograd keeps the weight of the first linear while the second, of the same size, is unpacked."""
    pairs = [make_linears(torch.float32, rounded, 32, 32, seed=seed) for seed in (0, 1)]
    gradients = []
    for number in (0, 1):
        inputs = torch.arange(0.0, 640).view(20, 32).requires_grad_()
        pairs[0][number].bias.requires_grad_()
        pairs[1][number](pairs[0][number](inputs)).sin().sum().backward()
        gradients.append((inputs.grad, pairs[0][number].bias.grad))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_threads_share_no_memory_for_unpacked_weights() -> None:
    """Callers at once, with weights of one size."""
    wrong: list[int] = []

    def call(seed: int) -> None:
        linear, dense = make_linears(torch.float32, rows=64, columns=256, seed=seed)
        inputs = torch.ones(20, 256)
        expected = dense(inputs)
        if not all(torch.allclose(linear(inputs), expected, rtol=1e-4, atol=1e-4) for _ in range(50)):
            wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_wrong_inputs_are_refused_as_by_a_dense_linear(rounded: bool) -> None:
    for module in make_linears(torch.bfloat16, rounded):
        for rows in (1, 40):
            with pytest.raises(RuntimeError, match="same dtype"):
                module(torch.ones(rows, 128))
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                module(torch.ones(rows, 16).bfloat16())


def test_defaults_and_autocast_of_the_surroundings(rounded: bool) -> None:
    before = torch.get_default_dtype()
    for dtype in DTYPES:
        linear, dense = make_linears(dtype, rounded)
        with torch.autocast("cpu", torch.bfloat16):
            for given in DTYPES:
                assert linear(torch.ones(1, 128).to(given)).dtype == torch.bfloat16
            inputs = torch.randn(40, 128)
            torch.testing.assert_close(linear(inputs), dense(inputs), rtol=0.02, atol=0.1)
        try:
            torch.set_default_dtype(torch.float64)
            assert linear(torch.ones(3, 128).to(dtype)).dtype == dtype
        finally:
            torch.set_default_dtype(before)
        inputs = torch.ones(1, 128).to(dtype)
        with torch.device("meta"):
            assert linear(inputs).device.type == "cpu"


def test_differentiation_by_torch_func_and_in_forward_mode(rounded: bool) -> None:
    linear, dense = make_linears(torch.float32, rounded)
    for rows in (1, 20):
        inputs, tangent = torch.randn(2, rows, 128).unbind()
        with torch.no_grad(), forward_ad.dual_level():
            outputs = forward_ad.unpack_dual(linear(forward_ad.make_dual(inputs, tangent)))
        torch.testing.assert_close(outputs.tangent, nn.functional.linear(tangent, dense.weight))
        torch.testing.assert_close(torch.func.vmap(linear)(inputs), dense(inputs))

        def total(module: nn.Module, inputs: Tensor = inputs) -> Any:
            return torch.func.grad(lambda given: module(given).square().sum())(inputs)

        torch.testing.assert_close(total(linear), total(dense))


def test_tracing_is_refused(rounded: bool) -> None:
    linear, _ = make_linears(torch.float32, rounded)
    with pytest.raises(SettingsError, match=r"torch\.jit\.trace does not see"):
        torch.jit.trace(linear, torch.ones(1, 128))


FORK = """
import os, sys, torch
from llm_barber.checkpoint.encoding import pack
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


def test_the_first_product_in_a_forked_process(level: Instructions | None) -> None:
    if level is not Instructions.AVX2:
        pytest.skip("the process has instructions of its own: once is enough")
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "2"})
