"""Routes of tokens to experts, and the rows in which experts compute them: sorted, grouped, and padded if need be.

A route is one of the k experts of a token. Rows are gathered by `take`, forward and backward, and never scattered: no
sum depends on the order in which threads arrive.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# Experts with at most so many rows for each sequence share a bucket, whatever their number of rows.
FEWEST_ROWS = 16


@dataclass(frozen=True)
class Bucket:
    """Experts that are computed together; their rows, (rows, features), follow each other in a layout.

    `experts`: their numbers. `rows`: number of rows of all these experts, padding included. `ends`: int32 (experts,),
    the row after each expert's last row; nothing is padded then. None: every sequence of every expert of the bucket has
    the same number of rows, padded with zeros.
    """

    experts: tuple[int, ...]
    rows: int
    ends: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Rows for all routes, bucket after bucket.

    Attributes:
        buckets: the experts that are computed together.
        routes: int64 (rows,), the route of each row, token · k + choice; -1: padding.
        slots: int64 (tokens, k), the row of each route.
    """

    buckets: tuple[Bucket, ...]
    routes: Tensor
    slots: Tensor

    def inputs(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Rows of the tokens' states, (tokens, hidden), for each bucket."""
        token = self.routes.div(self.slots.shape[1], rounding_mode="floor")
        return self._by_bucket(take(hidden, token, self.slots, self.has_padding))

    def outputs(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of the routes, (tokens · k, features) in the order of tokens, from the rows of each bucket."""
        joined = rows[0] if len(rows) == 1 else torch.cat(list(rows))
        return take(joined, self.slots.flatten(), self.routes.unsqueeze(1), False, self.has_padding)

    @property
    def has_padding(self) -> bool:
        """True if there are rows without a route."""
        return len(self.routes) > self.slots.numel()

    @cached_property
    def padding(self) -> tuple[Tensor, ...]:
        """Rows that are padded, bool (rows, 1), for each bucket."""
        return self._by_bucket((self.routes < 0).unsqueeze(1))

    def _by_bucket(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows, [bucket.rows for bucket in self.buckets])


class Routes:
    """Routes of whole sequences of tokens, sorted by expert, then by token.

    Args:
        top_k_index: int64, (tokens, k), the experts of each token.
        experts: number of experts.
        sequences: number of sequences; each has as many tokens, one after the other.
    """

    def __init__(self, top_k_index: Tensor, experts: int, sequences: int) -> None:
        self.index = top_k_index
        self._experts, self._sequences = experts, sequences
        tokens, self._chosen = top_k_index.shape
        routed = top_k_index.flatten()
        self._order = routed.argsort(stable=True)
        self._expert = routed[self._order]
        self._sequence = self._order // (self._chosen * (tokens // sequences))
        group = self._expert * sequences + self._sequence
        groups = torch.arange(experts * sequences, device=group.device)
        self._first, after = (torch.searchsorted(group, groups, right=right) for right in (False, True))
        self._after = after.view(experts, sequences)
        self._place = torch.arange(len(group), device=group.device) - self._first[group]  # in its sequence and expert
        self._sizes = self._after - self._first.view(experts, sequences)

    @property
    def counts(self) -> Tensor:
        """Number of tokens of each expert, int64 (experts,)."""
        return self._sizes.sum(1)

    def sorted(self) -> Layout:
        """One bucket without padding; the host does not wait for the device."""
        ends = self._after[:, -1].to(torch.int32)
        bucket = Bucket(tuple(range(self._experts)), len(self._order), ends)
        slots = torch.empty_like(self._order)
        slots[self._order] = torch.arange(len(self._order), device=slots.device)
        return Layout((bucket,), self._order, slots.view(self.index.shape))

    def padded(self, together: bool) -> Layout:
        """Experts in buckets, each sequence of an expert padded to the rows of its bucket.

        The host waits for the device once, for the sizes. Each sequence of an expert gets as many rows as the expert's
        sequence with the most tokens, at least one, so that an expert without tokens is computed, too.

        Args:
            together: experts share a bucket if their rows differ by less than a factor of 2. Otherwise each expert has
                a bucket of its own.
        """
        rooms = self._sizes.amax(1).clamp_min(1).tolist()
        grouped = join_experts(rooms) if together else [(expert,) for expert in range(self._experts)]
        firsts, widths = [0] * self._experts, [0] * self._experts
        buckets, start = [], 0
        for experts in grouped:
            room = max(rooms[expert] for expert in experts)
            for number, expert in enumerate(experts):
                firsts[expert], widths[expert] = start + number * room * self._sequences, room
            buckets.append(Bucket(experts, len(experts) * room * self._sequences))
            start += buckets[-1].rows
        first, room = torch.tensor([firsts, widths], device="cpu").to(self._order.device)
        slot = first[self._expert] + room[self._expert] * self._sequence + self._place
        slots, routes = torch.empty_like(self._order), self._order.new_full((start,), -1)
        slots[self._order], routes[slot] = slot, self._order
        return Layout(tuple(buckets), routes, slots.view(self.index.shape))


def join_experts(rooms: Sequence[int]) -> list[tuple[int, ...]]:
    """Numbers of the experts of each bucket.

    The rows of two experts in a bucket differ by less than a factor of 2, or both have at most `FEWEST_ROWS`. So
    padding to the most rows of a bucket adds less than as much again, plus `FEWEST_ROWS` for each expert.

    Args:
        rooms: rows of each expert for each sequence.
    """
    buckets: dict[int, list[int]] = {}
    for expert, room in enumerate(rooms):
        buckets.setdefault((max(room, FEWEST_ROWS) - 1).bit_length(), []).append(expert)
    return [tuple(experts) for _, experts in sorted(buckets.items())]


@dataclass
class SequenceView:
    """A view of the rows of a layout by expert and sequence, (experts, sequences, rows, features), zeros where padded.

    The view of the tensor that was viewed last is kept: linears that read the same rows get the same objects.

    Attributes:
        routes: of the layout.
        layout: the layout.
        bucket: of the layout, whose rows are viewed.
        sequences: number of sequences.
    """

    routes: Routes
    layout: Layout
    bucket: Bucket
    sequences: int
    _latest: tuple[Tensor, list[tuple[tuple[int, ...], Tensor]]] | None = field(default=None, init=False)

    @cached_property
    def _target(self) -> tuple[Layout, Tensor, Tensor] | None:
        """A padded layout, where the bucket is not padded; which of the bucket's rows it takes, and back."""
        if self.bucket.ends is None:
            return None
        padded = self.routes.padded(together=True)
        index = self.layout.slots.flatten()[padded.routes.clamp_min(0)].masked_fill(padded.routes < 0, -1)
        return padded, index, padded.slots.flatten()[self.layout.routes].unsqueeze(1)

    def __call__(self, rows: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
        """Experts of each part of the rows, (rows, features), and the part's view."""
        if self._latest is None or self._latest[0] is not rows:
            self._latest = rows, list(self._views(rows))
        return self._latest[1]

    def _views(self, rows: Tensor) -> Iterable[tuple[tuple[int, ...], Tensor]]:
        buckets: tuple[Bucket, ...] = (self.bucket,)
        if self._target is not None:
            layout, index, back = self._target
            buckets, rows = layout.buckets, take(rows, index, back, layout.has_padding)
        for bucket, part in zip(buckets, torch.split(rows, [bucket.rows for bucket in buckets]), strict=True):
            yield bucket.experts, part.view(len(bucket.experts), self.sequences, -1, part.shape[-1])


def take(rows: Tensor, index: Tensor, back: Tensor, gaps: bool = False, back_gaps: bool = False) -> Tensor:
    """Gather rows, (n, features), by their index, int64 (m,).

    Args:
        rows: (n, features).
        index: the row of each result; -1: zeros.
        back: int64 (n, r), the results that took each row; -1: none. The gradient is summed over them, in this order.
        gaps: some of `index` is -1.
        back_gaps: some of `back` is -1.
    """
    result: Tensor = _Take.apply(rows, index, back, gaps, back_gaps)  # type: ignore[no-untyped-call]  # PyTorch's
    return result


class _Take(torch.autograd.Function):
    """`take`, whose backward pass gathers as well: PyTorch's own would add up rows one by one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: Tensor, gaps: bool, back_gaps: bool) -> Tensor:
        ctx.save_for_backward(back)
        ctx.back_gaps = back_gaps
        return _gather(rows, index, gaps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        taken = _gather(gradients[0], back.flatten(), ctx.back_gaps)
        return taken.view(*back.shape, -1).sum(1), None, None, None, None


def _gather(rows: Tensor, index: Tensor, gaps: bool) -> Tensor:
    """Rows by index; zeros where it is -1, if there are such `gaps`."""
    if not gaps:
        return rows[index]
    return rows[index.clamp_min(0)].masked_fill_((index < 0).unsqueeze(1), 0)
