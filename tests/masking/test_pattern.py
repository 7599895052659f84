import pytest
import torch

from llm_barber.masking.pattern import (
    NofM,
    Unstructured,
    exact_floor,
    find_pattern,
    held_patterns,
    holds,
    parse_pattern,
)


@pytest.mark.parametrize(
    ("fraction", "count", "floor"),
    [(0.5, 7, 3), (0.29, 100, 29), (0.7, 10, 7), (1 / 3, 9, 3), (0.01, 99, 0), (1.0, 5, 5), (1 - 1e-10, 1000, 999)],
)
def test_floor_reads_the_decimal_as_written(fraction: float, count: int, floor: int) -> None:
    assert exact_floor(fraction, count) == floor


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_sparsity_outside_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        Unstructured(sparsity)


def test_a_sparsity_over_the_linear_by_hand() -> None:
    half = Unstructured(0.5, over_linear=True)
    assert half.counts(5, 15).tolist() == [8, 8, 8, 7, 7]  # 37.5: 38, the even one
    assert Unstructured(0.5).counts(5, 15) == 7
    assert Unstructured(1 - 1e-9, over_linear=True).counts(2, 3).tolist() == [2, 2]  # each keeps one
    for weights, columns in ((576 * 1536 - 5, 576), (53248 * 16384 - 3, 16384)):
        rows = -(-weights // columns)
        assert int(Unstructured(weights / (rows * columns), over_linear=True).counts(rows, columns).sum()) == min(
            weights, rows * (columns - 1)
        )


def test_nearly_everything_leaves_one_of_a_group() -> None:
    assert Unstructured(1 - 1e-13).pruned(6) == Unstructured(1 - 1e-13).counts(2, 6) == 5


def test_pattern_is_n_kept_of_m() -> None:
    assert parse_pattern("1:4") == NofM(kept=1, of=4)
    assert NofM(1, 4).sparsity == 0.75


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "2-4", "a:b", "4:4", "5:4", "0:4", "-1:4", "2:4:8", "1.5:4"])
def test_unreadable_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(text)


def test_held_patterns_give_the_smallest_n() -> None:
    nonzero = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 0]], dtype=torch.bool)
    assert held_patterns(nonzero) == [NofM(1, 2), NofM(2, 4)]
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


def test_floor_of_a_share_of_whole_weights_is_that_share() -> None:
    """Allocated sparsities are whole numbers of a row's weights, and survive being written as decimals."""
    for columns in (32, 576, 1536, 4096, 14336):
        for kept in range(1, columns, 7):
            assert exact_floor(kept / columns, columns) == kept
            assert exact_floor(kept / columns, 512 * columns) == 512 * kept
