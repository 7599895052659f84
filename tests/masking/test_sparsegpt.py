"""The oracle is the optimal brain surgeon, column by column, with the inverse downdated explicitly."""

import pytest
import torch
from torch import Tensor

from llm_barber.masking import sparsegpt as module
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.sparsegpt import sparsegpt


def problem(rows: int = 6, columns: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs / 64


def oracle(weight: Tensor, gram: Tensor, pattern: Pattern, block_size: int, damping: float) -> tuple[Tensor, Tensor]:
    weight, gram = weight.double().clone(), gram.double().clone()
    columns = weight.shape[1]
    gram += torch.eye(columns) * damping * gram.diagonal().mean()
    keep = torch.ones_like(weight, dtype=torch.bool)
    # inverses[i]: of the Gram matrix of the columns from i on; the columns before are settled.
    inverses = [torch.linalg.inv(gram[i:, i:]) for i in range(columns)]
    error = [inverses[i][0, 0] for i in range(columns)]
    group = pattern.of if isinstance(pattern, NofM) else block_size
    for start in range(0, columns, block_size):
        for column in range(start, min(start + block_size, columns)):
            if column % group == 0:
                stop = min(column + group, columns)
                saliency = torch.stack([weight[:, c] ** 2 / error[c] for c in range(column, stop)], dim=1)
                if isinstance(pattern, NofM):
                    for row in range(len(weight)):
                        keep[row, column + saliency[row].argsort()[: pattern.of - pattern.kept]] = False
                else:
                    count = pattern.pruned(saliency.numel())
                    flat = torch.ones(saliency.numel(), dtype=torch.bool)
                    flat[saliency.flatten().argsort()[:count]] = False
                    keep[:, column:stop] = flat.reshape(saliency.shape)
            for row in range(len(weight)):
                if not keep[row, column]:
                    inverse = inverses[column]
                    weight[row, column:] -= weight[row, column] * inverse[0] / inverse[0, 0]
    return keep, torch.where(keep, weight, 0)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.3), NofM(2, 4), NofM(1, 4), NofM(3, 6)])
@pytest.mark.parametrize("block_size", [4, 12, 128])
@pytest.mark.parametrize("stride", [2, 5, 32])  # of columns in a block; 32 in the program
def test_equals_the_optimal_brain_surgeon(
    pattern: Pattern, block_size: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRIDE", stride)
    if isinstance(pattern, NofM):
        block_size = -(-block_size // pattern.of) * pattern.of
    weight, gram = problem()
    keep, updated = sparsegpt(weight, gram, pattern, damping=0.01, block_size=block_size)
    expected_keep, expected = oracle(weight, gram, pattern, block_size, 0.01)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(updated.double(), expected, rtol=1e-3, atol=1e-4)


def test_updates_beat_the_dense_weights_under_the_same_mask() -> None:
    weight, gram = problem(rows=16, columns=32)
    keep, updated = sparsegpt(weight, gram, Unstructured(0.5))

    def error(values: Tensor) -> float:
        difference = values - weight
        return torch.einsum("oi,ij,oj->", difference, gram, difference).item()

    assert error(updated) < 0.8 * error(torch.where(keep, weight, 0))


def test_dead_inputs_and_singular_matrices_are_survived() -> None:
    weight, gram = problem()
    gram[3] = gram[:, 3] = 0
    keep, updated = sparsegpt(weight, gram, Unstructured(0.5))
    assert updated.isfinite().all()
    assert (updated[:, 3] == 0).all()
    singular = torch.ones(12, 12) - 1e-3 * torch.eye(12)  # not even semidefinite
    keep, updated = sparsegpt(weight, singular, Unstructured(0.5), damping=1e-9)
    assert updated.isfinite().all()
    assert (~keep).sum() == 36
