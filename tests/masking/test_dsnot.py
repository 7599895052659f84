"""The oracle is the paper's loop, one row and one weight at a time."""

import pytest
import torch
from torch import Tensor

from llm_barber.masking.dsnot import dsnot
from llm_barber.masking.find_patterns import holds
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.saliency import wanda


def oracle(
    keep: Tensor,
    weight: Tensor,
    score: Tensor,
    sums: Tensor,
    variance: Tensor,
    pattern: NofM | None,
    cycles: int,
    threshold: float,
) -> Tensor:
    result = keep.clone()
    for row in range(len(keep)):
        share = [(weight[row, c] * sums[c]).item() for c in range(keep.shape[1])]
        pruned = [c for c in range(len(share)) if not keep[row, c]]
        kept = [c for c in range(len(share)) if keep[row, c]]
        error = sum(share[c] for c in pruned)
        positive = error > 0
        for _ in range(cycles):
            if abs(error) <= threshold or not pruned:
                break
            sign = 1 if error > 0 else -1
            grow = max(pruned, key=lambda c: sign * share[c] / variance[c].item())
            if pattern is None:
                candidates = [c for c in kept if sign * share[c] < 0]
            else:
                candidates = [c for c in kept if c // pattern.of == grow // pattern.of]
            if not candidates:
                break
            drop = min(candidates, key=lambda c: score[row, c].item())
            after = error + share[drop] - share[grow]
            if pattern is not None and (after > 0) != positive:
                break
            result[row, grow], result[row, drop] = True, False
            pruned.remove(grow)
            kept.remove(drop)
            error = after
    return result


@pytest.mark.parametrize("cycles", [1, 3, 50])
@pytest.mark.parametrize("target", [Unstructured(0.5), Unstructured(0.7), NofM(2, 4), NofM(1, 4)])
def test_equals_the_papers_loop(target: Pattern, cycles: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 16, generator=generator) + torch.randn(16, generator=generator)
    weight = torch.randn(12, 16, generator=generator)
    score = wanda(weight, inputs.square().sum(0))
    sums, variance = inputs.sum(0), inputs.var(0, unbiased=False)
    keep = initial_mask(score, target, Granularity.OUTPUT)
    pattern = target if isinstance(target, NofM) else None
    before = keep.clone()
    result = dsnot(keep, weight, score, sums, variance, pattern, cycles, threshold=0.1)
    assert torch.equal(keep, before)
    assert torch.equal(result, oracle(keep, weight, score, sums, variance, pattern, cycles, 0.1))
    assert not torch.equal(result, keep)
    assert torch.equal(result.sum(1), keep.sum(1))
    if pattern is not None:
        assert holds(pattern, result)


def test_rows_without_error_or_candidates_are_left_alone() -> None:
    weight = torch.ones(2, 4)
    keep = torch.tensor([[True, True, False, False], [False, False, False, False]])
    sums = torch.tensor([1.0, 1.0, 1.0, -1.0])
    assert torch.equal(dsnot(keep, weight, weight, sums, torch.ones(4)), keep)
