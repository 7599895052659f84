"""No gradient that is taken in a fixed order uses an operation for which PyTorch has no deterministic CUDA kernel.

A dispatch mode logs the operations inside `in_fixed_order`, forward and backward, for every family of the tests. CUDA
runs the same operations, but for attention and RMS norms, which PyTorch computes by fused kernels: those of attention
have a deterministic backward pass in this mode, and no norm is on PyTorch's list. Rotary embeddings and activated gates
are one operation each, as on a GPU, whose kernels add nothing up.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm_barber import PruneConfig, prune
from llm_barber.model import fixed_order
from llm_barber.model.fused_gates import fuse_gates
from llm_barber.model.fused_rotary import fuse_rotary
from llm_barber.model.skeleton import Skeleton
from tests.conftest import FAMILIES, Listener, make_model, save_tokens

Condition = Callable[[tuple[Any, ...], dict[str, Any]], bool]


def always(*_: Any) -> bool:
    return True


def floating(arguments: tuple[Any, ...], _: dict[str, Any]) -> bool:
    return bool(arguments[0].is_floating_point() or arguments[0].is_complex())


def quantized(arguments: tuple[Any, ...], _: dict[str, Any]) -> bool:
    return bool(arguments[0].is_quantized)


def product(arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    return "prod" in (*arguments, *named.values())


# What the documentation of torch.use_deterministic_algorithms lists as "will throw a RuntimeError", torch 2.13: name,
# operations that compute it on CUDA, and the condition under which they do. (docs.pytorch.org/docs/2.13/generated/
# torch.use_deterministic_algorithms.html; the same text is the function's docstring.)
NONDETERMINISTIC: dict[str, tuple[tuple[str, ...], Condition]] = {
    "torch.nn.AvgPool3d": (("avg_pool3d_backward",), always),
    "torch.nn.AdaptiveAvgPool2d": (("_adaptive_avg_pool2d_backward",), always),
    "torch.nn.AdaptiveAvgPool3d": (("_adaptive_avg_pool3d_backward",), always),
    "torch.nn.AdaptiveMaxPool2d": (("adaptive_max_pool2d_backward",), always),
    "torch.nn.FractionalMaxPool2d": (("fractional_max_pool2d_backward",), always),
    "torch.nn.FractionalMaxPool3d": (("fractional_max_pool3d_backward",), always),
    "torch.nn.MaxUnpool1d": (("max_unpool2d",), always),
    "torch.nn.MaxUnpool2d": (("max_unpool2d",), always),
    "torch.nn.MaxUnpool3d": (("max_unpool3d",), always),
    "torch.nn.functional.interpolate": (
        (
            "upsample_linear1d_backward", "upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward",
            "upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward", "upsample_trilinear3d_backward",
        ),
        always,
    ),
    "torch.nn.ReflectionPad1d": (("reflection_pad1d_backward",), always),
    "torch.nn.ReflectionPad2d": (("reflection_pad2d_backward",), always),
    "torch.nn.ReflectionPad3d": (("reflection_pad3d_backward",), always),
    "torch.nn.NLLLoss": (("nll_loss_forward", "nll_loss2d_forward"), always),
    "torch.nn.CTCLoss": (("_ctc_loss_backward", "_cudnn_ctc_loss"), always),
    "torch.nn.EmbeddingBag": (("_embedding_bag_dense_backward", "_embedding_bag_backward"), always),
    "torch.Tensor.put_": (("put", "put_"), always),
    "torch.histc": (("histc",), always),
    "torch.bincount": (("bincount",), always),
    "torch.median": (("median.dim", "nanmedian.dim"), always),
    "torch.nn.functional.grid_sample": (("grid_sampler_2d_backward", "grid_sampler_3d_backward"), always),
    "torch.cumsum": (("cumsum", "cumsum_"), floating),
    "torch.Tensor.scatter_reduce": (("scatter_reduce", "scatter_reduce_"), product),
    "torch.Tensor.resize_": (("resize_",), quantized),
}  # fmt: skip
ZEROS = torch.zeros(4, dtype=torch.long)
# Families whose gradients need such an operation: a run of them says that another run may round otherwise.
KNOWN: dict[str, set[str]] = {
    family: {"torch.cumsum"}
    for family in (
        "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "qwen3_next", "qwen3_5", "qwen3_5-whole",
    )
}  # fmt: skip


class Logged(TorchDispatchMode):
    """Keeps the operations within the context, and those of the list."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.nondeterministic: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, _: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        self.operations.add(name)
        for title, (names, condition) in NONDETERMINISTIC.items():
            if {name, f"{name}.{function._overloadname}"} & set(names) and condition(arguments, named or {}):
                self.nondeterministic.add(title)
        return function(*arguments, **(named or {}))


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Logged:
    """Operations inside `in_fixed_order`, from now on, of models that are treated as on a GPU."""
    mode, whole, made = Logged(), fixed_order.in_fixed_order, Skeleton.__init__

    @contextmanager
    def noted() -> Iterator[None]:
        with whole(), mode:
            yield

    def make(skeleton: Skeleton, *arguments: Any) -> None:
        made(skeleton, *arguments)
        skeleton.order.enabled = True
        fuse_rotary(skeleton.model)
        fuse_gates(skeleton.model)

    monkeypatch.setattr(fixed_order, "in_fixed_order", noted)
    monkeypatch.setattr(Skeleton, "__init__", make)
    return mode


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_family(tmp_path: Path, logged: Logged, family: str) -> None:
    """Of the allocation, the rebuild and the tuning of masks and weights."""
    model = make_model(tmp_path / "dense", family)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=2, tokens=8)
    settings: dict[str, Any] = {"preset": "best", "rebuild": True, "tune_passes": 1, "guard": 0}
    heard = Listener()
    prune(
        PruneConfig(
            model=model, output=tmp_path / "out", calibration=tokens, dtype="float32", report=False, **settings
        ),
        heard,
    )
    assert "mm" in logged.operations
    assert {name for name in logged.operations if "backward" in name}, "no backward pass was seen"
    assert logged.nondeterministic == KNOWN.get(family, set())
    assert not any("no fixed order" in warning for warning in heard.warnings)  # which only a GPU knows
    if family == "llama":
        assert {"llm_barber::rotate", "llm_barber::gate", "llm_barber::gate_back"} <= logged.operations


