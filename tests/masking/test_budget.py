import itertools

import pytest
import torch

from llm_barber.masking.budget import cheapest_sparsities, removal_costs, spread_budget


def test_removal_costs_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, 1.0]])
    rows, columns = torch.tensor([2.0, 6.0]), torch.tensor([4.0, 3.0, 1.0])
    # F = rows ⊗ columns / 8; ½ W² F: [1·8, 4·6, 9·2] / 16 and [16·24, 0, 1·6] / 16
    expected = torch.tensor([(8 + 0) / 32, (18 + 6) / 32, (24 + 384) / 32])
    assert torch.allclose(removal_costs(weight, rows, columns), expected)
    assert (removal_costs(weight, torch.zeros(2), torch.zeros(3)) == 0).all()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.65])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_within_the_budget_costs_less(seed: int, sparsity: float) -> None:
    """Brute force over all numbers of weights a row; rows alike, where the greedy choice is exact."""
    generator = torch.Generator().manual_seed(seed)
    columns = [5, 8, 6]
    costs = [torch.rand(count, generator=generator).sort().values for count in columns]
    budget = round(sparsity * sum(columns))
    choices = [chosen for chosen in itertools.product(*(range(count) for count in columns)) if sum(chosen) == budget]
    best = min(choices, key=lambda chosen: sum(cost[:n].sum().item() for cost, n in zip(costs, chosen, strict=True)))
    expected = [n / count for n, count in zip(best, columns, strict=True)]
    assert cheapest_sparsities(costs, [1, 1, 1], sparsity) == expected
    assert spread_budget(costs, [1, 1, 1], sparsity, 1.0) == pytest.approx(expected)


def test_rows_of_different_number_limits_and_share() -> None:
    costs = [torch.arange(10.0), torch.full((10,), 100.0)]
    assert cheapest_sparsities(costs, [1, 1], 0.5) == [0.9, 0.1]  # none loses all
    assert spread_budget(costs, [1, 1], 0.5, 0.25) == [0.6, 0.4]
    assert spread_budget(costs, [1, 1], 0.5, 0.2) == [0.6, 0.4]  # 5.8 and 4.2 of ten, in whole weights
    assert spread_budget(costs, [1, 1], 0.5, 0.0) == [0.5, 0.5]
    # A linear with four times the rows: six of its columns are 24 of the 25 to go; of the seventh one row goes, too.
    assert cheapest_sparsities(costs, [4, 1], 0.5) == [0.625, 0.0]
    assert spread_budget(costs, [4, 1], 0.5, 1.0) == [0.625, 0.0]
    assert cheapest_sparsities(costs, [1, 1], 0.1) == [0.2, 0.0]


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.2, [0.24, 0.16]),  # a fifth of the way from 0.2 and 0.2 to 0.4 and 0.0
        (0.5, [0.7, 0.3]),  # half-way to 0.9 and 0.1
        (0.7, [0.84, 0.56]),  # 0.7 of the way to 0.9 and 0.5
    ],
)
def test_by_default_the_share_of_the_way_is_the_sparsity(sparsity: float, expected: list[float]) -> None:
    costs = [torch.arange(10.0), torch.full((10,), 100.0)]
    assert spread_budget(costs, [10, 10], sparsity) == pytest.approx(expected)  # in whole weights of 100


@pytest.mark.parametrize("seed", range(20))
def test_what_a_linear_at_its_limit_cannot_give_others_do(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [16, 16, 16, 40]
    costs = [torch.rand(count, generator=generator).sort().values for count in (6, 33, 33, 16)]
    sizes = [len(cost) * count for cost, count in zip(costs, rows, strict=True)]
    for share in (0.0, 0.5, 1.0):
        sparsities = spread_budget(costs, rows, 0.95, share)
        assert all(chosen <= 1 - count / size for chosen, count, size in zip(sparsities, rows, sizes, strict=True))
        least_left = sum(rows) / sum(sizes)  # a weight of each row stays
        target = min(0.95, 1 - least_left) * sum(sizes)
        assert sum(chosen * size for chosen, size in zip(sparsities, sizes, strict=True)) == pytest.approx(
            target, abs=1
        )
