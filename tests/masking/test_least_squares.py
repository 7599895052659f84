"""Least squares of kept weights, compared with solutions of `torch.linalg`."""

import pytest
import torch

from llm_barber.masking.least_squares import least_squares, squared_distance


def make(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make weights, a keep mask, and inputs, (tokens, in), in the sparse and in the target model."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 12, generator=generator)
    keep = torch.rand(7, 12, generator=generator) < 0.5
    keep[0] = True
    keep[1] = False
    sparse = torch.randn(80, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    return weight, keep, sparse, sparse + 0.3 * torch.randn(80, 12, generator=generator)


@pytest.mark.parametrize("other_target", [False, True])
def test_equals_lstsq_on_the_kept_columns(other_target: bool) -> None:
    weight, keep, sparse, other = make()
    target = other if other_target else sparse
    linear = weight @ ((sparse - target).t() @ sparse)
    solution = least_squares(keep, weight, sparse.t() @ sparse, linear, steps=60, damping=0.0)
    assert not solution[~keep].any()
    for row in range(len(weight)):
        columns = keep[row].nonzero().flatten()
        if len(columns):
            wanted = torch.linalg.lstsq(
                sparse[:, columns].double(), (target @ weight[row]).double().unsqueeze(1)
            ).solution
            assert solution[row, columns].double() == pytest.approx(wanted.flatten(), rel=1e-3, abs=1e-3)


def test_damping_pulls_towards_the_dense_weights() -> None:
    weight, keep, sparse, _ = make()
    gram = sparse.t() @ sparse
    solution = least_squares(keep, weight, gram, steps=60, damping=0.1)
    strength = 0.1 * gram.diagonal().mean()
    for row in range(len(weight)):
        columns = keep[row].nonzero().flatten()
        if len(columns):
            matrix = gram[columns][:, columns] + strength * torch.eye(len(columns))
            right = (weight[row] @ gram)[columns] + strength * weight[row, columns]
            assert torch.allclose(solution[row, columns], torch.linalg.solve(matrix, right), rtol=1e-3, atol=1e-3)
    stiff = least_squares(keep, weight, gram, steps=60, damping=1e6)
    assert torch.allclose(stiff, weight * keep, atol=1e-4)


def test_every_step_lowers_the_error() -> None:
    weight, keep, sparse, _ = make()
    gram = sparse.t() @ sparse
    last = None
    for steps in range(8):
        change = weight - least_squares(keep, weight, gram, steps=steps, damping=0.0)
        error = ((change @ gram) * change).sum(1)
        assert last is None or (error <= last * (1 + 1e-4) + 1e-3).all()
        last = error


def test_dead_inputs_and_solved_rows() -> None:
    weight, keep, sparse, _ = make()
    sparse[:, 3] = 0
    solution = least_squares(keep, weight, sparse.t() @ sparse, steps=200, damping=0.0)
    assert solution.isfinite().all()
    assert torch.equal(solution[:, 3], weight[:, 3] * keep[:, 3])
    assert torch.allclose(solution[0], weight[0], atol=1e-4)  # a row without pruned weights stays as it is


def test_any_start_leads_to_the_solution() -> None:
    weight, keep, sparse, _ = make()
    gram = sparse.t() @ sparse
    solution = least_squares(keep, weight, gram, steps=60)
    assert torch.allclose(least_squares(keep, weight, gram, steps=0, start=solution), solution)
    assert torch.allclose(least_squares(keep, weight, gram, steps=60, start=torch.randn(7, 12)), solution, atol=1e-3)


def test_squared_distance_is_that_of_the_outputs() -> None:
    weight, keep, sparse, other = make()
    values = weight * keep
    linear = weight @ ((sparse - other).t() @ sparse)
    target = other @ weight.t()

    def distance(matrix: torch.Tensor) -> torch.Tensor:
        return (sparse @ matrix.t() - target).square().sum(0)

    difference = squared_distance(values, weight, sparse.t() @ sparse, linear)
    assert torch.allclose(difference, distance(values) - distance(weight), rtol=1e-3, atol=1e-2)
