"""An order of channels: N:M keeps more of the saliency in it, and never less."""

from itertools import combinations

import pytest
import torch

from llm_barber.masking import channel_order
from llm_barber.masking.channel_order import kept_saliency, order_channels
from llm_barber.masking.pattern import NofM

TWO_OF_FOUR = NofM(2, 4)


def saliency_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_columns_that_compete_are_parted() -> None:
    """Four columns are all of the first rows' saliency, four all of the others': two of each go into a group."""
    saliency = torch.zeros(6, 8)
    saliency[:3, :4] = 1
    saliency[3:, 4:] = 1
    order = order_channels(saliency, TWO_OF_FOUR)
    assert kept_saliency(saliency, torch.arange(8), TWO_OF_FOUR) == 12
    assert kept_saliency(saliency, order, TWO_OF_FOUR) == 24
    for group in order.view(2, 4):
        assert sum(column < 4 for column in group.tolist()) == 2


def best_of_all(saliency: torch.Tensor) -> float:
    """The most that 2:4 keeps of eight columns, over all ways to part them in two groups."""
    best = 0.0
    for first in combinations(range(1, 8), 3):
        group = [0, *first]
        rest = [column for column in range(8) if column not in group]
        best = max(best, kept_saliency(saliency, torch.tensor(group + rest), TWO_OF_FOUR))
    return best


def test_near_the_best_of_all_orders() -> None:
    shares = []
    for seed in range(50):
        saliency = saliency_of(5, 8, seed)
        present = kept_saliency(saliency, torch.arange(8), TWO_OF_FOUR)
        found = kept_saliency(saliency, order_channels(saliency, TWO_OF_FOUR), TWO_OF_FOUR)
        best = best_of_all(saliency)
        assert present <= found <= best + 1e-6
        shares.append((found - present) / (best - present) if best > present else 1.0)
    assert sum(shares) / len(shares) > 0.6


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(4, 8), NofM(1, 4)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(7, 16), (20, 64), (3, 8)])
def test_every_column_has_one_place(rows: int, columns: int, pattern: NofM) -> None:
    saliency = saliency_of(rows, columns)
    order = order_channels(saliency, pattern)
    assert order.sort().values.equal(torch.arange(columns))
    assert order.equal(order_channels(saliency, pattern))
    present = kept_saliency(saliency, torch.arange(columns), pattern)
    assert kept_saliency(saliency, order, pattern) >= present


def test_equal_columns_stay() -> None:
    assert order_channels(torch.ones(4, 16), TWO_OF_FOUR).equal(torch.arange(16))


def test_an_assignment_is_the_best_one() -> None:
    """Against all ways to assign the first places of three groups."""
    saliency = saliency_of(9, 12)
    groups = torch.arange(12).view(3, 4)
    assigned = channel_order._assign(saliency, groups, place=0, kept=2)
    orders = [[a, b, c] for a in (0, 4, 8) for b in (0, 4, 8) for c in (0, 4, 8) if len({a, b, c}) == 3]

    def kept(places: list[int]) -> float:
        order = groups.clone()
        order[:, 0] = torch.tensor(places)
        return kept_saliency(saliency, order.flatten(), TWO_OF_FOUR)

    assert kept(assigned.tolist()) == max(map(kept, orders))


def test_many_groups_are_assigned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_order, "TOGETHER", 3)
    monkeypatch.setattr(channel_order, "STEP", 2)
    monkeypatch.setattr(channel_order, "ROWS", 8)
    saliency = saliency_of(40, 64)
    order = order_channels(saliency, TWO_OF_FOUR)
    assert order.sort().values.equal(torch.arange(64))
    decides = saliency[::5]
    present = kept_saliency(decides, torch.arange(64), TWO_OF_FOUR)
    assert kept_saliency(decides, order, TWO_OF_FOUR) > 1.01 * present
