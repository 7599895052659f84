import torch

from llm_barber.masking.find_patterns import find_pattern, find_patterns, holds
from llm_barber.masking.pattern import NofM


def test_find_patterns_give_the_smallest_n() -> None:
    nonzero = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 0]], dtype=torch.bool)
    assert find_patterns(nonzero) == [NofM(1, 2), NofM(2, 4)]
    assert holds(NofM(2, 4), nonzero)
    assert not holds(NofM(1, 4), nonzero)
    assert holds(NofM(1, 3), nonzero)  # but for a tail of two
    assert not holds(NofM(8, 9), nonzero)  # no whole group


def test_found_pattern_needs_filled_groups() -> None:
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    filled = torch.tensor([1, 1, 0, 0], dtype=torch.bool).repeat(2, 4)
    assert find_pattern(filled, nothing) == NofM(2, 4)
    sparse = filled.clone()
    sparse[0, 0] = False
    assert find_pattern(sparse, nothing) is None
    natural = nothing.clone()
    natural[0, 0] = True  # it may have been kept
    assert find_pattern(sparse, natural) == NofM(2, 4)


def test_half_of_every_row_is_no_pattern() -> None:
    half = torch.tensor([1] * 8 + [0] * 8, dtype=torch.bool).repeat(3, 1)
    assert find_pattern(half, torch.zeros_like(half)) is None
