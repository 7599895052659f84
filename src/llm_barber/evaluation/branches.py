"""Sequences that begin alike, as a single sequence: the common beginning once, then the rest of each as a branch.

A question's endings share its context. With a mask that hides the branches from each other, and with positions that
start again after the beginning, each token gets the states that it has in a sequence of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Tokens = tuple[int, ...]
MOST_TOKENS = 1024  # of a sequence with branches: a mask takes the square of them
LEAST_GAIN = 0.25  # share of a sequence's tokens that it must have in common; a mask costs time, too


@dataclass(frozen=True)
class Branched:
    """A beginning, and the rest of each sequence that begins so.

    Attributes:
        beginning: tokens that all sequences have in common.
        branches: the rest of each sequence; an empty branch is the beginning alone.
    """

    beginning: Tokens
    branches: tuple[Tokens, ...] = ((),)

    @property
    def is_plain(self) -> bool:
        """Test whether this is a single sequence without a branch."""
        return self.branches == ((),)

    @cached_property
    def tokens(self) -> Tokens:
        """The beginning, and then all branches."""
        return self.beginning + tuple(token for branch in self.branches for token in branch)

    @property
    def sequences(self) -> list[Tokens]:
        """The sequences, each by itself."""
        return [self.beginning + branch for branch in self.branches]

    def indices(self) -> list[Tensor]:
        """The indices in `tokens` of each sequence, int64, (tokens of the sequence,)."""
        common, start = torch.arange(len(self.beginning)), len(self.beginning)
        result = []
        for branch in self.branches:
            result.append(torch.cat([common, torch.arange(start, start + len(branch))]))
            start += len(branch)
        return result


def branched(sequences: Iterable[Tokens]) -> Iterator[Branched]:
    """Join sequences that have a beginning in common, where that saves tokens.

    Sequences are sorted, so that those which begin alike are neighbours; a neighbour is taken in if `LEAST_GAIN` of its
    tokens need not be computed again, and if all fit `MOST_TOKENS`.
    """
    group: list[Tokens] = []
    common = total = 0  # tokens of the group's beginning, and of the group
    for sequence in sorted(sequences):
        shared = min(common, _common(group[-1], sequence)) if group else 0
        joined = total + len(sequence) + (common - shared) * (len(group) - 1) - shared
        if group and total + len(sequence) - joined >= LEAST_GAIN * len(sequence) and joined <= MOST_TOKENS:
            group.append(sequence)
            common, total = shared, joined
        else:
            if group:
                yield _branched(group, common)
            group, common, total = [sequence], len(sequence), len(sequence)
    if group:
        yield _branched(group, common)


def _branched(group: Sequence[Tokens], common: int) -> Branched:
    return Branched(group[0][:common], tuple(sequence[common:] for sequence in group))


def _common(first: Tokens, second: Tokens) -> int:
    """Number of tokens that two sequences begin with alike."""
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return index
    return min(len(first), len(second))


@dataclass(frozen=True)
class Batch:
    """Sequences that are computed together.

    Attributes:
        tokens: int64, (sequences, tokens), zeros after shorter sequences.
        positions: of the tokens, int64, (sequences, tokens); None: from 0 on.
        visible: True where a token (row) reads another (column), (sequences, tokens, tokens); None: causal.
    """

    tokens: Tensor
    positions: Tensor | None = None
    visible: Tensor | None = None


def make_batch(rows: Sequence[Branched]) -> Batch:
    """Batch of sequences: with neither positions nor a mask if none of them branches.

    Causal attention does not read the zeros after shorter sequences.
    """
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.tokens, dtype=torch.int64) for row in rows], True)
    if all(row.is_plain for row in rows):
        return Batch(tokens)
    length = tokens.shape[1]
    positions = torch.arange(length).repeat(len(rows), 1)
    visible = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(rows), 1, 1)
    for row, row_positions, row_visible in zip(rows, positions, visible, strict=True):
        start = common = len(row.beginning)
        for branch in row.branches:
            end = start + len(branch)
            row_positions[start:end] -= start - common
            row_visible[start:end, common:start] = False
            start = end
        row_positions[start:] = 0  # padding, whose results nothing reads
    return Batch(tokens, positions, visible)
