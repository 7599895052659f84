"""The kernels as operators: what torch.compile and CUDA graphs need of them, as far as a CPU can tell."""

import copy
import re
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from llm_barber.masking.pattern import Unstructured
from llm_barber.runtime import on_gpu
from llm_barber.runtime.kernels.operators import packed_product, unpacked
from llm_barber.runtime.packed_linear import PackedLinear
from tests.runtime.kernels.packing import packed_linear, pruned, rounded_linear

VIEWS = ("aten::view", "aten::detach")


@pytest.fixture(params=["bfloat16", "int8"])
def linear(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PackedLinear:
    """A linear on a device that has the kernels: here the CPU, by Triton's interpreter."""
    monkeypatch.setattr(on_gpu, "has_kernels", lambda _: True)
    torch.manual_seed(0)
    weight = pruned(24, 320, Unstructured(0.5), torch.bfloat16)
    made = (
        packed_linear(weight, bias=True) if request.param == "bfloat16" else rounded_linear(weight, 128, bias=True)[0]
    )
    return made.requires_grad_(False).to("cpu")


class Recorded(TorchDispatchMode):
    """Names of the operators that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        self.names.append(function._schema.name)
        return function(*arguments, **(named or {}))


def product_arguments(linear: PackedLinear, inputs: Tensor) -> tuple[Any, ...]:
    weight = linear.gpu_weight()
    places = weight.places
    return (
        weight.values, places.words, places.starts, places.row_starts, inputs, linear.bias, weight.scales, weight.group
    )  # fmt: skip


def test_pytorch_accepts_the_operators(linear: PackedLinear) -> None:
    """Schema, shapes without data, and tracing, by PyTorch's own check."""
    arguments = product_arguments(linear, torch.randn(2, 3, 320).bfloat16())
    torch.library.opcheck(packed_product, arguments)
    values, words, starts, row_starts, _, _, scales, group = arguments
    torch.library.opcheck(unpacked, (values, words, starts, row_starts, scales, group, 320, torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_a_product_of_few_rows_is_one_operator(linear: PackedLinear, rows: int) -> None:
    """No value of a tensor is looked at, and nothing is computed lazily: a CUDA graph captures the first product."""
    inputs = torch.randn(rows, 320).bfloat16()
    with Recorded() as recorded:
        linear(inputs)
    # The scales of int8 values are viewed as what they are.
    assert [name for name in recorded.names if name not in VIEWS] == ["llm_barber::packed_product"]


def test_a_product_of_many_rows_unpacks_first(linear: PackedLinear) -> None:
    with Recorded() as recorded:
        linear(torch.randn(17, 320).bfloat16())
    names = [name.partition("::")[2] for name in recorded.names]
    assert names.index("unpacked") < names.index("addmm")
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_"} & set(names)


@pytest.mark.parametrize(("rows", "dynamic"), [(1, False), (16, True), (17, False)])
def test_a_compiled_model_is_one_graph(linear: PackedLinear, rows: int, dynamic: bool) -> None:
    torch._dynamo.reset()
    square = packed_linear(pruned(24, 24, Unstructured(0.5), torch.bfloat16)).requires_grad_(False)
    model = nn.Sequential(linear, nn.SiLU(), square, copy.deepcopy(square))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
    inputs = torch.randn(1, rows, 320).bfloat16()
    with torch.no_grad():
        assert torch.equal(compiled(inputs), model(inputs))


def test_shapes_without_data(linear: PackedLinear) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        for rows in (1, 16, 17):
            outputs = linear(torch.empty(2, rows, 320, dtype=torch.bfloat16))
            assert (outputs.shape, outputs.dtype) == ((2, rows, 24), torch.bfloat16)
    graph = make_fx(linear, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.randn(1, 320).bfloat16())
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called[-1] == "llm_barber.packed_product.default"
    assert all(name.startswith(("aten.view", "aten.detach")) for name in called[:-1])


def test_gradients_go_through_the_unpacked_weight(linear: PackedLinear) -> None:
    inputs = torch.randn(2, 320).bfloat16().requires_grad_()
    linear(inputs).float().sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad[0], linear.weight.float().sum(0).bfloat16(), rtol=0.02, atol=0.02)


def test_what_the_kernels_do_not_take_goes_to_pytorch(linear: PackedLinear) -> None:
    """Wrong widths and dtypes are refused as by a dense linear; autocast decides the dtype of outputs."""
    weight = linear.gpu_weight()
    assert weight.can_decode(torch.ones(16, 320, dtype=torch.bfloat16), linear.bias)
    for inputs in (torch.ones(17, 320), torch.ones(0, 320), torch.ones(1, 319), torch.ones(1, 320).double()):
        assert not weight.can_decode(inputs.to(torch.bfloat16) if inputs.dtype == torch.float32 else inputs, None)
    assert linear(torch.ones(0, 320, dtype=torch.bfloat16)).shape == (0, 24)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.ones(2, 319, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.ones(2, 320))


@pytest.mark.parametrize(
    ("has_triton", "capability", "launch", "words"),
    [
        (True, (8, 0), None, None),
        (True, (12, 0), None, None),
        (False, (9, 0), None, "without Triton every product .* pip install triton"),
        (True, (7, 5), None, "need compute capability 8.0: on a card every product"),
        (
            True,
            (9, 0),
            RuntimeError("Failed to find C compiler.\nSpecify it"),
            r"RuntimeError: Failed to find C compiler\.",
        ),
    ],
)
def test_where_the_kernels_run(
    monkeypatch: pytest.MonkeyPatch,
    has_triton: bool,
    capability: tuple[int, int],
    launch: Exception | None,
    words: str | None,
) -> None:
    launched: list[torch.device] = []

    def noted(device: torch.device) -> None:
        launched.append(device)
        if launch is not None:
            raise launch

    monkeypatch.setattr(on_gpu, "find_spec", lambda _: has_triton or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(on_gpu, "_launch", noted)
    on_gpu._runs_kernels.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in ("cuda:1", "cuda"):  # the current one: asked once
                assert on_gpu.has_kernels(torch.device(name)) is (words is None)
            assert not on_gpu.has_kernels(torch.device("cpu"))
    finally:
        on_gpu._runs_kernels.cache_clear()
    assert launched == [torch.device("cuda:1")] * (has_triton and capability >= (8, 0))
    assert len(caught) == (words is not None)
    assert words is None or re.search(words, str(caught[0].message))


def test_the_launch_that_tests_a_gpu() -> None:
    """In Triton's interpreter: its weight is what it says."""
    on_gpu._launch(torch.device("cpu"))
