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


def make_inputs(heads: int, key_heads: int, tokens: int, dtype: torch.dtype, sequences: int = 2) -> list[Tensor]:
    """Make query, key and value, (sequences, heads, tokens, features): 16 features, and 19 of the value."""
    generator = torch.Generator().manual_seed(heads + tokens)
    shapes = ((heads, 16), (key_heads, 16), (key_heads, 19))
    return [torch.randn(sequences, count, tokens, size, generator=generator).to(dtype) for count, size in shapes]


def attention_by_formula(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, 1) for tensor in (key, value))
    scores = scale * query @ key.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ value


def with_gradients(compute: Any, inputs: list[Tensor], scale: float) -> list[Tensor]:
    """Output of `compute`, and the gradients by the inputs of Σ output · a fixed random tensor."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = compute(*inputs, scale)
    outer = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, outer)]


@pytest.mark.parametrize("tokens", [1, 5, 128, 129, 300])
@pytest.mark.parametrize(("heads", "key_heads"), SHAPES)
def test_it_equals_the_formula(heads: int, key_heads: int, tokens: int) -> None:
    inputs = make_inputs(heads, key_heads, tokens, torch.float64)
    expected = with_gradients(attention_by_formula, inputs, 0.3)
    for tensor, wanted in zip(with_gradients(CausalAttention.apply, inputs, 0.3), expected, strict=True):
        assert torch.allclose(tensor, wanted, rtol=1e-10, atol=1e-12)
    # For inputs in bfloat16 the error is that of rounding. The program's call gives the same bits.
    inputs = [tensor.bfloat16() for tensor in inputs]
    expected = with_gradients(attention_by_formula, [tensor.double() for tensor in inputs], 0.3)

    def in_the_program(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        with BlockedAttention():
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    of_program = with_gradients(in_the_program, inputs, 0.3)
    direct = with_gradients(CausalAttention.apply, inputs, 0.3)
    for tensor, same, wanted in zip(of_program, direct, expected, strict=True):
        assert torch.equal(tensor, same)
        assert tensor.dtype == torch.bfloat16
        assert (tensor.double() - wanted).norm() <= 0.01 * wanted.norm() + 1e-12


@pytest.mark.parametrize("tokens", [5, 300])
def test_kept_weights_of_keys_change_no_bit(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed once, or, where they are too large to keep, again for the backward pass."""
    calls: list[slice] = []
    probabilities = attention._Heads.probabilities

    def noted(heads: attention._Heads, block: slice) -> Tensor:
        calls.append(block)
        return probabilities(heads, block)

    monkeypatch.setattr(attention._Heads, "probabilities", noted)
    inputs = make_inputs(4, 2, tokens, torch.bfloat16)
    size = 2 * 4 * sum(min(128, tokens - first) * min(first + 128, tokens) for first in range(0, tokens, 128)) * 2
    by_room, blocks = [], []
    for room in (size, size - 1):
        monkeypatch.setattr(attention, "KEPT_BYTES", room)
        by_room.append(with_gradients(CausalAttention.apply, inputs, 0.3))
        blocks.append(len(calls))
        calls.clear()
    assert all(torch.equal(*pair) for pair in zip(*by_room, strict=True))
    assert blocks == [-(-tokens // 128), 2 * -(-tokens // 128)]


@pytest.mark.parametrize("offset", [0.0, 10.0, 60.0])
@pytest.mark.parametrize("features", [64, 96])
def test_large_scores_are_not_rounded(offset: float, features: int) -> None:
    """Keys share an offset, as after linears with a bias: scores are hundreds, their differences matter."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 4, 260, features, generator=generator) for _ in range(3))
    direction = torch.randn(features, generator=generator)
    direction /= direction.norm()
    query += 0.7 * offset * direction
    key += offset * direction
    key[:, :, 0] += 3 * direction  # the first key gets much of the attention
    inputs = [tensor.bfloat16() for tensor in (query, key, value)]
    scale = features**-0.5
    expected = with_gradients(attention_by_formula, [tensor.double() for tensor in inputs], scale)
    blocked = with_gradients(CausalAttention.apply, inputs, scale)
    kernel = with_gradients(lambda q, k, v, _: scaled_dot_product_attention(q, k, v, is_causal=True), inputs, scale)
    for of_blocked, of_kernel, wanted in zip(blocked, kernel, expected, strict=True):
        error, kernel_error = ((tensor.double() - wanted).norm() / wanted.norm() for tensor in (of_blocked, of_kernel))
        assert error <= max(0.008, 1.5 * kernel_error.item())


def test_it_is_used_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr(attention, "multiplies_bfloat16", lambda device, native=native: native)
        for device, dtype in product(("cpu", "meta"), (torch.bfloat16, torch.float32, torch.float16)):
            wanted = native and device == "cpu" and dtype == torch.bfloat16
            assert isinstance(fast_attention(torch.device(device), dtype), BlockedAttention) == wanted


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    """Equality that keeps masks independent of the batch size and of the number of processes."""
    inputs = make_inputs(6, 2, 300, torch.bfloat16, sequences=4)
    together = with_gradients(CausalAttention.apply, inputs, 0.25)
    for index in range(4):
        sequence = [tensor[index : index + 1].clone().requires_grad_() for tensor in inputs]
        output = CausalAttention.apply(*sequence, 0.25)
        outer = torch.randn(4, *output.shape[1:], generator=torch.Generator().manual_seed(7)).bfloat16()
        alone = [output, *torch.autograd.grad(output, sequence, outer[index : index + 1])]
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
def test_other_attention_is_left_to_pytorch(other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(attention.CausalAttention, "apply", lambda *inputs: calls.append(inputs))
    options = {"is_causal": True, "enable_gqa": True, **other}
    query, key, value = make_inputs(4, 2, 20, options.pop("dtype", torch.bfloat16))
    if tokens := options.pop("key_tokens", 0):
        key, value = (tensor.repeat(1, 1, 2, 1)[:, :, :tokens] for tensor in (key, value))

    def output_or_error() -> Tensor | str:
        torch.manual_seed(0)
        try:
            return scaled_dot_product_attention(query, key, value, **options)
        except RuntimeError as error:
            return str(error)

    expected = output_or_error()
    with BlockedAttention():
        again = output_or_error()
    assert not calls
    assert again == expected if isinstance(expected, str) else torch.equal(again, expected)
    with BlockedAttention():
        query, key, value = make_inputs(4, 2, 20, torch.bfloat16)
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert len(calls) == 1
