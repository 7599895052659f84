import pytest
import torch

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.groups import from_groups, to_groups
from llm_barber.masking.initial import initial_mask, pruned_counts
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.masking.saliency import magnitude, relative_importance, wanda, weight_gradient


def test_saliency_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [-3.0, 0.0]])
    assert torch.equal(magnitude(weight), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert torch.equal(wanda(weight, torch.tensor([4.0, 9.0])), torch.tensor([[2.0, 6.0], [6.0, 0.0]]))
    squares = torch.tensor([[1.0, 4.0], [9.0, 16.0]])
    assert torch.equal(weight_gradient(weight, squares), torch.tensor([[1.0, 4.0], [9.0, 0.0]]))


def test_relative_importance_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.0], [-1.0, 1.0, 0.0]])
    squares = torch.tensor([16.0, 1.0, 1.0])  # norms 4, 1, 1; to the power of a half 2, 1, 1
    expected = torch.tensor([[(1 / 2 + 1 / 4) * 2, 3 / 4 + 3 / 4, 0], [(1 / 2 + 1 / 2) * 2, 1 / 4 + 1 / 2, 0]])
    torch.testing.assert_close(relative_importance(weight, squares), expected)


def test_masks_by_hand() -> None:
    saliency = torch.tensor([[1.0, 5.0, 2.0, 6.0], [9.0, 3.0, 8.0, 7.0]])
    row = initial_mask(saliency, Unstructured(0.5), Granularity.OUTPUT)
    assert row.tolist() == [[False, True, False, True], [True, False, True, False]]
    linear = initial_mask(saliency, Unstructured(0.5), Granularity.LINEAR)
    assert linear.tolist() == [[False, False, False, True], [True, False, True, True]]
    column = initial_mask(saliency, Unstructured(0.5), Granularity.INPUT)
    assert column.tolist() == [[False, True, False, False], [True, False, True, True]]
    one_of_two = initial_mask(saliency, NofM(1, 2), Granularity.OUTPUT)
    assert one_of_two.tolist() == [[False, True, False, True], [True, False, True, False]]


@pytest.mark.parametrize("sparsity", [0.05, 0.29, 0.5, 0.61, 0.7, 0.99, 1 - 1e-10])
@pytest.mark.parametrize("granularity", [Granularity.OUTPUT, Granularity.INPUT, Granularity.LINEAR])
def test_ties_never_overshoot(sparsity: float, granularity: Granularity) -> None:
    saliency = torch.randint(0, 3, (30, 100), generator=torch.Generator().manual_seed(0)).float()
    keep = initial_mask(saliency, Unstructured(sparsity), granularity)
    (groups,) = to_groups([~keep], granularity)
    assert (groups.sum(1) == Unstructured(sparsity).pruned(groups.shape[1])).all()
    (pruned,), (scores,) = to_groups([~keep], granularity), to_groups([saliency], granularity)
    for mask, row in zip(pruned, scores, strict=True):
        if mask.any() and not mask.all():
            assert row[mask].max() <= row[~mask].min()


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8), (3, 4), (2, 6), (64, 256), (200, 256)])
def test_every_group_keeps_exactly_n_of_m(kept: int, of: int) -> None:
    saliency = torch.randint(0, 4, (10, 6 * of), generator=torch.Generator().manual_seed(0)).float()
    keep = initial_mask(saliency, NofM(kept, of), Granularity.OUTPUT).reshape(-1, of)
    assert (keep.sum(1) == kept).all()
    for mask, row in zip(keep, saliency.reshape(-1, of), strict=True):
        assert row[mask].min() >= row[~mask].max()


def test_inputs_after_the_last_whole_group_stay() -> None:
    saliency = torch.tensor([[1.0, 2.0, 4.0, 3.0, 0.0, 0.0]])
    assert initial_mask(saliency, NofM(2, 4), Granularity.OUTPUT).int().tolist() == [[0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("granularity", list(Granularity))
def test_groups_come_back(granularity: Granularity) -> None:
    linears = [torch.arange(24).reshape(4, 6), torch.arange(12).reshape(2, 6)]
    groups = to_groups(linears, granularity)
    back = from_groups(groups, [(4, 6), (2, 6)], granularity)
    assert all(torch.equal(before, after) for before, after in zip(linears, back, strict=True))
    count = {"output": [(4, 6), (2, 6)], "input": [(6, 4), (6, 2)], "linear": [(1, 24), (1, 12)], "block": [(1, 36)]}
    assert [tuple(group.shape) for group in groups] == count[granularity]


def test_a_sparsity_over_the_linear_by_hand() -> None:
    half = Unstructured(0.5, over_linear=True)
    assert pruned_counts(half, 5, 15).tolist() == [8, 8, 8, 7, 7]  # 37.5: 38, the even one
    assert pruned_counts(Unstructured(0.5), 5, 15) == 7
    assert pruned_counts(Unstructured(1 - 1e-9, over_linear=True), 2, 3).tolist() == [2, 2]  # each keeps one
    for weights, columns in ((576 * 1536 - 5, 576), (53248 * 16384 - 3, 16384)):
        rows = -(-weights // columns)
        assert int(
            pruned_counts(Unstructured(weights / (rows * columns), over_linear=True), rows, columns).sum()
        ) == min(weights, rows * (columns - 1))


def test_nearly_everything_leaves_one_of_a_group() -> None:
    assert Unstructured(1 - 1e-13).pruned(6) == pruned_counts(Unstructured(1 - 1e-13), 2, 6) == 5
