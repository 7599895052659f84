"""The oracle is the method as design and paper state it, in plain Python, one weight at a time."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, exact_floor
from llm_barber.masking.rebuild import rebuild_masks

SHAPES = [(6, 8), (4, 8), (8, 16)]
KEYS = {
    Granularity.OUTPUT: lambda linear, row, column: (linear, row),
    Granularity.INPUT: lambda linear, row, column: (linear, column),
    Granularity.LINEAR: lambda linear, row, column: linear,
    Granularity.BLOCK: lambda linear, row, column: 0,
}
Position = tuple[int, int, int]


def oracle(
    keep: list[Tensor], saliency: list[Tensor], granularity: Granularity, ratio: float, pattern: NofM | None
) -> tuple[list[Tensor], int]:
    groups: dict[object, list[Position]] = defaultdict(list)
    for linear, tensor in enumerate(keep):
        for row in range(tensor.shape[0]):
            for column in range(tensor.shape[1]):
                groups[KEYS[granularity](linear, row, column)].append((linear, row, column))

    def score(position: Position) -> float:
        return saliency[position[0]][position[1:]].item()

    result = [tensor.clone() for tensor in keep]
    beneficial = 0
    growing = []
    for members in groups.values():
        # In the order in which a group's tensor lists them: by row, for an input column too.
        pruned = sorted((p for p in members if not keep[p[0]][p[1:]]), key=lambda p: -score(p))
        kept = sorted((p for p in members if keep[p[0]][p[1:]]), key=score)
        pairs = [(a, b) for a, b in zip(pruned, kept, strict=False) if score(a) > score(b)]
        beneficial += len(pairs)
        swapped = pairs[: exact_floor(ratio, len(pairs))]
        for grow, drop in swapped:
            growing.append(grow)
            if pattern is None:
                result[grow[0]][grow[1:]] = True
                result[drop[0]][drop[1:]] = False
    if pattern is not None:
        by_group: dict[Position, list[Position]] = defaultdict(list)
        for position in growing:
            by_group[position[0], position[1], position[2] // pattern.of].append(position)
        for (linear, row, group), positions in by_group.items():
            columns = range(group * pattern.of, (group + 1) * pattern.of)
            kept = sorted(
                (column for column in columns if keep[linear][row, column]), key=lambda c: score((linear, row, c))
            )
            positions = sorted(positions, key=lambda p: (-score(p), p[2]))[: len(kept)]
            for position in positions:
                result[linear][position[1:]] = True
            for column in kept[: len(positions)]:
                result[linear][row, column] = False
    return result, beneficial


def random_block(seed: int, pattern: NofM | None, ties: bool) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    keep, saliency = [], []
    for shape in SHAPES:
        initial = torch.rand(shape, generator=generator)
        if pattern is None:
            keep.append(initial > 0.6)
        else:
            keep.append(initial_mask(initial, pattern, Granularity.OUTPUT))
        scores = torch.rand(shape, generator=generator)
        saliency.append((scores * 4).floor() if ties else scores)
    return keep, saliency


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pattern", [None, NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(3, 4)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_equals_the_method_in_plain_python(
    granularity: Granularity, ratio: float, pattern: NofM | None, ties: bool
) -> None:
    for seed in range(3):
        keep, saliency = random_block(seed, pattern, ties)
        before = [tensor.clone() for tensor in keep]
        patterns = None if pattern is None else [pattern] * len(keep)
        rebuilt = rebuild_masks(keep, saliency, granularity, ratio, patterns)
        expected, beneficial = oracle(keep, saliency, granularity, ratio, pattern)
        for result, mask, original in zip(rebuilt, expected, before, strict=True):
            assert torch.equal(result.keep, mask)
            assert result.grown == (mask & ~original).sum()
            assert result.dropped == (~mask & original).sum()
        assert sum(result.beneficial for result in rebuilt) == beneficial
        assert all(torch.equal(first, second) for first, second in zip(keep, before, strict=True))  # inputs untouched


def test_by_hand() -> None:
    keep = torch.tensor([[True, True, True, False, False, False]])
    saliency = torch.tensor([[1.0, 6.0, 3.0, 5.0, 2.0, 0.0]])
    # pruned downwards 5 2 0, kept upwards 1 3 6: only (5, 1) is beneficial.
    (result,) = rebuild_masks([keep], [saliency], Granularity.OUTPUT, 1.0)
    assert result.keep.tolist() == [[False, True, True, True, False, False]]
    assert (result.beneficial, result.grown, result.dropped) == (1, 1, 1)
    (nothing,) = rebuild_masks([keep], [saliency], Granularity.OUTPUT, 0.9)  # floor(0.9 · 1) = 0
    assert torch.equal(nothing.keep, keep)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_fixed_weights_neither_grow_nor_drop(granularity: Granularity) -> None:
    keep, saliency = random_block(5, None, ties=False)
    generator = torch.Generator().manual_seed(6)
    fixed = [torch.rand(tensor.shape, generator=generator) > 0.7 for tensor in keep]
    keep = [mask | stays for mask, stays in zip(keep, fixed, strict=True)]
    saliency = [scores.masked_fill(stays, 0) for scores, stays in zip(saliency, fixed, strict=True)]
    rebuilt = rebuild_masks(keep, saliency, granularity, 1.0, fixed=fixed)
    for result, mask, stays in zip(rebuilt, keep, fixed, strict=True):
        assert torch.equal(result.keep[stays], mask[stays])
    assert sum(result.grown for result in rebuilt) == sum(result.dropped for result in rebuilt) > 0


def test_only_grown_weights_without_anything_to_drop() -> None:
    keep = torch.zeros(1, 4, dtype=torch.bool)
    (result,) = rebuild_masks([keep], [torch.ones(1, 4)], Granularity.OUTPUT, 1.0)
    assert (result.beneficial, result.grown, result.dropped) == (0, 0, 0)


def test_linears_with_a_pattern_may_have_a_granularity_of_their_own() -> None:
    keep, saliency = random_block(3, NofM(2, 4), ties=False)
    patterns = [NofM(2, 4), *[None] * (len(keep) - 1)]
    mixed = rebuild_masks(keep, saliency, Granularity.BLOCK, 0.5, patterns, pattern_granularity=Granularity.OUTPUT)
    alone = rebuild_masks(keep[:1], saliency[:1], Granularity.OUTPUT, 0.5, patterns[:1])
    unstructured = rebuild_masks(keep[1:], saliency[1:], Granularity.BLOCK, 0.5)
    assert all(
        torch.equal(first.keep, second.keep) for first, second in zip(mixed, [*alone, *unstructured], strict=True)
    )
    assert mixed[0].grown != rebuild_masks(keep[:1], saliency[:1], Granularity.BLOCK, 0.5, patterns[:1])[0].grown
