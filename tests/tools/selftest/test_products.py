"""Products and attention on a CPU pass; a product in TF32, a wrong bit, and attention by another kernel do not."""

from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.tools.selftest import products
from llm_barber.tools.selftest.bench import Bench, half_pruned
from llm_barber.tools.selftest.products import (
    check_attention,
    check_packed,
    check_semi_structured,
    same_attention,
    share_of_bound,
)
from llm_barber.tools.selftest.result import NotRunError

CPU = torch.device("cpu")


def tf32(values: torch.Tensor) -> torch.Tensor:
    """Values with the ten bits of TF32's fraction."""
    return (values.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 1000])
def test_rounding_is_within_its_bound(dtype: torch.dtype, columns: int) -> None:
    weight = half_pruned((48, columns), dtype, CPU)
    inputs, bias = torch.randn(5, columns).to(dtype), torch.randn(48).to(dtype)
    assert share_of_bound(linear(inputs, weight, bias), inputs, weight, bias) <= 1
    reordered = torch.zeros(5, 48)
    for column in range(columns):  # one after the other: the order with the largest errors
        reordered += inputs[:, column, None].float() * weight[:, column].float()
    assert share_of_bound((reordered + bias.float()).to(dtype), inputs, weight, bias) <= 1


def test_faults_are_beyond_the_bound() -> None:
    weight, inputs = half_pruned((48, 256), torch.float32, CPU), torch.randn(5, 256)
    exact = linear(inputs, weight)
    assert share_of_bound(linear(tf32(inputs), tf32(weight)), inputs, weight, None) > 1
    assert share_of_bound(linear(inputs.bfloat16(), weight.bfloat16()).float(), inputs, weight, None) > 1
    half, partial = (inputs.bfloat16(), weight.bfloat16()), torch.zeros(5, 48).bfloat16()
    for first in range(0, 256, 32):
        partial += linear(*(part[:, first : first + 32] for part in half))
    assert share_of_bound(partial, *half, None) > 1  # partial sums in half precision
    wrong = exact.clone()
    wrong[2, 7] = wrong[2, 7] + 1e-2
    assert share_of_bound(wrong, inputs, weight, None) > 1
    wrong[2, 7] = torch.nan
    assert not share_of_bound(wrong, inputs, weight, None) <= 1
    eight_bits = (
        inputs.abs().amax(1, keepdim=True) / 127 * torch.round(inputs / inputs.abs().amax(1, keepdim=True) * 127)
    )
    assert share_of_bound(linear(eight_bits, weight), inputs, weight, None, rounded=True) <= 1
    assert share_of_bound(linear(eight_bits, weight), inputs, weight, None) > 1


def test_packed_products_of_this_cpu_pass(bench: Bench) -> None:
    findings = list(check_packed(bench))
    assert all(finding.passed for finding in findings), findings
    assert {finding.text.split(":")[0] for finding in findings} >= {
        "packed float32 weights, float32 inputs", "packed int8 weights, float16 inputs",
    }  # fmt: skip


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("change", [lambda output: output.roll(1, -1), lambda output: output * torch.nan])
def test_wrong_products_fail(bench: Bench, rounded: bool, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda module, inputs: change(whole(module, inputs)))
    findings = list(check_packed(bench))
    name = "int8" if rounded else "float"
    assert {finding.passed for finding in findings if f"packed {name}" in finding.text} == {False}


def test_a_product_that_is_wrong_for_one_number_of_rows_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda module, inputs: whole(module, inputs) + (len(inputs) == 5))
    assert not next(iter(check_packed(bench))).passed


def test_attention_of_this_cpu_passes(bench: Bench) -> None:
    findings = list(check_attention(bench))
    assert all(finding.passed for finding in findings), findings
    assert all("causal: " in finding.text and "with a mask: " in finding.text for finding in findings)


def test_attention_by_another_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = products.scaled_dot_product_attention

    def other(query: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        output = whole(query, *arguments, **named)
        return output * (1 + 1e-6) if query.requires_grad else output

    assert same_attention(CPU, torch.float32, (4, 2, 16), masked=False)[0]
    monkeypatch.setattr(products, "scaled_dot_product_attention", other)
    assert not same_attention(CPU, torch.float32, (4, 2, 16), masked=False)[0]


@pytest.mark.parametrize(
    ("device", "capability", "reason"),
    [("cpu", (0, 0), "needs a GPU"), ("cuda", (7, 5), "needs compute capability 8.0, this GPU has 7.5")],
)
def test_no_2_to_4_without_such_products(
    bench: Bench, device: str, capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.device = torch.device(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(NotRunError, match=reason):
        list(check_semi_structured(bench))
