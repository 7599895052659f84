"""Borders that C selects are those of a sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_barber import native
from llm_barber.native import borders, threads
from llm_barber.native.borders import can_select, find_borders

pytestmark = pytest.mark.skipif(not can_select(), reason="the C extension was not built, or cannot be used here")

INFINITY, LARGEST = torch.inf, torch.finfo(torch.float32).max
# Samples of 64 and 256 members, and none; whole steps of 16 members, and others.
SIZES = (1, 2, 7, 33, 64, 128, 129, 576, 1000, 1536, 4095, 4096, 5003)


def of_sort(scores: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Borders and surplus by their definition."""
    ordered = scores.sort(1).values
    of_groups = zip(ordered, counts.tolist(), strict=True)
    border = torch.stack([row[count - 1] if count else torch.tensor(-INFINITY) for row, count in of_groups])
    return border.unsqueeze(1), (scores <= border.unsqueeze(1)).sum(1) > counts


def check(scores: torch.Tensor, counts: torch.Tensor) -> None:
    for found, expected in zip(find_borders(scores, counts), of_sort(scores, counts), strict=True):
        assert torch.equal(found, expected)


def scores_of(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    scores = torch.randn(*shape)
    match kind:
        case "long tail":
            return scores.mul(3).exp()
        case "ties":
            return scores.mul(2).round()
        case "equal":
            return torch.full(shape, 0.25)
        case "tiny":
            return scores * 1e-42
        case "huge":
            return (scores * LARGEST).clamp(-LARGEST, LARGEST)
        case "infinite":
            return scores.masked_fill(scores > 0.3, INFINITY).masked_fill(scores < -0.3, -INFINITY)
        case "excluded":
            return scores.masked_fill(scores > -1, LARGEST)
        case "zeros":
            return scores.masked_fill(scores.abs() < 0.7, -0.0).masked_fill(scores.abs() < 0.2, 0.0)
        case "sorted":
            return scores.sort(1).values
        case "sample is of the lowest":  # every 64th member, or every 16th, is below all others
            low = torch.arange(shape[1]) % max(1, shape[1] // 64) == 0
            return scores - 100.0 * (low | (torch.arange(shape[1]) % max(1, shape[1] // 256) == 0))
    return scores


KINDS = (
    "normal", "long tail", "ties", "equal", "tiny", "huge", "infinite", "excluded", "zeros", "sorted",
    "sample is of the lowest",
)  # fmt: skip


@pytest.mark.parametrize("level", ["present", "avx2"])
@pytest.mark.parametrize("kind", KINDS)
def test_borders_are_those_of_a_sort(kind: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if level == "avx2":
        monkeypatch.setattr(borders.native, "usable_instructions", lambda: native.Instructions.AVX2)
    torch.manual_seed(0)
    for members in SIZES:
        scores = scores_of(kind, (12, members))
        check(scores, torch.randint(0, members + 1, (12,)))
        for share in (0.0, 0.01, 0.5, 0.99, 1.0):
            check(scores, torch.full((12,), int(share * members)))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=200), st.data())
def test_any_scores(scores: list[float], data: st.DataObject) -> None:
    check(torch.tensor([scores]), torch.tensor([data.draw(st.integers(0, len(scores)))]))


def test_threads_share_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "VALUES_A_THREAD", 1)
    before = torch.get_num_threads()
    try:
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            for groups in (1, 2, 4, 11):
                scores = torch.randn(groups, 700)
                check(scores, torch.randint(0, 701, (groups,)))
    finally:
        torch.set_num_threads(before)


def test_scores_in_another_order_in_memory() -> None:
    check(torch.randn(300, 40).t(), torch.full((40,), 150))
    check(torch.randn(3, 0), torch.zeros(3, dtype=torch.int64))
    assert [len(values) for values in find_borders(torch.randn(0, 3), torch.zeros(0, dtype=torch.int64))] == [0, 0]


@pytest.mark.parametrize(
    ("scores", "counts"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.tensor([0, 4])),
        (torch.zeros(2, 3), torch.tensor([-1, 0])),
        (torch.zeros(2, 3, device="meta"), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_what_c_could_not_read_is_refused(scores: torch.Tensor, counts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"borders are selected on|do not fit"):
        find_borders(scores, counts)
