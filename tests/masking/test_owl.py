import pytest
import torch

from llm_barber.masking.owl import layer_sparsities, outlier_share


def test_share_by_hand() -> None:
    scores = [torch.tensor([[1.0, 1.0, 1.0, 40.0]]), torch.tensor([[1.0], [1.0]])]  # mean 7.5
    assert outlier_share(scores) == pytest.approx(1 / 6)
    assert outlier_share(scores, multiple=6.0) == 0
    assert outlier_share(scores, multiple=0.1) == 1


def test_sparsities_by_hand() -> None:
    # relative: 0, 0.08, 0.16, mean 0.08: the layer with the most outliers keeps the most.
    assert layer_sparsities([0.01, 0.02, 0.03], [5, 5, 5], 0.5) == pytest.approx([0.58, 0.5, 0.42])
    assert layer_sparsities([0.02, 0.02], [1, 9], 0.7) == pytest.approx([0.7, 0.7])


def test_the_mean_over_weights_is_what_was_asked_for() -> None:
    sizes = [100, 300, 50, 7]
    sparsities = layer_sparsities([0.5, 0.1, 0.2, 0.9], sizes, 0.6, 0.15)
    assert sum(share * size for share, size in zip(sparsities, sizes, strict=True)) / sum(sizes) == pytest.approx(0.6)
    assert max(sparsities) - min(sparsities) == pytest.approx(0.3)


def test_impossible_spreads_are_refused() -> None:
    with pytest.raises(ValueError, match="are not within 0 and 0.99"):
        layer_sparsities([0.0, 1.0], [1, 1], 0.05)
