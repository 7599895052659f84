"""Packed linears: the parts that GPUs use, run on the CPU, against brute force; the choice between them."""

import copy
import io
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llm_barber.checkpoint.encoding import pack
from llm_barber.runtime import on_gpu, products
from llm_barber.runtime.on_gpu import unpack_on_device
from llm_barber.runtime.packed_linear import PackedLinear


@given(rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_unpacking_by_torch(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.7] = 0
    packed = pack(weight)
    if packed is None:
        return
    linear = PackedLinear(packed, None)
    assert torch.equal(unpack_on_device(linear.values, linear.bits, linear.shape), weight)
    assert torch.equal(linear.weight, weight)


def test_other_dtypes_and_bias() -> None:
    weight = torch.randn(6, 16).masked_fill(torch.rand(6, 16) < 0.6, 0)
    packed = pack(weight)
    assert packed is not None
    linear = PackedLinear(packed, torch.nn.Parameter(torch.randn(6))).bfloat16()
    inputs = torch.randn(3, 16).bfloat16()
    expected = torch.nn.functional.linear(inputs, weight.bfloat16(), linear.bias)
    assert torch.equal(linear(inputs), expected)
    assert expected.dtype == torch.bfloat16
    assert "in_features=16, out_features=6" in repr(linear)


def make_linear(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0
) -> tuple[PackedLinear, nn.Linear]:
    """A packed linear, and the same dense."""
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(columns, rows, bias=bias).to(dtype).requires_grad_(False)
    weight = torch.randn(rows, columns, generator=generator)
    dense.weight.data = weight.masked_fill(torch.rand(rows, columns, generator=generator) < 0.6, 0).to(dtype)
    if bias:
        dense.bias.data = torch.randn(rows, generator=generator).to(dtype)
    packed = pack(dense.weight.data)
    assert packed is not None
    return PackedLinear(packed, copy.deepcopy(dense.bias)), dense


def check(linear: PackedLinear, dense: nn.Linear) -> None:
    for rows in (1, 5, 20):
        inputs = torch.randn(2, rows, dense.in_features, generator=torch.Generator().manual_seed(rows))
        inputs = inputs.to(dense.weight.dtype)
        torch.testing.assert_close(linear(inputs), dense(inputs), rtol=1e-2, atol=1e-2)


def test_buffers_that_move_or_change() -> None:
    """Pointers that were taken in an earlier call are not used when tensors are in another place."""
    linear, dense = make_linear(40, 64)
    other, other_dense = make_linear(40, 64, seed=1)
    check(linear, dense)
    copies = [copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))]
    linear.values.zero_()  # values are read where they are
    check(linear, nn.Linear(64, 40).requires_grad_(False).to(torch.float32).apply(lambda m: fill(m, 0, dense.bias)))
    for module_copy in copies:
        check(module_copy, dense)
    linear.values, linear.bits, linear.bias = other.values, other.bits, other.bias
    check(linear, other_dense)
    linear.bias.data = torch.zeros(40)
    other_dense.bias.data = torch.zeros(40)
    check(linear, other_dense)
    check(linear.to(torch.bfloat16), other_dense.to(torch.bfloat16))
    check(linear.to(torch.float64), other_dense.to(torch.float64))


def fill(linear: nn.Module, value: float, bias: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    nn.init.constant_(linear.weight, value)
    linear.bias.copy_(bias)


def test_a_state_is_loaded_in_place() -> None:
    """Another bit mask with as many values: rows begin elsewhere."""
    weight = torch.zeros(32, 64)
    weight[:16] = 1
    packed, moved = pack(weight), pack(weight.flip(0) * 2)
    assert packed is not None
    assert moved is not None
    linear, source = PackedLinear(packed, None), PackedLinear(moved, None)
    before = torch.get_num_threads()
    inputs = torch.ones(1, 64)
    try:
        torch.set_num_threads(2)
        assert torch.equal(linear(inputs), inputs @ weight.T)
        linear.load_state_dict(source.state_dict())
        assert torch.equal(linear(inputs), 2 * inputs @ weight.flip(0).T)
        inputs = torch.ones(30, 64)
        assert torch.equal(linear(inputs), 2 * inputs @ weight.flip(0).T)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [8, 16, 100, 257])
def test_blocks_equal_the_whole(dtype: torch.dtype, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole weights, blocks of 16 rows, and blocks between."""
    linear, dense = make_linear(rows, 64, dtype, bias)
    inputs = torch.randn(3, 11, 64).to(dtype)
    monkeypatch.setattr(products, "SHARED_ROWS", 16)
    for cached in (1, 5_000, 1 << 22):
        monkeypatch.setattr(products, "UNPACKED_BYTES", cached)
        torch.testing.assert_close(linear(inputs), dense(inputs), rtol=1e-2, atol=1e-2)
    assert linear(inputs[:, :0]).shape == (3, 0, rows)


def test_gradients_of_inputs_are_those_of_the_weight() -> None:
    """Autograd keeps the weight of the first linear while the second, of the same size, is unpacked."""
    pairs = [make_linear(32, 32, seed=seed) for seed in (0, 1)]
    gradients = []
    for number in (0, 1):
        inputs = torch.arange(0.0, 640).view(20, 32).requires_grad_()
        pairs[1][number](pairs[0][number](inputs)).sin().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    linear, dense = make_linear(32, 32)
    for layer in (linear, dense):
        layer.bias.requires_grad_()
        layer(torch.ones(20, 32)).sum().backward()
    assert torch.equal(linear.bias.grad, dense.bias.grad)


def test_threads_share_no_memory_for_unpacked_weights() -> None:
    """Callers at once, with weights of one size."""
    wrong: list[int] = []

    def call(seed: int) -> None:
        linear, dense = make_linear(64, 256, seed=seed)
        inputs = torch.ones(20, 256)
        expected = dense(inputs)
        if not all(torch.allclose(linear(inputs), expected, rtol=1e-4, atol=1e-4) for _ in range(100)):
            wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_inputs_of_another_width_are_refused() -> None:
    linear, _ = make_linear(8, 32)
    for rows in (2, 40):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(torch.ones(rows, 16))


def test_a_linear_is_asked_for_its_device_where_its_buffers_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate moves buffers by replacing them, and `torch.load` maps a file of a GPU to a CPU."""
    monkeypatch.setattr(on_gpu, "has_kernels", lambda device: device.type == "meta")  # stands for a GPU
    linear, dense = make_linear(40, 64)
    on_cpu = dict(linear._buffers)
    for name, buffer in on_cpu.items():
        linear._buffers[name] = buffer.to("meta")
    assert linear._places.usable(linear.bits)
    linear._buffers.update(on_cpu)
    assert not linear._places.usable(linear.bits)
    check(linear, dense)


def test_a_linear_whose_places_are_found_can_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "has_kernels", lambda _: True)
    linear, _ = make_linear(40, 64)  # the kernels read the bits of whole words, as another dtype
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    monkeypatch.setattr(on_gpu, "has_kernels", lambda _: False)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.weight, linear.to("cpu").weight)
