"""Causal attention in bfloat16 on a CPU, faster than PyTorch computes it by itself.

Attention is computed as products of matrices, by blocks of queries. PyTorch's own kernel reaches a tenth to a fifth of
the rate of matrix products. Here a block of queries is multiplied by all the keys up to it; heads that share keys are
multiplied together. That is as fast with large heads that share no keys, and up to 1.8 times as fast with small heads
that share keys (docs/notebook/speed.md). Query, key and value are kept for the backward pass, and the weights of the
keys where they are small; otherwise they are computed again. `torch.func`'s transforms (`vmap`, `grad`) refuse this
function.

All other attention goes to the kernel that PyTorch chooses.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from llm_barber.model.device import multiplies_bfloat16

QUERIES = 128  # in a block
KEY_STEP = 8  # every eighth key is tried for a large score
KEPT_BYTES = 2**26  # most bytes of a call's weights of keys that are kept for the backward pass


def fast_attention(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Let attention be computed within the context as it is fastest on the device."""
    if device.type == "cpu" and dtype == torch.bfloat16 and multiplies_bfloat16(device):
        return BlockedAttention()
    return nullcontext()


class BlockedAttention(TorchFunctionMode):
    """Lets causal attention within the context go to `CausalAttention`, and all other to PyTorch's function."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, or `CausalAttention` in its place."""
        named = keywords or {}
        if function is not scaled_dot_product_attention or len(arguments) != 3 or not _by_blocks(*arguments, **named):
            return function(*arguments, **named)
        scale = named.get("scale")
        query = arguments[0]
        return CausalAttention.apply(  # type: ignore[no-untyped-call]
            *arguments, query.shape[-1] ** -0.5 if scale is None else scale
        )


def _by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **unknown: Any,
) -> bool:
    """Test for causal attention of whole sequences in bfloat16 on a CPU, which `CausalAttention` computes."""
    return (
        is_causal
        and not unknown
        and attn_mask is None
        and not dropout_p
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.dim() == key.dim() == value.dim() == 4
        and query.numel() > 0
        and key.shape[:3] == value.shape[:3] == (query.shape[0], key.shape[1], query.shape[2])
        and (key.shape[1] == query.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
    )


class CausalAttention(torch.autograd.Function):
    """softmax(scale · Q Kᵀ) V, where each query sees the keys up to its own.

    The query is (sequences, heads, tokens, features). Key and value are (sequences, key heads, tokens, features), each
    with its own features; key heads divide heads. The result has the query's shape, with the value's features. A large
    score of each row is subtracted before scores are rounded to their dtype, so that the scores that count are small.
    Sums over blocks are float32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        """Sum the weighted values."""
        heads = _Heads(query, key, value, scale)
        sequences, _, tokens, _ = query.shape
        # In memory it is (sequences, tokens, heads, features), as layers read it and as PyTorch's kernel returns it.
        output = query.new_empty(sequences, tokens, *heads.queries.shape[1:3], value.shape[-1])
        keeps = any(ctx.needs_input_grad) and heads.probability_bytes <= KEPT_BYTES
        kept: list[Tensor] = []
        for block in heads.blocks:
            probabilities = heads.probabilities(block)
            weighted = torch.bmm(probabilities, heads.values[:, : block.stop])
            output[:, block] = heads.apart(weighted).permute(0, 3, 1, 2, 4)
            if keeps:
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return output.flatten(2, 3).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        """Gradients by query, key and value."""
        query, key, value, *kept = ctx.saved_tensors
        heads = _Heads(query, key, value, ctx.scale)
        by_query = torch.empty(heads.queries.shape, dtype=query.dtype)
        sums = torch.promote_types(query.dtype, torch.float32)
        by_key, by_value = (torch.zeros(tensor.shape, dtype=sums) for tensor in (heads.keys, heads.values))
        by_output = torch.unflatten(gradient, 1, heads.queries.shape[1:3])
        for number, block in enumerate(heads.blocks):
            seen = slice(block.stop)
            probabilities = kept[number] if kept else heads.probabilities(block)
            outer = heads.together(by_output, block)
            by_value[:, seen] += torch.bmm(probabilities.transpose(1, 2), outer)
            by_probability = torch.bmm(outer, heads.values[:, seen].transpose(1, 2))
            by_score = torch._softmax_backward_data(by_probability, probabilities, -1, query.dtype)
            by_query[..., block, :] = heads.apart(torch.bmm(by_score, heads.keys[:, seen]))
            by_key[:, seen] += torch.bmm(by_score.transpose(1, 2), heads.together(heads.queries, block))
        return (
            by_query.mul_(ctx.scale).view(query.shape),
            by_key.mul_(ctx.scale).to(key.dtype).view(key.shape),
            by_value.to(value.dtype).view(value.shape),
            None,
        )


class _Heads:
    """Queries, keys and values by head.

    Queries are (sequences, key heads, heads that share keys, tokens, features); keys and values are (sequences · key
    heads, tokens, features).
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.queries = torch.unflatten(query, 1, (key.shape[1], -1))
        self.keys, self.values = (tensor.reshape(-1, *tensor.shape[2:]) for tensor in (key, value))
        # Queries are multiplied by a power of two, which is exact; scores are multiplied by the rest of the scale.
        half, exponent = math.frexp(scale)
        self.rest, self.power = 2 * half, 2.0 ** (exponent - 1)
        tokens = query.shape[2]
        self.blocks = [slice(first, min(first + QUERIES, tokens)) for first in range(0, tokens, QUERIES)]
        self.later = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)

    @property
    def probability_bytes(self) -> int:
        """Bytes of the weights of all keys, in all blocks."""
        pairs = sum((block.stop - block.start) * block.stop for block in self.blocks)
        heads: int = self.queries.shape[:3].numel()
        return heads * pairs * self.queries.element_size()

    def together(self, tensor: Tensor, block: slice) -> Tensor:
        """Rows of a block of queries, one matrix per key head; heads that share keys lie below each other."""
        return tensor[..., block, :].reshape(len(self.keys), -1, tensor.shape[-1])

    def apart(self, rows: Tensor) -> Tensor:
        """Undo `together`: view rows by head."""
        return rows.view(*self.queries.shape[:3], -1, rows.shape[-1])

    def probabilities(self, block: slice) -> Tensor:
        """Weights of the keys up to the block's end for each query of the block, rows as of `together`."""
        queries = self.together(self.queries, block) * self.power
        # baddbmm rounds the sum, not the product.
        scores = torch.baddbmm(-self._large(queries, block), queries, self.keys[:, : block.stop].transpose(1, 2))
        size = block.stop - block.start
        self.apart(scores)[..., block.start :].masked_fill_(self.later[:size, :size], -torch.inf)
        return torch.softmax(scores if self.rest == 1 else scores.mul_(self.rest), -1)

    def _large(self, queries: Tensor, block: slice) -> Tensor:
        """Score near the largest of each query: the maximum over its own key and every eighth earlier key."""
        sampled = self.keys[:, : max(block.start, 1) : KEY_STEP]
        block_keys = torch.unflatten(self.keys[:, block], 0, self.queries.shape[:2]).unsqueeze(2)
        with_own_key = (self.apart(queries) * block_keys).sum(-1)
        earlier = torch.bmm(queries, sampled.transpose(1, 2)).amax(-1, keepdim=True)
        return torch.maximum(with_own_key.view(earlier.shape), earlier)
