import itertools

import pytest
import torch

from llm_barber.masking.admm import admm
from llm_barber.masking.find_patterns import holds
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.least_squares import least_squares, squared_distance
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.saliency import wanda
from llm_barber.masking.sparsegpt import sparsegpt


def make(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and a Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight, _ = make(8, 12, 0)
    squares = torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.5
    keep, values = admm(weight, torch.diag(squares), Unstructured(0.5), damping=0.0)
    assert torch.allclose(values, weight * keep, atol=1e-5)
    best = weight * initial_mask(wanda(weight, squares), Unstructured(0.5), Granularity.LINEAR)
    errors = [squared_distance(candidate, weight, torch.diag(squares)).sum() for candidate in (best, values)]
    assert errors[0] <= errors[1] < 1.05 * errors[0]  # it is a heuristic, even here


def oracle(weight: torch.Tensor, gram: torch.Tensor, keeping: int) -> torch.Tensor:
    """The published iteration with linear systems solved directly, in float64; keeps `keeping` weights."""

    def largest(values: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros(values.numel(), dtype=torch.bool)
        chosen[values.abs().flatten().topk(keeping).indices] = True
        return chosen.view(values.shape)

    matrix = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    scale = matrix.diagonal().sqrt()
    matrix = matrix / scale / scale[:, None]
    dense = weight.double() * scale
    penalty, keep, dual = 0.1, largest(dense), torch.zeros_like(dense)
    sparse = dense * keep
    for step in range(1, 301):
        system = matrix + penalty * torch.eye(len(matrix), dtype=torch.float64)
        solved = torch.linalg.solve(system, (dense @ matrix - dual + penalty * sparse).t()).t()
        target = solved + dual / penalty
        sparse = target * largest(target)
        dual = dual + penalty * (solved - sparse)
        if step % 3 == 0:
            changed = ((sparse != 0) != keep).sum().item() / keeping
            keep = sparse != 0
            if changed <= 0.0003:
                break
            penalty *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
    return keep


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_papers_iteration(seed: int) -> None:
    weight, gram = make(10, 12, seed)
    keep, values = admm(weight, gram, Unstructured(0.5))
    assert torch.equal(keep, oracle(weight, gram, 60))
    assert torch.allclose(values, least_squares(keep, weight, gram, steps=100), atol=1e-2)


def test_nearer_to_the_best_of_all_masks_than_wanda() -> None:
    ranks: dict[str, list[int]] = {"admm": [], "wanda": []}
    for seed in range(20):
        weight, gram = make(1, 6, seed)
        errors = []
        for kept in itertools.combinations(range(6), 3):
            mask = torch.zeros(1, 6, dtype=torch.bool)
            mask[0, list(kept)] = True
            errors.append(squared_distance(least_squares(mask, weight, gram), weight, gram).item())
        masks = {
            "admm": admm(weight, gram, Unstructured(0.5))[0],
            "wanda": initial_mask(wanda(weight, gram.diagonal()), Unstructured(0.5), Granularity.OUTPUT),
        }
        for name, mask in masks.items():
            distance = squared_distance(least_squares(mask, weight, gram), weight, gram).item()
            ranks[name].append(sum(error < distance * 0.999 for error in errors))
    assert sum(ranks["admm"]) / 20 < 5  # of 20 masks
    assert sum(ranks["admm"]) < sum(ranks["wanda"])


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NofM(2, 4), NofM(4, 8)], ids=str)
def test_beats_wanda_solved_and_sparsegpt_on_correlated_inputs(pattern: Pattern) -> None:
    weight, gram = make(24, 32, 1)
    keep, values = admm(weight, gram, pattern, Granularity.OUTPUT)
    assert torch.equal(values != 0, keep)
    assert keep.float().mean() == pytest.approx(1 - pattern.sparsity, abs=0.02)
    if isinstance(pattern, NofM):
        assert holds(pattern, keep)
    error = squared_distance(values, weight, gram).sum()
    mask = initial_mask(wanda(weight, gram.diagonal()), pattern, Granularity.OUTPUT)
    assert error < squared_distance(least_squares(mask, weight, gram), weight, gram).sum()
    assert error < squared_distance(sparsegpt(weight, gram, pattern)[1], weight, gram).sum()


def test_dead_inputs_and_no_inputs_at_all() -> None:
    weight, gram = make(4, 8, 2)
    gram[3] = 0
    gram[:, 3] = 0
    for matrix in (gram, torch.zeros_like(gram)):
        keep, values = admm(weight, matrix, NofM(2, 4))
        assert holds(NofM(2, 4), keep)
        assert values.isfinite().all()
