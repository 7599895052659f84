"""Attention by blocks of queries, compared with softmax(scale · Q Kᵀ) V in float64 with autograd."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llm_barber.model import attention
from llm_barber.model.attention import BlockedAttention, CausalAttention, fast_attention

SHAPES = [(1, 1), (4, 4), (4, 2), (6, 1)]  # heads, key heads


def three(heads: int, key_heads: int, tokens: int, dtype: torch.dtype, sequences: int = 2) -> list[Tensor]:
    """Query, key and value; those of the latter have three features more."""
    made = torch.Generator().manual_seed(heads + tokens)
    shapes = ((heads, 16), (key_heads, 16), (key_heads, 19))
    return [torch.randn(sequences, one, tokens, size, generator=made).to(dtype) for one, size in shapes]


def as_written(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(shared, 1) for one in (key, value))
    scores = scale * query @ key.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ value


def with_gradients(compute: Any, inputs: list[Tensor], scale: float) -> list[Tensor]:
    """The output and the gradients of Σ output · a fixed random tensor."""
    inputs = [one.detach().requires_grad_() for one in inputs]
    output = compute(*inputs, scale)
    outer = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, outer)]


@pytest.mark.parametrize("tokens", [1, 5, 128, 129, 300])
@pytest.mark.parametrize(("heads", "key_heads"), SHAPES)
def test_it_is_attention_as_it_is_written(heads: int, key_heads: int, tokens: int) -> None:
    inputs = three(heads, key_heads, tokens, torch.float64)
    expected = with_gradients(as_written, inputs, 0.3)
    for found, wanted in zip(with_gradients(CausalAttention.apply, inputs, 0.3), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)
    # In bfloat16, of numbers that bfloat16 has, it is as near as rounding lets it be; so is the program's way to it.
    inputs = [one.bfloat16() for one in inputs]
    expected = with_gradients(as_written, [one.double() for one in inputs], 0.3)

    def in_the_program(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        with BlockedAttention():
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    found_in_bfloat16 = with_gradients(in_the_program, inputs, 0.3)
    for found, same, wanted in zip(
        found_in_bfloat16, with_gradients(CausalAttention.apply, inputs, 0.3), expected, strict=True
    ):
        assert torch.equal(found, same)
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() <= 0.01 * wanted.norm() + 1e-12


@pytest.mark.parametrize("offset", [0.0, 10.0, 60.0])
@pytest.mark.parametrize("features", [64, 96])
def test_large_scores_are_not_rounded(offset: float, features: int) -> None:
    """Keys that share an offset, as those of linears with a bias: scores of hundreds, whose differences count."""
    made = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 4, 260, features, generator=made) for _ in range(3))
    direction = torch.randn(features, generator=made)
    direction /= direction.norm()
    query += 0.7 * offset * direction
    key += offset * direction
    key[:, :, 0] += 3 * direction  # and one on which much attention lies
    inputs = [one.bfloat16() for one in (query, key, value)]
    scale = features**-0.5
    expected = with_gradients(as_written, [one.double() for one in inputs], scale)
    found = with_gradients(CausalAttention.apply, inputs, scale)
    kernel = with_gradients(lambda q, k, v, _: scaled_dot_product_attention(q, k, v, is_causal=True), inputs, scale)
    for one, pytorchs, wanted in zip(found, kernel, expected, strict=True):
        error, other = ((tensor.double() - wanted).norm() / wanted.norm() for tensor in (one, pytorchs))
        assert error <= max(0.008, 1.5 * other.item())


def test_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr(attention, "multiplies_bfloat16", lambda device, native=native: native)
        for device, dtype in product(("cpu", "meta"), (torch.bfloat16, torch.float32, torch.float16)):
            wanted = native and device == "cpu" and dtype == torch.bfloat16
            assert isinstance(fast_attention(torch.device(device), dtype), BlockedAttention) == wanted


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    """Or masks would depend on the size of batches, and on how many processes share the text."""
    inputs = three(6, 2, 300, torch.bfloat16, sequences=4)
    together = with_gradients(CausalAttention.apply, inputs, 0.25)
    for index in range(4):
        one = [tensor[index : index + 1].clone().requires_grad_() for tensor in inputs]
        output = CausalAttention.apply(*one, 0.25)
        outer = torch.randn(4, *output.shape[1:], generator=torch.Generator().manual_seed(7)).bfloat16()
        alone = [output, *torch.autograd.grad(output, one, outer[index : index + 1])]
        assert all(torch.equal(a[0], b[index]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "other",
    [
        {"is_causal": False},
        {"attn_mask": torch.ones(20, 20).tril().bool(), "is_causal": False},
        {"dropout_p": 0.5},
        {"dtype": torch.float32},
        {"dtype": torch.float16},
        {"key_tokens": 30},
        {"enable_gqa": False},
    ],
)
def test_other_attention_is_pytorchs(other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(attention.CausalAttention, "apply", lambda *given: calls.append(given))
    named = {"is_causal": True, "enable_gqa": True, **other}
    query, key, value = three(4, 2, 20, named.pop("dtype", torch.bfloat16))
    if tokens := named.pop("key_tokens", 0):
        key, value = (one.repeat(1, 1, 2, 1)[:, :, :tokens] for one in (key, value))

    def found() -> Tensor | str:
        torch.manual_seed(0)
        try:
            return scaled_dot_product_attention(query, key, value, **named)
        except RuntimeError as error:
            return str(error)

    expected = found()
    with BlockedAttention():
        again = found()
    assert not calls
    assert again == expected if isinstance(expected, str) else torch.equal(again, expected)
    with BlockedAttention():
        query, key, value = three(4, 2, 20, torch.bfloat16)
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert len(calls) == 1
