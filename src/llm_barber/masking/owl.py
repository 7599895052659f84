"""OWL (arXiv 2310.05175): how much of each decoder layer to prune, by its share of outliers.

A layer's outliers are its weights whose Wanda score is far above the layer's mean; a layer with many of them is pruned
less. The mean over all weights is the sparsity asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLE = 5.0  # of the mean score: M
SPREAD = 0.08  # λ: layers lie in a range of 2λ
MOST = 0.99  # of a layer


def outlier_share(scores: Sequence[Tensor], multiple: float = MULTIPLE) -> float:
    """The share of a layer's weights that are outliers (OWL, equation 1).

    Args:
        scores: of each linear, see `saliency.wanda`; any shapes.
        multiple: of the mean over all of them, above which a score is an outlier.
    """
    count = sum(one.numel() for one in scores)
    mean = sum(one.sum(dtype=torch.float64).item() for one in scores) / count
    return sum(int((one > multiple * mean).count_nonzero()) for one in scores) / count


def layer_sparsities(
    shares: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float = SPREAD
) -> list[float]:
    """The sparsity of each layer.

    Args:
        shares: of outliers, a layer each.
        sizes: prunable weights, a layer each; the mean of the sparsities is weighted by them.
        sparsity: of all layers together.
        spread: λ; the layer with the most outliers is pruned 2λ less than the one with the fewest.

    Raises:
        ValueError: a layer's sparsity would leave (0, 0.99].
    """
    low, high = min(shares), max(shares)
    width = high - low or 1.0
    relative = [2 * spread * (share - low) / width for share in shares]
    mean = sum(one * size for one, size in zip(relative, sizes, strict=True)) / sum(sizes)
    found = [sparsity - one + mean for one in relative]
    if min(found) <= 0 or max(found) > MOST:
        raise ValueError(f"sparsities of layers from {min(found):.3f} to {max(found):.3f} are not within 0 and {MOST}")
    return found
