import pytest

from llm_barber.masking.pattern import NofM, Unstructured, exact_floor, parse_pattern


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


def test_pattern_is_n_kept_of_m() -> None:
    assert parse_pattern("1:4") == NofM(kept=1, of=4)
    assert NofM(1, 4).sparsity == 0.75


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "2-4", "a:b", "4:4", "5:4", "0:4", "-1:4", "2:4:8", "1.5:4"])
def test_unreadable_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(text)


def test_floor_of_a_share_of_whole_weights_is_that_share() -> None:
    """Allocated sparsities are whole numbers of a row's weights, and survive being written as decimals."""
    for columns in (32, 576, 1536, 4096, 14336):
        for kept in range(1, columns, 7):
            assert exact_floor(kept / columns, columns) == kept
            assert exact_floor(kept / columns, 512 * columns) == 512 * kept
