import pytest
import torch

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.masking.scores import MARGIN, Scored, count_pruned, masks_from_scores, starting_scores

SALIENCY = torch.tensor([[4.0, 1.0, 2.0, 1.0], [8.0, 8.0, 0.0, 0.0]])


def mask_from_scores(
    scores: torch.Tensor, keep: torch.Tensor, pruned: torch.Tensor, pattern: NofM | None
) -> torch.Tensor:
    return masks_from_scores([Scored(scores, keep, pruned, pattern)])[0]


def test_scores_by_hand() -> None:
    """The first row's mean is 2; its mask keeps weights 0 and 2; the border lies between 2 / 2 and 1 / 2."""
    own_mask = torch.tensor([[True, False, True, False], [True, True, False, False]])
    result = starting_scores(own_mask, SALIENCY, None)
    assert result[0].tolist() == pytest.approx([2 + MARGIN, 0.5 - MARGIN, 1 + MARGIN, 0.5 - MARGIN])
    assert result[1].tolist() == pytest.approx([2 + MARGIN, 2 + MARGIN, -MARGIN, -MARGIN])
    other_mask = torch.tensor([[False, True, True, False], [True, False, True, False]])
    result = starting_scores(other_mask, SALIENCY, NofM(1, 2))
    # Groups of two: the borders are (4 + 1) / 2 / 2 and (2 + 1) / 2 / 2; 8 / 4 and 0.
    # The first two have the wrong order: 0.75 on either side of the border.
    assert result[0].tolist() == pytest.approx([1.25 - MARGIN / 1.75, 1.25 + MARGIN / 1.75, 1 + MARGIN, 0.5 - MARGIN])
    assert result[1].tolist() == pytest.approx([2 + MARGIN, 2 - MARGIN, MARGIN, -MARGIN])


@pytest.mark.parametrize("pattern", [None, NofM(2, 4), NofM(1, 4), NofM(3, 8)], ids=str)
@pytest.mark.parametrize("same", [True, False])
def test_scores_give_the_mask_that_they_come_from(pattern: NofM | None, same: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    saliency = torch.randint(0, 5, (20, 42), generator=generator).float()  # many ties, tails of two
    ranking = saliency if same else torch.randint(0, 5, (20, 42), generator=generator).float()
    keep = initial_mask(ranking, pattern or Unstructured(0.6, over_linear=True), Granularity.OUTPUT)
    scores = starting_scores(keep, saliency, pattern)
    assert torch.equal(mask_from_scores(scores, keep, count_pruned(keep, pattern), pattern), keep)
    # Whatever the scores, as many are kept of each row and group.
    moved = mask_from_scores(
        scores + torch.randn(scores.shape, generator=generator), keep, count_pruned(keep, pattern), pattern
    )
    assert torch.equal(moved.sum(1), keep.sum(1))
    if pattern is not None:
        covered = pattern.covered(42)
        assert (moved[:, :covered].view(20, -1, pattern.of).sum(-1) == pattern.kept).all()
        assert moved[:, covered:].all()


def test_a_large_border_does_not_swallow_the_margin() -> None:
    """The border lies between 980 and 990; the first and the last weight are far on its wrong side."""
    keep = torch.tensor([[True, True, False, False] + [False] * 3996])
    saliency = torch.full((1, 4000), 1.0)
    saliency[0, :4] = torch.tensor([1e4, 9.8e6, 9.9e6, 1.5e7])
    keep = torch.cat([keep, keep.flip(1)])
    saliency = torch.cat([saliency, saliency.flip(1)])
    pattern = NofM(2, 4)
    keep[:, 4:-4].view(2, -1, 4)[..., :2] = True
    keep[0, -4:-2], keep[1, :2] = True, True
    scores = starting_scores(keep, saliency, pattern)
    assert scores[0, 3] > 900
    assert torch.equal(mask_from_scores(scores, keep, count_pruned(keep, pattern), pattern), keep)


def test_the_tail_stays_as_it_was() -> None:
    """Tail of a row, also where another tool has pruned it."""
    keep = torch.tensor([[True, False, False, True, False]])
    scores = starting_scores(keep, torch.tensor([[1.0, 2, 3, 0, 9]]), NofM(2, 4))
    for moved in (scores, scores + torch.tensor([[-9.0, 9, 0, 0, 9]])):
        result = mask_from_scores(moved, keep, count_pruned(keep, NofM(2, 4)), NofM(2, 4))
        assert not result[0, 4]
        assert result[0, :4].sum() == 2


def test_what_is_fixed_stays_and_rows_may_be_empty_or_full() -> None:
    keep = torch.tensor([[True, False, True, False], [True, True, True, True], [False, False, False, False]])
    fixed = torch.zeros_like(keep)
    fixed[0, 2] = True
    scores = starting_scores(keep, torch.zeros(3, 4), None, fixed)
    assert torch.equal(mask_from_scores(scores, keep, count_pruned(keep, None), None), keep)
    scores -= torch.tensor([9.0, 0, 9, 0])
    assert mask_from_scores(scores, keep, count_pruned(keep, None), None)[0].tolist() == [False, False, True, True]


def test_zeros_of_the_dense_model_count_as_kept_and_stay() -> None:
    """Groups of 2:4 in which three, two and all four are kept, since some of them are zero."""
    keep = torch.tensor([[True, True, True, False, True, True, False, False, True, True, True, True]])
    fixed = torch.tensor([[True, False, False, False, False, True, False, False, True, True, False, False]])
    saliency = torch.tensor([[0.0, 1, 2, 3, 4, 0, 6, 5, 0, 0, 7, 8]])
    pattern = NofM(2, 4)
    scores = starting_scores(keep, saliency, pattern, fixed)
    assert count_pruned(keep, pattern).tolist() == [[1, 2, 0]]
    assert torch.equal(mask_from_scores(scores, keep, count_pruned(keep, pattern), pattern), keep)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        moved = mask_from_scores(
            scores + 5 * torch.randn(1, 12, generator=generator), keep, count_pruned(keep, pattern), pattern
        )
        assert torch.equal(count_pruned(moved, pattern), count_pruned(keep, pattern))
        assert moved[fixed].all()
