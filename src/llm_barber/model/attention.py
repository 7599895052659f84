"""Causal attention in bfloat16 on a CPU as products of matrices, by blocks of queries.

PyTorch's own kernel for CPUs reaches a fifth of the rate of matrix products there, and was a third of a run. Here a
block of queries is multiplied by all the keys up to it, those of all heads that share the keys together: 1.1 times as
fast (32 heads of 128 features, 2048 tokens) to 2.5 times (4 heads that share keys, 256 features, 512 tokens; forward
and back, an EPYC, PyTorch 2.13). Only query, key and value are kept for the way back. Other attention is PyTorch's.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

QUERIES = 128  # in a block


class BlockedAttention(TorchFunctionMode):
    """Within, `scaled_dot_product_attention` goes by blocks of queries where that is faster."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        given: tuple[Any, ...] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        """What `function` gives, by blocks if it is attention that can be had so."""
        named = named or {}
        if function is scaled_dot_product_attention and len(given) == 3 and _by_blocks(*given, **named):
            query, key, value = given
            scale = named.get("scale")
            return CausalAttention.apply(  # type: ignore[no-untyped-call]
                query, key, value, query.shape[-1] ** -0.5 if scale is None else scale
            )
        return function(*given, **named)


def _by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Is it causal attention of whole sequences that `CausalAttention` is made for and faster at?"""
    return (
        is_causal
        and attn_mask is None
        and not dropout_p
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.dim() == key.dim() == value.dim() == 4
        and key.shape[:3] == value.shape[:3] == (query.shape[0], key.shape[1], query.shape[2])
        and (key.shape[1] == query.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
    )


class CausalAttention(torch.autograd.Function):
    """softmax(scale · Q Kᵀ, each query with the keys up to its own) V.

    Query: (sequences, heads, tokens, features); key and value: (sequences, key heads, tokens, their features), where
    key heads divide heads; so is the result, with value's features. Scores are rounded to their dtype, as where
    transformers attends without a kernel; sums over blocks of queries are float32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        """The weighted values."""
        heads = _Heads(query, key, value, scale)
        output = query.new_empty((*heads.queries.shape[:3], query.shape[2], value.shape[-1]))
        for block in heads.blocks:
            output[..., block, :] = heads.apart(torch.bmm(heads.probabilities(block), heads.values[:, : block.stop]))
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return output.view(*query.shape[:3], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        """The gradients by query, key and value."""
        query, key, value = ctx.saved_tensors
        heads = _Heads(query, key, value, ctx.scale)
        by_query = torch.empty(heads.queries.shape, dtype=query.dtype)
        sums = torch.promote_types(query.dtype, torch.float32)
        by_key, by_value = (torch.zeros(one.shape, dtype=sums) for one in (heads.keys, heads.values))
        by_output = torch.unflatten(gradient, 1, heads.queries.shape[1:3])
        for block in heads.blocks:
            seen = slice(block.stop)
            probabilities = heads.probabilities(block)
            outer = heads.together(by_output, block)
            by_value[:, seen] += torch.bmm(probabilities.transpose(1, 2), outer)
            by_probability = torch.bmm(outer, heads.values[:, seen].transpose(1, 2))
            by_score = torch._softmax_backward_data(by_probability, probabilities, -1, query.dtype)
            by_query[..., block, :] = heads.apart(torch.bmm(by_score, heads.keys[:, seen])).mul_(ctx.scale)
            by_key[:, seen] += torch.bmm(by_score.transpose(1, 2), heads.scaled(block))
        return (
            by_query.view(query.shape),
            by_key.to(key.dtype).view(key.shape),
            by_value.to(value.dtype).view(value.shape),
            None,
        )


class _Heads:
    """Queries, (sequences, key heads, heads that share keys, tokens, features); keys and values, one matrix a head."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.queries = torch.unflatten(query, 1, (key.shape[1], -1))
        self.keys, self.values = (one.reshape(-1, *one.shape[2:]) for one in (key, value))
        self.scale = scale
        tokens = query.shape[2]
        self.blocks = [slice(first, min(first + QUERIES, tokens)) for first in range(0, tokens, QUERIES)]
        self.later = torch.full((QUERIES, QUERIES), -torch.inf, dtype=query.dtype).triu(1)

    def together(self, tensor: Tensor, block: slice) -> Tensor:
        """A block of queries' rows, of heads that share keys below each other: a matrix for each key head."""
        return tensor[..., block, :].reshape(len(self.keys), -1, tensor.shape[-1])

    def apart(self, rows: Tensor) -> Tensor:
        """`together`'s rows, by head."""
        return rows.view(*self.queries.shape[:3], -1, rows.shape[-1])

    def scaled(self, block: slice) -> Tensor:
        """A block's queries, `together`, times the scale."""
        return self.together(self.queries, block) * self.scale

    def probabilities(self, block: slice) -> Tensor:
        """How much each query of a block makes of each key up to the block's end, `together`."""
        scores = torch.bmm(self.scaled(block), self.keys[:, : block.stop].transpose(1, 2))
        size = block.stop - block.start
        self.apart(scores)[..., block.start :] += self.later[:size, :size]
        return torch.softmax(scores, -1)