def test_no_norm_is_on_the_list() -> None:
    assert not [title for title in NONDETERMINISTIC if "norm" in title.lower()]


def test_the_list_is_that_of_the_documentation() -> None:
    """A newer PyTorch may list more: then the list above wants its operations."""
    text = torch.use_deterministic_algorithms.__doc__ or ""
    raising = text[text.index("operations will throw a\n") : text.index("In addition, several operations")]
    listed = set(re.findall(r"^\s+\* :(?:class|func):`([\w.]+)`", raising, re.MULTILINE))
    assert len(listed) > 15
    assert listed <= NONDETERMINISTIC.keys()


@pytest.mark.parametrize(
    ("compute", "title"),
    [
        (lambda values: values.cumsum(0), "torch.cumsum"),
        (lambda values: values.long().cumsum(0), None),
        (lambda values: values.median(0), "torch.median"),
        (lambda values: values.median(), None),
        (lambda values: values.scatter_reduce(0, ZEROS, values, "prod"), "torch.Tensor.scatter_reduce"),
        (lambda values: values.scatter_reduce(0, ZEROS, values, "sum"), None),
        (lambda values: torch.histc(values), "torch.histc"),
        (lambda values: values.softmax(0) @ values, None),
    ],
)  # fmt: skip
def test_operations_of_the_list_are_recognised(compute: Callable[..., Any], title: str | None) -> None:
    with Logged() as mode:
        compute(torch.rand(4))
    assert mode.nondeterministic == ({title} if title else set())


def test_backward_passes_are_seen() -> None:
    values = torch.rand(1, 1, 4, requires_grad=True)
    with Logged() as mode:
        torch.nn.functional.pad(values, (1, 1), mode="reflect").sum().backward()
    assert mode.nondeterministic == {"torch.nn.ReflectionPad1d"}
