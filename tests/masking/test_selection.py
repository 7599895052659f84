from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_barber.masking import selection
from llm_barber.masking.selection import (
    apply_mask,
    count_true,
    equal_runs,
    lowest,
    lowest_of_each,
    rank_within,
    sort_on_gpu,
    sort_values,
)
from llm_barber.native.borders import can_select
from tests.conftest import bits

rows = st.integers(1, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 3).map(float), min_size=width, max_size=width), min_size=1, max_size=5
    )  # few values: many ties
)


@pytest.mark.parametrize("by_c", [True, False])
@given(scores=rows, data=st.data())
def test_lowest_is_a_stable_sort(by_c: bool, scores: list[list[float]], data: st.DataObject) -> None:
    counts = [data.draw(st.integers(0, len(row))) for row in scores]
    with patch.object(selection, "can_select", lambda: by_c and can_select()):
        chosen = lowest(torch.tensor(scores), torch.tensor(counts))
    for row, count, mask in zip(scores, counts, chosen.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: (row[i], i))
        assert [i for i, is_chosen in enumerate(mask) if is_chosen] == sorted(order[:count])


@given(st.lists(rows, max_size=3), st.data())
def test_several_tensors_give_the_masks_of_each(tensors: list[list[list[float]]], data: st.DataObject) -> None:
    scores = [torch.tensor(tensor) for tensor in tensors]
    counts = [torch.tensor([data.draw(st.integers(0, len(row))) for row in tensor]) for tensor in tensors]
    masks = lowest_of_each(scores, counts, [None] * len(scores))
    for mask, tensor, count in zip(masks, scores, counts, strict=True):
        assert torch.equal(mask, lowest(tensor, count))
        # A GPU breaks the ties of all groups, also of those without any.
        members = selection._UpToBorder.of(tensor, count, None)
        assert torch.equal(mask, selection._break_ties(tensor, members.border, count))


@given(rows, st.data())
def test_borders_that_a_gpu_selects_are_those_of_a_sort(scores: list[list[float]], data: st.DataObject) -> None:
    tensor = torch.tensor(scores)
    tensor[tensor == 1] = -0.0
    tensor[tensor == 3] = torch.inf
    counts = torch.tensor([data.draw(st.integers(0, tensor.shape[1])) for _ in scores])
    runs = equal_runs(counts)
    assert (runs is None) is (int((counts.diff() != 0).sum()) >= selection.MOST_RUNS)
    if runs is None:
        runs = tuple((1, count) for count in counts.tolist())
    selected, of_sort = (
        selection._UpToBorder._selected(tensor, counts, runs),
        selection._UpToBorder.of(tensor, counts, sort_values(tensor)),
    )
    for name in ("border", "chosen", "surplus"):
        assert torch.equal(getattr(selected, name), getattr(of_sort, name)), name
    assert torch.equal(selection._without_ties([selected])[0], lowest(tensor, counts))


def test_equal_runs() -> None:
    assert equal_runs(torch.tensor([3, 3, 2])) == ((2, 3), (1, 2))
    assert equal_runs(torch.tensor([0])) == ((1, 0),)
    assert equal_runs(torch.tensor([1, 2, 1])) is None


@given(rows)
def test_rank_within_is_a_stable_sort(scores: list[list[float]]) -> None:
    ranks = rank_within(torch.tensor(scores)).tolist()
    for row, given_ranks in zip(scores, ranks, strict=True):
        order = sorted(range(len(row)), key=lambda i: (row[i], i))
        assert [given_ranks[i] for i in order] == list(range(len(row)))


def test_masked_weights_are_positive_zero_and_the_others_keep_their_bits() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = torch.tensor([[-1.5, -0.0, 3e-39, -2.0], [1.0, -7.0, 0.0, -0.25]]).to(dtype)
        keep = torch.tensor([[True, True, True, False], [False, False, True, True]])
        masked = apply_mask(weight, keep)
        assert masked.dtype == dtype
        assert torch.equal(bits(masked)[keep], bits(weight)[keep])
        assert torch.equal(bits(masked)[~keep], torch.zeros(3, dtype=bits(masked).dtype))


def test_more_members_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts of a large layer may be one group. (To count two thousand million takes half a minute.)"""
    assert count_true(torch.tensor([[True, False, True], [False, False, False]])).tolist() == [2, 0]
    member = torch.ones(1, 1, dtype=torch.bool)
    assert selection.count_dtype(member.expand(2, 2**31 - 1)) == torch.int32
    assert selection.count_dtype(member.expand(2, 2**31)) == torch.int64
    monkeypatch.setattr(selection, "count_dtype", lambda _: torch.int8)  # is what members are counted in
    assert count_true(member.expand(1, 2**7 + 3)).tolist() == [-(2**7) + 3]
    assert count_true(member.expand(1, 2**7 - 1)).tolist() == [2**7 - 1]


@pytest.mark.parametrize(("together", "sorts"), [(1, [1] * 5), (12, [1] * 5), (26, [2, 2, 1]), (64, [4, 1]), (65, [5])])
def test_a_gpu_sorts_a_few_groups_at_a_time(monkeypatch: pytest.MonkeyPatch, together: int, sorts: list[int]) -> None:
    scores, seen, sort = torch.randn(5, 13), [], torch.Tensor.sort

    def noted(part: torch.Tensor, dim: int) -> Any:
        seen.append(len(part))
        return sort(part, dim=dim)

    monkeypatch.setattr(torch.Tensor, "sort", noted)
    monkeypatch.setattr(selection, "SORTED_ON_GPU", together)
    assert torch.equal(sort_on_gpu(scores), sort_values(scores))
    assert seen == sorts


def test_a_group_that_a_gpu_cannot_sort_is_sorted_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA sorts at most 2³¹ − 1 members of a group."""
    scores = torch.randn(2, 9)
    expected = sort_values(scores)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    monkeypatch.setattr(selection, "LONGEST_ON_GPU", 8)
    assert torch.equal(sort_on_gpu(scores), expected)
